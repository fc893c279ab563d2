"""Which versions of the training stack load together, read from package metadata: torch is never imported.

fbgemm 1.X is built against torch 2.(X+5), and torchrec's minor version is fbgemm's. A mismatch dies in the
loader with "undefined symbol" or "Could not load this library"; here it is named with its cure first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from mtlrec.job.errors import InputError

TORCH = "2.13"
FBGEMM = "1.8"
RAY = "2.60"

# Two wheels, one folder `fbgemm_gpu`: whichever is installed last overwrites the other's libraries.
FBGEMM_WHEELS = {"cpu": "fbgemm-gpu-cpu", "cuda": "fbgemm-gpu"}


@dataclass(frozen=True)
class Package:
    """An installed distribution."""

    version: str
    cuda: str | None = None
    """CUDA version that this torch was built for; None: a CPU build, or another package."""
    damaged: str | None = None
    """First native library of the wheel that is gone."""

    @property
    def minor(self) -> tuple[int, int] | None:
        """(major, minor), or None for a version that is not of that form."""
        match = re.match(r"(\d+)\.(\d+)", self.version)
        return (int(match[1]), int(match[2])) if match else None


Lookup = Callable[[str], Package | None]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with the stack, and its cure; each a phrase without a full stop."""

    name: str
    detail: str
    cure: str

    def __str__(self) -> str:
        return f"{self.name}: {self.detail}; {self.cure}"


def installed(name: str) -> Package | None:
    """What package metadata says of a distribution; None: it is not installed."""
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None
    cuda = None
    if name == "torch":
        cuda = _torch_cuda(Path(str(distribution.locate_file("torch/version.py"))))
    damaged = None
    if name in FBGEMM_WHEELS.values():
        damaged = _first_gone(distribution)
    return Package(distribution.version, cuda, damaged)


def _torch_cuda(version_file: Path) -> str | None:
    # An assignment that torch's build writes; the local version tag ("+cu130") is absent on some indexes.
    try:
        text = version_file.read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"^cuda\b[^=\n]*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return match[1] if match else None


def _first_gone(distribution: metadata.Distribution) -> str | None:
    """Removing one of two wheels that own a folder takes the files of the other along, not its metadata."""
    for file in distribution.files or []:
        if file.suffix == ".so" and not Path(str(distribution.locate_file(file))).is_file():
            return str(file)
    return None


def _cure(device: str, *, remove: Sequence[str] = ()) -> str:
    """Command that gives the right stack for the device, whatever is there now."""
    steps = [f"pip uninstall -y {' '.join(remove)}"] if remove else []
    if device == "cuda":
        steps.append("pip install 'mtlrec[gpu]'")
    else:
        steps += ["pip install 'mtlrec[cpu]'", f"pip install --no-deps torchrec=={FBGEMM}.0"]
    return " && ".join(steps) + " (in a checkout: rm -rf .venv && make install)" * (device != "cuda")


def fbgemm_for(torch: Package) -> tuple[int, int] | None:
    """(major, minor) of the fbgemm and the torchrec that are built for this torch; None: there is none."""
    if torch.minor is None or torch.minor[0] != 2 or torch.minor[1] < 5:
        return None
    return 1, torch.minor[1] - 5


def stack_findings(device: str | None = None, lookup: Lookup = installed) -> list[Finding]:
    """What keeps the training stack from loading, worst first; empty: it loads.

    Args:
        device: "cpu" or "cuda", what is asked for; None: whichever build of torch is installed.
        lookup: gives the installed package of a name.
    """
    torch, torchrec = lookup("torch"), lookup("torchrec")
    wheels = {kind: package for kind, name in FBGEMM_WHEELS.items() if (package := lookup(name))}
    if device is None:
        for_cuda = torch.cuda is not None if torch else "cuda" in wheels
        device = "cuda" if for_cuda and "cpu" not in wheels else "cpu"
    both = list(FBGEMM_WHEELS.values())
    found = []

    if not (torch or torchrec or wheels):
        return [Finding("stack", "torch, fbgemm and torchrec are not installed", _cure(device))]
    if len(wheels) == 2:
        detail = f"{' and '.join(both)} are both installed, and overwrite each other in one folder"
        found.append(Finding("fbgemm", detail, f"keep one: {_cure(device, remove=both)}"))
    if torch is None:
        found.append(Finding("torch", "not installed", _cure(device)))
    elif device == "cuda" and torch.cuda is None:
        detail = f"{torch.version} is a CPU build, and CUDA is asked for"
        cure = f"set run.device: cpu, or {_cure(device, remove=['torch', *both])}"
        found.append(Finding("torch", detail, cure))
    if not wheels:
        found.append(Finding("fbgemm", f"{FBGEMM_WHEELS[device]} is not installed", _cure(device)))
    elif len(wheels) == 1:
        kind, fbgemm = wheels.popitem()
        found += _fbgemm_findings(device, torch, kind, fbgemm)
    if torchrec is None:
        found.append(Finding("torchrec", "not installed", _cure(device)))
    elif torch and (fits := fbgemm_for(torch)) and torchrec.minor != fits:
        belongs = f"torchrec {fits[0]}.{fits[1]} belongs to torch {torch.version}"
        found.append(Finding("torchrec", f"{torchrec.version} is installed, and {belongs}", _cure(device)))
    return found


def _fbgemm_findings(device: str, torch: Package | None, kind: str, fbgemm: Package) -> list[Finding]:
    """Findings on the one wheel of fbgemm that is there; `kind` is "cpu" or "cuda"."""
    name = FBGEMM_WHEELS[kind]
    again = _cure(device, remove=list(FBGEMM_WHEELS.values()))
    if device == "cuda" and kind == "cpu":
        return [Finding("fbgemm", f"{name} is the CPU build, and CUDA is asked for", again)]
    if fbgemm.damaged:
        return [Finding("fbgemm", f"{name} is damaged: {fbgemm.damaged} is gone", again)]
    if torch is None:
        return []
    if kind == "cuda" and torch.cuda is None:
        detail = f"{name} is the CUDA build, and torch {torch.version} the CPU build"
        return [Finding("fbgemm", detail, again)]
    fits = fbgemm_for(torch)
    if fbgemm.minor == fits:
        return []
    belongs = f"fbgemm {fits[0]}.{fits[1]} belongs to it" if fits else "no fbgemm is known for it"
    detail = f"{name} {fbgemm.version} does not load with torch {torch.version}: {belongs}"
    return [Finding("fbgemm", detail, f"use torch {TORCH} with fbgemm {FBGEMM}: {_cure(device)}")]


def require_stack(device: str, lookup: Lookup = installed) -> None:
    """Call before the first import of torch.

    Raises:
        InputError: the installed packages cannot load together, or not on this device; names the cure.
    """
    found = stack_findings(device, lookup)
    if found:
        raise InputError(str(found[0]))


# What loaders say, and what it means; the first pattern that is found counts.
_LOADER_MESSAGES = (
    (
        r"libcuda\.so",
        "the CUDA build of torch or fbgemm is installed, and this machine has no CUDA driver",
        "install the driver, or the CPU build",
    ),
    (
        r"lib(cudart|cublas|cudnn|nccl|nvrtc|nvjitlink|cusparse|cufft|curand|cusolver)\S*: cannot open",
        "a CUDA library that torch or fbgemm was built for is missing",
        "install torch and fbgemm of one CUDA version",
    ),
    (
        r"GLIBC(XX)?_[\d.]+'? not found",
        "this Linux is older than the wheels are built for",
        "use a system with glibc 2.28 or newer, or the container image",
    ),
    (
        r"undefined symbol|[Cc]ould not load (this|the) library",
        "torch, fbgemm and torchrec of versions that do not belong together",
        f"use torch {TORCH} with fbgemm {FBGEMM} and torchrec {FBGEMM}",
    ),
)
_STACK_MODULES = ("torch", "torchrec", "fbgemm_gpu", "tensordict", "torchmetrics", "pyre_extensions", "ray")


def explain_import_error(error: BaseException, lookup: Lookup = installed) -> str | None:
    """One line with the cure for an error that an import of the stack raised; None: it is something else.

    The error may be the loader's own or what TorchRec made of it: the whole chain of causes is read.
    """
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    # What metadata can name is more precise than what a loader says.
    for one in chain:
        if isinstance(one, ModuleNotFoundError) and (one.name or "").split(".")[0] in _STACK_MODULES:
            found = stack_findings(None, lookup)
            return str(found[0]) if found else f"{one.name}: not installed; {_cure('cpu')}"
    for one in chain:
        if not isinstance(one, (ImportError, OSError, RuntimeError)):
            continue
        for pattern, meaning, cure in _LOADER_MESSAGES:
            if re.search(pattern, str(one)):
                found = stack_findings(None, lookup)
                what = str(found[0]) if found else f"{meaning}; {cure}"
                first_line = next(iter(str(one).strip().splitlines()), "")
                return f"the training stack does not load: {what} (the loader said: {first_line[:200]})"
    return None
