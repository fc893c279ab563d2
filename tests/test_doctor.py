"""doctor and stack, on packages, machines and loader messages that are made up, and on this environment."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest

from mtlrec import doctor, stack
from mtlrec.job.errors import InputError
from mtlrec.stack import Package, explain_import_error, require_stack, stack_findings

GIB = doctor.GIB
CPU = {
    "torch": Package("2.13.0+cpu"),
    "fbgemm-gpu-cpu": Package("1.8.0"),
    "torchrec": Package("1.8.0"),
    "ray": Package("2.60.0"),
}
GPU = {
    "torch": Package("2.13.0", cuda="13.0"),
    "fbgemm-gpu": Package("1.8.0"),
    "torchrec": Package("1.8.0"),
    "ray": Package("2.60.0"),
}


def without(packages: dict[str, Package], *names: str) -> dict[str, Package]:
    return {name: package for name, package in packages.items() if name not in names}


# The stack


@pytest.mark.parametrize(
    ("packages", "device"),
    [
        (CPU, "cpu"),
        (CPU, None),
        (GPU, "cuda"),
        (GPU, None),
        (GPU, "cpu"),
        # The CUDA build of torch with the CPU build of fbgemm loads, and trains on the CPU.
        ({**CPU, "torch": Package("2.13.0", cuda="13.0")}, "cpu"),
        # The rule, not one pair of versions.
        (
            {
                **CPU,
                "torch": Package("2.14.1"),
                "fbgemm-gpu-cpu": Package("1.9.0"),
                "torchrec": Package("1.9.2"),
            },
            "cpu",
        ),
    ],
)
def test_what_loads_together_is_accepted(packages: dict[str, Package], device: str | None) -> None:
    assert stack_findings(device, packages.get) == []
    require_stack(device or "cpu", packages.get)


@pytest.mark.parametrize(
    ("packages", "device", "detail", "cure"),
    [
        (
            {**CPU, "fbgemm-gpu": Package("1.8.0")},
            "cpu",
            "both installed",
            "uninstall -y fbgemm-gpu-cpu fbgemm-gpu &&",
        ),
        (
            {**CPU, "fbgemm-gpu-cpu": Package("1.7.0")},
            "cpu",
            "fbgemm-gpu-cpu 1.7.0 does not load",
            "mtlrec[cpu]",
        ),
        ({**CPU, "fbgemm-gpu-cpu": Package("1.9.0")}, "cpu", "fbgemm 1.8 belongs to it", "mtlrec[cpu]"),
        (
            {**CPU, "torch": Package("2.14.0")},
            "cpu",
            "fbgemm 1.9 belongs to it",
            "torch 2.13 with fbgemm 1.8",
        ),
        ({**CPU, "torch": Package("3.0.0")}, "cpu", "no fbgemm is known for it", "torch 2.13"),
        ({**CPU, "torch": Package("2.4.1")}, "cpu", "no fbgemm is known for it", "torch 2.13"),
        (
            {**CPU, "torchrec": Package("1.7.0")},
            "cpu",
            "torchrec 1.8 belongs to",
            "--no-deps torchrec==1.8.0",
        ),
        (without(CPU, "torch"), "cpu", "torch: not installed", "mtlrec[cpu]"),
        (without(CPU, "torchrec"), "cpu", "torchrec: not installed", "--no-deps torchrec==1.8.0"),
        (without(CPU, "fbgemm-gpu-cpu"), "cpu", "fbgemm-gpu-cpu is not installed", "mtlrec[cpu]"),
        ({}, "cuda", "torch, fbgemm and torchrec are not installed", "mtlrec[gpu]"),
        (CPU, "cuda", "2.13.0+cpu is a CPU build, and CUDA is asked for", "run.device: cpu"),
        (
            {**CPU, "torch": GPU["torch"]},
            "cuda",
            "fbgemm-gpu-cpu is the CPU build",
            "pip install 'mtlrec[gpu]'",
        ),
        ({**GPU, "torch": CPU["torch"]}, "cpu", "fbgemm-gpu is the CUDA build", "mtlrec[cpu]"),
        ({**GPU, "torch": CPU["torch"]}, None, "fbgemm-gpu is the CUDA build", "mtlrec[cpu]"),
        (
            {**CPU, "fbgemm-gpu-cpu": Package("1.8.0", damaged="fbgemm_gpu/fbgemm.so")},
            "cpu",
            "fbgemm_gpu/fbgemm.so is gone",
            "pip uninstall -y",
        ),
    ],
)
def test_what_does_not_load_is_named_with_its_cure(
    packages: dict[str, Package], device: str | None, detail: str, cure: str
) -> None:
    found = stack_findings(device, packages.get)
    assert detail in str(found[0])
    assert cure in str(found[0])
    with pytest.raises(InputError) as raised:
        require_stack(device or "cpu", packages.get)
    assert "\n" not in str(raised.value)


def test_only_one_build_is_left_of_two() -> None:
    """Whatever else is wrong, the cure for two builds removes both and installs the one that is asked for."""
    packages = {**GPU, "fbgemm-gpu-cpu": Package("1.8.0")}
    assert "pip install 'mtlrec[gpu]'" in stack_findings("cuda", packages.get)[0].cure
    assert "pip install 'mtlrec[cpu]'" in stack_findings("cpu", packages.get)[0].cure


def test_build_of_torch_is_read_from_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On PyPI the CUDA build carries no local version; its own version file says what it is."""
    site = tmp_path / "torch-2.13.0.dist-info"
    site.mkdir()
    (site / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0\n")
    (tmp_path / "torch").mkdir()
    version = tmp_path / "torch/version.py"
    distribution = metadata.PathDistribution(site)
    monkeypatch.setattr(metadata, "distribution", lambda name: distribution)

    version.write_text("__version__ = '2.13.0'\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n")
    assert stack.installed("torch") == Package("2.13.0", cuda="13.0")
    version.write_text("__version__ = '2.13.0'\ncuda: Optional[str] = None\nhip: Optional[str] = '6.4'\n")
    assert stack.installed("torch") == Package("2.13.0")
    version.unlink()
    assert stack.installed("torch") == Package("2.13.0")


def test_a_wheel_whose_libraries_are_gone_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "fbgemm_gpu_cpu-1.8.0.dist-info"
    site.mkdir()
    (site / "METADATA").write_text("Metadata-Version: 2.1\nName: fbgemm-gpu-cpu\nVersion: 1.8.0\n")
    (site / "RECORD").write_text("fbgemm_gpu/a.so,,1\nfbgemm_gpu/b.so,,1\nfbgemm_gpu/c.py,,1\n")
    (tmp_path / "fbgemm_gpu").mkdir()
    (tmp_path / "fbgemm_gpu/a.so").write_text("a")
    distribution = metadata.PathDistribution(site)
    monkeypatch.setattr(metadata, "distribution", lambda name: distribution)

    assert stack.installed("fbgemm-gpu-cpu") == Package("1.8.0", damaged="fbgemm_gpu/b.so")
    (tmp_path / "fbgemm_gpu/b.so").write_text("b")
    assert stack.installed("fbgemm-gpu-cpu") == Package("1.8.0")


def test_stack_of_this_environment_is_found_good_and_fast() -> None:
    begin = time.perf_counter()
    require_stack("cpu")
    assert time.perf_counter() - begin < 0.5  # 0.01 s on an idle machine; importing torch takes seconds


# What loaders say


def chained(outer: Exception, cause: Exception) -> Exception:
    outer.__cause__ = cause
    return outer


@pytest.mark.parametrize(
    ("error", "packages", "expected"),
    [
        (
            OSError("/x/fbgemm_gpu_py.so: undefined symbol: _ZN3c106detail14torchCheckFail"),
            {**CPU, "fbgemm-gpu-cpu": Package("1.7.0")},
            "fbgemm-gpu-cpu 1.7.0 does not load with torch 2.13.0+cpu",
        ),
        (OSError("Could not load this library: /x/fbgemm_gpu_py.so"), CPU, "do not belong together"),
        (
            ImportError("libcuda.so.1: cannot open shared object file: No such file"),
            GPU,
            "has no CUDA driver",
        ),
        (OSError("libcudart.so.12: cannot open shared object file"), GPU, "of one CUDA version"),
        (ImportError("/lib/libc.so.6: version `GLIBC_2.28' not found"), CPU, "glibc 2.28 or newer"),
        (
            ModuleNotFoundError("No module named 'torchrec'", name="torchrec"),
            without(CPU, "torchrec"),
            "torchrec: not",
        ),
        (ModuleNotFoundError("No module named 'ray'", name="ray.train"), CPU, "ray.train: not installed"),
        (
            chained(ImportError("torchrec is unusable"), OSError("fbgemm.so: undefined symbol: x")),
            {**CPU, "torchrec": Package("1.7.0"), "fbgemm-gpu-cpu": Package("1.7.0")},
            "fbgemm-gpu-cpu 1.7.0 does not load",
        ),
    ],
)
def test_a_loader_error_is_explained_in_one_line(
    error: Exception, packages: dict[str, Package], expected: str
) -> None:
    line = explain_import_error(error, packages.get)
    assert line is not None
    assert expected in line
    assert "\n" not in line


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        FileNotFoundError(2, "No such file or directory", "libcudart"),
        ModuleNotFoundError("No module named 'pandas'", name="pandas"),
        ImportError("cannot import name 'x' from 'mtlrec.storage'"),
        ValueError("undefined symbol in a formula"),
    ],
)
def test_other_errors_are_left_alone(error: Exception) -> None:
    assert explain_import_error(error, CPU.get) is None


# The machine


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """The root of a machine with 64 GiB, of which 60 are free."""
    (tmp_path / "proc/self").mkdir(parents=True)
    kib = GIB // 1024
    (tmp_path / "proc/meminfo").write_text(
        f"MemTotal: {64 * kib} kB\nMemFree: {10 * kib} kB\nMemAvailable: {60 * kib} kB\nHugePages_Total: 0\n"
    )
    return tmp_path


def group(machine: Path, path: str, **files: str) -> None:
    folder = machine / "sys/fs/cgroup" / path
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_memory_without_control_groups_is_the_machines(machine: Path) -> None:
    assert doctor.read_memory(machine) == (64 * GIB, 60 * GIB)


def test_memory_of_a_container_is_its_limit(machine: Path) -> None:
    """Version 2; the limit stands on a parent, and half of what is used is cache that gives way."""
    (machine / "proc/self/cgroup").write_text("0::/pod/container\n")
    group(machine, "pod", memory__max=f"{8 * GIB}\n", memory__current=f"{4 * GIB}\n")
    group(machine, "pod", memory__stat=f"anon {2 * GIB}\ninactive_file {2 * GIB}\n")
    group(machine, "pod/container", memory__max="max\n", memory__current=f"{GIB}\n")
    assert doctor.read_memory(machine) == (8 * GIB, 6 * GIB)


def test_memory_limit_of_version_1(machine: Path) -> None:
    (machine / "proc/self/cgroup").write_text("5:memory:/a\n3:cpu,cpuacct:/a\n")
    group(machine, "memory", memory__limit_in_bytes="9223372036854771712\n")
    group(machine, "memory/a", memory__limit_in_bytes=f"{2 * GIB}\n", memory__usage_in_bytes=f"{GIB}\n")
    assert doctor.read_memory(machine) == (2 * GIB, GIB)


def test_group_whose_path_is_the_hosts_is_read_at_the_mount(machine: Path) -> None:
    (machine / "proc/self/cgroup").write_text("0::/kubepods/not/mounted/here\n")
    group(machine, "", memory__max=f"{3 * GIB}\n", memory__current="0\n", cpu__max="50000 100000\n")
    assert doctor.read_memory(machine) == (3 * GIB, 3 * GIB)
    assert doctor.read_cores(machine) == 0.5


def test_cores_are_no_more_than_the_quota(machine: Path) -> None:
    unlimited = doctor.read_cores(machine)
    assert unlimited >= 1
    (machine / "proc/self/cgroup").write_text("3:cpu,cpuacct:/a\n")
    group(machine, "cpu/a", cpu__cfs_quota_us="25000\n", cpu__cfs_period_us="100000\n")
    assert doctor.read_cores(machine) == 0.25
    group(machine, "cpu/a", cpu__cfs_quota_us="-1\n")
    assert doctor.read_cores(machine) == unlimited


def test_scarce_machines_get_advice() -> None:
    assert doctor.check_memory(64 * GIB, 60 * GIB).status == "ok"
    assert doctor.check_memory(64 * GIB, 1 * GIB).status == "warning"
    assert doctor.check_cores(2).status == "ok"
    assert "--workers 0" in doctor.check_cores(1).cure
    assert doctor.check_python((3, 11)).status == "ok"
    assert doctor.check_python((3, 10)).status == "problem"
    assert doctor.check_python((3, 13)).status == "warning"
    assert doctor.check_shared_memory(Path("/nonexistent")).status == "warning"


def fake_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_gpus_are_what_the_driver_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_smi(
        tmp_path, monkeypatch, "echo 'NVIDIA H100, 81559, 570.86.10'; echo 'NVIDIA H100, 81559, 570.86.10'"
    )
    gpus = doctor.read_gpus()
    assert gpus == [doctor.Gpu("NVIDIA H100", 81559, "570.86.10")] * 2
    found = doctor.check_gpus("cuda", gpus, "12.8")
    assert (found.status, found.detail) == ("ok", "2 x NVIDIA H100 (80 GiB), driver 570.86.10")
    # CUDA 13 needs a driver of 580.
    assert "580" in doctor.check_gpus("cuda", gpus, "13.0").cure
    assert doctor.check_gpus("cpu", gpus, None).status == "ok"


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'NVIDIA-SMI has failed because it could not communicate'; exit 9", "could not communicate"),
        ("exit 3", "exit 3"),
        ("exit 0", "lists no device"),
    ],
)
def test_driver_that_does_not_work_is_a_problem_only_for_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, said: str
) -> None:
    fake_smi(tmp_path, monkeypatch, script)
    gpus = doctor.read_gpus()
    assert isinstance(gpus, str)
    assert said in gpus
    assert doctor.check_gpus("cuda", gpus, "13.0").status == "problem"
    assert doctor.check_gpus(None, gpus, None).status == "ok"


# The storage


def test_storage_that_can_be_used_is_left_as_it_was(tmp_path: Path) -> None:
    assert doctor.check_storage(str(tmp_path)).status == "ok"
    new = doctor.check_storage(str(tmp_path / "runs/new"))
    assert new.status == "ok"
    assert "can be made" in new.detail
    assert list(tmp_path.iterdir()) == []


def test_storage_that_cannot_be_used_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for url in (f"{tmp_path}/file", f"{tmp_path}/file/below", "gs://bucket/runs", "s3://", "/proc/self/runs"):
        found = doctor.check_storage(url)
        assert found.status == "problem", url
        assert found.detail and found.cure, url


# The report


def test_client_without_a_stack_is_fine_until_it_is_to_train() -> None:
    nothing: dict[str, Package] = {}
    assert [check.status for check in doctor.check_stack(None, nothing.get)] == ["warning"]
    assert "problem" in [check.status for check in doctor.check_stack("cpu", nothing.get)]
    assert doctor.check_ray(nothing.get).status == "warning"
    assert doctor.check_ray(without(CPU, "ray").get).status == "problem"
    assert doctor.check_ray({**CPU, "ray": Package("2.9.0")}.get).status == "warning"


def test_all_findings_are_shown_with_their_cures() -> None:
    packages = {**CPU, "fbgemm-gpu-cpu": Package("1.7.0"), "torchrec": Package("1.7.0")}
    checks = doctor.examine("cpu", lookup=packages.get)
    assert [check.name for check in checks if check.status == "problem"] == ["fbgemm", "torchrec"]
    text = doctor.to_text(checks)
    for check in checks:
        assert check.detail in text
        assert check.cure in text


def test_command_answers_without_torch_in_one_json_object(tmp_path: Path) -> None:
    script = (
        "import sys; from mtlrec.cli import main\n"
        f"code = main(['doctor', '--json', '--device', 'cpu', '--storage', {str(tmp_path)!r}])\n"
        "heavy = {'torch', 'torchrec', 'fbgemm_gpu', 'ray', 'pandas'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] is True
    assert {check["name"] for check in report["checks"]} >= {"python", "stack", "ray", "memory", "storage"}


def test_command_says_2_where_something_is_to_be_put_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run_doctor(storage="gs://bucket", device="cpu", as_json=True) == 2
    assert json.loads(capsys.readouterr().out)["ok"] is False
