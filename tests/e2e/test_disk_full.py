"""A disk that is really full while a run saves: a small file system of memory, in a name space of its own.

Where nobody may mount one, the run may from some moment on write no file beyond a size: for what saves, that
is the same but for the number of the error.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from tests.small_data import small_job, write_small_data

ROOT = Path(__file__).parents[2]
UNSHARE = ["unshare", "--user", "--map-root-user", "--mount"]
SIZE, BALLAST = 2**20, 2**19
"""Bytes of the disk, and of a file on it that is removed afterwards."""
LIMIT, LIMITED_AT = 2**14, 20
"""Bytes that a file may have, and how many checkpoints there are before that holds."""


def can_mount(folder: Path) -> bool:
    try:
        done = subprocess.run(
            [*UNSHARE, "mount", "-t", "tmpfs", "none", str(folder)], capture_output=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def test_a_disk_that_is_full_while_saving(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    check(tmp_path, disk, can_mount(disk))


def check(tmp_path: Path, disk: Path, mounts: bool) -> None:
    """mounts: on a small file system; else with a limit on the size of files."""
    write_small_data(tmp_path / "train", rows=600, shards=2)
    job = small_job(Path("train"), disk / "runs", data__eval=None)
    job["run"].update(epochs=30, checkpoint={"every_steps": 10, "keep_last": 1000}, report_every_s=2.0)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    command = [sys.executable, "-m", "tests.e2e.test_disk_full", str(tmp_path)]
    if mounts:
        mount = 'mount -t tmpfs -o "size=$0" none "$1" && shift && exec "$@"'
        command = [*UNSHARE, "sh", "-c", mount, str(SIZE), str(disk), *command]
    else:
        command.append("limited")
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)

    assert found["full"]["code"] == 1
    assert "the disk is full" in found["full"]["said"]["error"]
    assert str(disk / "runs") in found["full"]["said"]["error"]
    # What could not be written is gone at once, and what was complete before is whole.
    assert found["complete"] and found["incomplete"] == []
    assert found["unfinished"] == []
    assert found["verified"] == 0
    # With room again the run goes on from the last complete checkpoint to its end.
    assert found["again"]["code"] == 0, found["again"]
    assert f"resuming small at step {found['complete'][-1]} " in found["again"]["err"]
    assert found["again"]["said"]["steps"] == 30 * 13


def main(home: Path, limited: bool) -> None:
    """In the name space, or limited: fill the disk by a run, look at what is left, make room, go on."""
    disk = home / "disk"
    (disk / "ballast").write_bytes(bytes(BALLAST))
    checkpoints = disk / "runs" / "small" / "checkpoints"
    full = train_limited(home, checkpoints) if limited else train(home)
    complete = sorted(path.parent.name for path in checkpoints.glob("*/manifest.json"))
    found: dict[str, Any] = {
        "full": full,
        "complete": [int(name.split("-")[1].split(".")[0]) for name in complete],
        "incomplete": sorted({path.name for path in checkpoints.iterdir()} - set(complete)),
        "unfinished": [str(path) for path in disk.rglob("*.unfinished")],
        "verified": run("inspect", str(disk / "runs" / "small"), "--verify").returncode,
    }
    (disk / "ballast").unlink()
    found["again"] = train(home, "--set", "run.checkpoint.keep_last=2")
    json.dump(found, sys.stdout)


def train(home: Path, *options: str) -> dict[str, Any]:
    done = run("train", str(home / "job.yaml"), *options)
    return {"code": done.returncode, "said": json.loads(done.stdout), "err": done.stderr[-4000:]}


def train_limited(home: Path, checkpoints: Path) -> dict[str, Any]:
    command = command_of("train", str(home / "job.yaml"))
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as running:
        while running.poll() is None and len(list(checkpoints.glob("*/manifest.json"))) < LIMITED_AT:
            time.sleep(0.01)
        if running.poll() is None:
            resource.prlimit(running.pid, resource.RLIMIT_FSIZE, (LIMIT, resource.RLIM_INFINITY))
        out, err = running.communicate(timeout=200)
    return {"code": running.returncode, "said": json.loads(out), "err": err[-4000:]}


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command_of(*words), capture_output=True, text=True, timeout=200)


def command_of(*words: str) -> list[str]:
    return [sys.executable, "-m", "mtlrec.cli", *words, "--json"]


if __name__ == "__main__":
    main(Path(sys.argv[1]), "limited" in sys.argv[2:])
