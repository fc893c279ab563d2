"""`mtlrec doctor`: what this machine and this environment can train, each line ok or what to do.

Reads package metadata, /proc, control groups and `nvidia-smi`; imports no torch and no ray, so it works where
they do not, and answers within a second (a storage on the network may take longer).
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from mtlrec import stack
from mtlrec.job.errors import InputError

GIB = 1 << 30

# A worker holds torch, fbgemm and torchrec in about 1 GiB before the first table; Ray itself takes 0.6 GiB.
MEMORY_PER_DEMO = 4 * GIB
# Below this Ray's object store goes to disk, and NCCL's shared memory transport fails.
SHARED_MEMORY = 1 * GIB
# Oldest driver that runs a CUDA major version (NVIDIA's table of minor-version compatibility).
OLDEST_DRIVER = {"12": 525, "13": 580}


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    status: Literal["ok", "warning", "problem"]
    detail: str
    cure: str = ""
    """What to do; empty where nothing is to be done."""


@dataclass(frozen=True)
class Gpu:
    """One device as the driver names it."""

    name: str
    memory_mib: int
    driver: str


def examine(
    device: str | None = None, storage: str | None = None, lookup: stack.Lookup = stack.installed
) -> list[Check]:
    """All checks, in the order in which they are shown.

    Args:
        device: "cpu" or "cuda", what training is to run on; None: what the installed packages are for.
        storage: path or URL that must be readable and writable; None: not checked.
        lookup: gives the installed package of a name.
    """
    gpus = read_gpus()
    checks = [check_python(sys.version_info[:2]), *check_stack(device, lookup), check_ray(lookup)]
    torch = lookup("torch")
    checks.append(check_gpus(device, gpus, torch.cuda if torch else None))
    checks += [check_cores(read_cores()), check_memory(*read_memory()), check_shared_memory()]
    if storage is not None:
        checks.append(check_storage(storage))
    return checks


def check_python(version: tuple[int, ...]) -> Check:
    text = f"{platform.python_version()} at {sys.executable}"
    if version < (3, 11):
        return Check("python", "problem", f"{text} is too old", "use Python 3.11")
    if version > (3, 11):
        return Check("python", "warning", f"{text}; the locks and tests are for 3.11", "prefer Python 3.11")
    return Check("python", "ok", text)


def check_stack(device: str | None, lookup: stack.Lookup) -> list[Check]:
    """torch, fbgemm, torchrec. A machine with none of them is a client: fine, if no device is asked for."""
    names = ["torch", *stack.FBGEMM_WHEELS.values(), "torchrec"]
    packages = {name: package for name in names if (package := lookup(name))}
    if not packages and device is None:
        detail = "not installed: this is the client, which checks, submits and inspects"
        cure = "to train here: pip install 'mtlrec[cpu]' && pip install --no-deps torchrec==1.8.0"
        return [Check("stack", "warning", detail, cure)]
    findings = stack.stack_findings(device, lookup)
    if findings:
        return [Check(finding.name, "problem", finding.detail, finding.cure) for finding in findings]
    versions = ", ".join(f"{name} {package.version}" for name, package in packages.items())
    build = packages["torch"].cuda
    return [Check("stack", "ok", f"{versions} ({'CUDA ' + build if build else 'CPU'} build)")]


def check_ray(lookup: stack.Lookup) -> Check:
    ray = lookup("ray")
    if ray is None and lookup("torch") is None:
        return Check("ray", "warning", "not installed", "the extras cpu and gpu bring it")
    if ray is None:
        cure = f"pip install 'ray[default,train]=={stack.RAY}.0'"
        return Check("ray", "problem", "not installed: only --workers 0 can train", cure)
    if ".".join(ray.version.split(".")[:2]) != stack.RAY:
        detail = f"{ray.version}; mtlrec is tested with {stack.RAY}"
        return Check("ray", "warning", detail, f"pip install 'ray[default,train]=={stack.RAY}.0'")
    return Check("ray", "ok", ray.version)


def read_gpus() -> list[Gpu] | str:
    """The devices that the driver lists, or why there are none."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return "no nvidia-smi, so no CUDA driver"
    query = [command, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(
            query, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi does not answer ({type(error).__name__})"
    if answer.returncode != 0:
        said = (answer.stdout + answer.stderr).strip().splitlines()
        return f"nvidia-smi fails ({said[0] if said else f'exit {answer.returncode}'})"
    gpus = []
    for line in answer.stdout.splitlines():
        fields = [field.strip() for field in line.split(",")]
        # Devices without memory of their own answer "[N/A]".
        if len(fields) == 3:
            gpus.append(Gpu(fields[0], int(fields[1]) if fields[1].isdigit() else 0, fields[2]))
    return gpus or "nvidia-smi lists no device"


def check_gpus(device: str | None, gpus: list[Gpu] | str, cuda: str | None) -> Check:
    """Args: device asked for, `read_gpus()`, CUDA version of the installed torch (None: a CPU build)."""
    wanted = device == "cuda" or (device is None and cuda is not None)
    if isinstance(gpus, str):
        if not wanted:
            return Check("devices", "ok", "CPU")
        cure = "install NVIDIA's driver, start the container with its GPUs, or train with run.device: cpu"
        return Check("devices", "problem" if device == "cuda" else "warning", gpus, cure)
    kinds = {f"{gpu.name} ({gpu.memory_mib / 1024:.0f} GiB)": 0 for gpu in gpus}
    for gpu in gpus:
        kinds[f"{gpu.name} ({gpu.memory_mib / 1024:.0f} GiB)"] += 1
    text = ", ".join(f"{count} x {kind}" for kind, count in kinds.items()) + f", driver {gpus[0].driver}"
    if not wanted:
        return Check("devices", "ok", f"CPU; present and not used: {text}")
    oldest = OLDEST_DRIVER.get((cuda or "").split(".")[0])
    major = gpus[0].driver.split(".")[0]
    if oldest and major.isdigit() and int(major) < oldest:
        detail = f"{text}: too old for torch's CUDA {cuda}"
        return Check("devices", "problem", detail, f"update NVIDIA's driver to {oldest} or newer")
    return Check("devices", "ok", text)


def _control_groups(root: Path) -> dict[str, list[Path]]:
    """Folders of this process's control groups by controller ("" is version 2), innermost first.

    Inside a container the path may be the host's, which is not mounted: then only the mount's top counts.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return {}
    groups: dict[str, list[Path]] = {}
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            top = root / "sys/fs/cgroup" / controller
            here = top / path.lstrip("/")
            groups[controller] = [here, *(up for up in here.parents if up.is_relative_to(top))]
    return groups


def _read_number(path: Path) -> int | None:
    try:
        text = path.read_text().split()
    except OSError:
        return None
    # Version 2 writes "max" for no limit.
    return int(text[0]) if text and text[0].lstrip("-").isdigit() else None


def read_memory(root: Path = Path("/")) -> tuple[int, int]:
    """(total, available) bytes that this process may use: the machine's, or its control group's if less."""
    fields = {}
    for line in (root / "proc/meminfo").read_text().splitlines():
        key, _, value = line.partition(":")
        fields[key] = int(value.split()[0]) * 1024
    total, available = fields["MemTotal"], fields["MemAvailable"]
    groups = _control_groups(root)
    pairs = [(folder, "memory.max", "memory.current") for folder in groups.get("", [])]
    pairs += [
        (folder, "memory.limit_in_bytes", "memory.usage_in_bytes") for folder in groups.get("memory", [])
    ]
    for folder, limit_name, used_name in pairs:
        limit = _read_number(folder / limit_name)
        if limit is None or limit >= fields["MemTotal"]:
            continue
        # Cached files count as used here, though they give way.
        cached = 0
        try:
            for line in (folder / "memory.stat").read_text().splitlines():
                if line.startswith(("inactive_file ", "total_inactive_file ")):
                    cached = max(cached, int(line.split()[1]))
        except OSError:
            pass
        used = max(0, (_read_number(folder / used_name) or 0) - cached)
        total, available = min(total, limit), min(available, max(0, limit - used))
    return total, available


def check_memory(total: int, available: int) -> Check:
    text = f"{available / GIB:.1f} GiB free of {total / GIB:.1f} GiB"
    if available < MEMORY_PER_DEMO:
        cure = "free some, or train with fewer workers (each takes about 1 GiB beside its tables)"
        return Check("memory", "warning", text, cure)
    return Check("memory", "ok", text)


def read_cores(root: Path = Path("/")) -> float:
    """Cores that this process may use: its affinity, or its control group's quota where that is less."""
    cores = float(len(os.sched_getaffinity(0)))
    groups = _control_groups(root)
    for folder in groups.get("", []):
        try:
            quota, period = (folder / "cpu.max").read_text().split()
        except (OSError, ValueError):
            continue
        if quota != "max":
            cores = min(cores, int(quota) / int(period))
    for folder in groups.get("cpu", []):
        limit, period_us = (
            _read_number(folder / "cpu.cfs_quota_us"),
            _read_number(folder / "cpu.cfs_period_us"),
        )
        if limit and period_us and limit > 0:
            cores = min(cores, limit / period_us)
    return cores


def check_cores(cores: float) -> Check:
    text = f"{cores:g}"
    if cores < 2:
        cure = "train with --workers 1, or --workers 0 for one plain process; two workers need two cores"
        return Check("cores", "warning", text, cure)
    return Check("cores", "ok", text)


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Check:
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        return Check("shared memory", "warning", f"{folder}: {error.strerror}", "mount a tmpfs there")
    text = f"{usage.free / GIB:.1f} GiB free of {usage.total / GIB:.1f} GiB in {folder}"
    if usage.free < SHARED_MEMORY:
        cure = "Ray is slow and NCCL fails below 1 GiB: docker run --shm-size=2g, or a volume in memory there"
        return Check("shared memory", "warning", text, cure)
    return Check("shared memory", "ok", text)


def check_storage(url: str) -> Check:
    """Creates and removes a small file; a second create must be refused, or no run could be leased there."""
    # Imported here: the object-store client takes half a second, which only those who ask should pay.
    from mtlrec import storage

    try:
        url = storage.make_absolute(url, ".")
    except InputError as error:
        return _refused(error)
    folder = storage.local_path(url)
    if folder is not None and not folder.exists():
        return _check_future_folder(url, folder)
    try:
        storage.check_writable(url)
    except InputError as error:
        return _refused(error)
    text = f"{url} can be read and written"
    if folder is not None:
        text += f", {shutil.disk_usage(folder).free / GIB:.1f} GiB free"
    return Check("storage", "ok", text)


def _refused(error: InputError) -> Check:
    """Such a message says what is wrong; what to do."""
    detail, _, cure = str(error).partition("; ")
    return Check("storage", "problem", detail, cure or "give a folder or URL that can be written")


def _check_future_folder(url: str, folder: Path) -> Check:
    """A local folder that a run would make; the doctor leaves nothing behind, so only asks who may."""
    parent = next(up for up in folder.parents if up.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        cure = "give a folder that this user can write"
        return Check("storage", "problem", f"{url} does not exist and {parent} cannot be written", cure)
    free = shutil.disk_usage(parent).free / GIB
    return Check("storage", "ok", f"{url} does not exist yet and can be made, {free:.1f} GiB free")


def to_text(checks: list[Check]) -> str:
    """The report for people: a line per check, and under it what to do."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.status:<8} {check.name:<{width}}  {check.detail}")
        if check.cure:
            lines.append(f"{'':<8} {'':<{width}}  -> {check.cure}")
    return "\n".join(lines)


def run_doctor(*, storage: str | None, device: str | None, as_json: bool) -> int:
    """Print the report on stdout, as text or as one JSON object: `ok` (no problem was found) and `checks`.

    Returns the exit code: 0 where nothing stands in the way, 2 where the user has something to put right.
    """
    checks = examine(device, storage)
    ok = all(check.status != "problem" for check in checks)
    print(
        json.dumps({"ok": ok, "checks": [asdict(check) for check in checks]}) if as_json else to_text(checks)
    )
    return 0 if ok else 2
