"""From command to first step, beside a bare Ray Train worker; `mtlrec --help` beside an empty program.

    python -m benchmarks start [--repeats 5] [--folder FOLDER] [--quick]

Every side is a process of its own, in turn, with a warm page cache and data of 480 rows. Seconds are from the
start of the process to what is named here; processor time is that of all its processes until then.

- `train`: `mtlrec train --workers 1`, on a local Ray that it starts, until stderr says that step 1 is done.
- `bare`: a script with `ray.init` and a Ray Train trainer of one worker whose function says that it runs. It
  imports no torch: neither the script nor Ray's controller nor the worker. The ratio is `train` by `bare`.
- `torch`: the same with Ray's TorchTrainer, and a function that imports torch and torchrec, without which
  there is no first step: `train_beside_torch`.
- `alone`: `mtlrec train --workers 0`, without Ray, until stderr says that step 1 is done.
- `help`: `mtlrec --help`, to its end, in seconds; `nothing`: `python -c pass`.

Seven minutes; `--quick` leaves out what starts Ray: 10 s.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks.measure import in_turn, of_each, parser, ratio, report, spread
from tests.small_data import small_job, write_small_data

MUST = 1.3
MUST_HELP_S = 0.3
MTLREC = Path(sys.executable).with_name("mtlrec")

BARE = """
import os, sys
os.environ |= {"RAY_TRAIN_V2_ENABLED": "1", "RAY_USAGE_STATS_ENABLED": "0"}
import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer as Trainer

def work(config):
    open(config["sign"], "x")

ray.init(address="local", include_dashboard=False, log_to_driver=False)
folder = sys.argv[1]
scaling, run = ScalingConfig(num_workers=1), RunConfig(name="bare", storage_path=folder)
Trainer(work, train_loop_config={"sign": folder + "/begun"}, scaling_config=scaling, run_config=run).fit()
"""
TORCH = BARE.replace(
    "ray.train.v2.api.data_parallel_trainer import DataParallel", "ray.train.torch import Torch"
)
TORCH = TORCH.replace("    open", "    import torch, torchrec\n    open")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    asked = parser(__doc__).parse_args(arguments)
    if asked.quick:
        asked.repeats = 1
    with tempfile.TemporaryDirectory(prefix="mtlrec-benchmark-", dir=asked.folder) as scratch:
        home = Path(scratch)
        write_small_data(home / "train", rows=480)
        job = small_job(home / "train", home / "runs")
        job["data"]["eval"] = None
        job["run"]["max_steps"] = 1
        (home / "job.yaml").write_text(yaml.safe_dump(job))
        starts: dict[str, Callable[[], tuple[float, float]]] = {
            "alone": partial(_train, home, 0),
            "help": partial(_end, [str(MTLREC), "--help"]),
            "nothing": partial(_end, [sys.executable, "-c", "pass"]),
        }
        if not asked.quick:
            starts["train"] = partial(_train, home, 1)
            starts["bare"] = partial(_bare, home, BARE)
            starts["torch"] = partial(_bare, home, TORCH)
        cpu: dict[str, list[float]] = {name: [] for name in starts}

        def wall(name: str) -> float:
            seconds, spent = starts[name]()
            cpu[name].append(spent)
            return seconds

        seconds = in_turn({name: partial(wall, name) for name in starts}, asked.repeats)
    ratios = {"help_s": ratio(seconds["help"], MUST_HELP_S, least=False)}
    rest: dict[str, Any] = {}
    if not asked.quick:
        ratios["train"] = ratio(of_each(seconds["train"], seconds["bare"]), MUST, least=False)
        rest["cpu"] = spread(of_each(cpu["train"], cpu["bare"]))
        rest["train_beside_torch"] = spread(of_each(seconds["train"], seconds["torch"]))
    return report(
        "start",
        ratios,
        repeats=asked.repeats,
        seconds={name: spread(each) for name, each in seconds.items()},
        cpu_s={name: spread(each) for name, each in cpu.items()},
        **rest,
    )


def _train(home: Path, workers: int) -> tuple[float, float]:
    """Seconds and processor seconds from the command to the line that says so of step 1."""
    name = f"run{time.monotonic_ns()}"
    command = [str(MTLREC), "train", str(home / "job.yaml"), "--workers", str(workers), "--name", name]
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=home, stderr=subprocess.PIPE, text=True, env=_environment())
    assert process.stderr is not None
    found, said = None, []
    for line in process.stderr:
        said.append(line)
        if found is None and line.startswith("train 1/1 "):
            found = time.perf_counter() - began, _spent(process)
    assert process.wait() == 0 and found is not None, "".join(said)
    return found


def _bare(home: Path, script: str) -> tuple[float, float]:
    """Seconds and processor seconds from the script's start to that of its function in a worker."""
    folder = Path(tempfile.mkdtemp(dir=home))
    sign, found = folder / "begun", None
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=_environment(),
    )
    assert process.stderr is not None
    said: list[str] = []
    reading = threading.Thread(target=lambda: said.extend(process.stderr or ()), daemon=True)
    reading.start()
    while process.poll() is None:
        if found is None and sign.exists():
            found = time.perf_counter() - began, _spent(process)
        time.sleep(0.01)
    reading.join()
    assert process.returncode == 0 and found is not None, "".join(said)
    return found


def _end(command: list[str]) -> tuple[float, float]:
    before, began = os.times(), time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    seconds, after = time.perf_counter() - began, os.times()
    user, system = (
        getattr(after, name) - getattr(before, name) for name in ("children_user", "children_system")
    )
    return seconds, user + system


def _spent(process: subprocess.Popen[str]) -> float:
    """Processor seconds of a process and of all that it has started, also of what has ended since."""
    whole = psutil.Process(process.pid)
    times = [each.cpu_times() for each in (whole, *whole.children(recursive=True))]
    return sum(each.user + each.system + each.children_user + each.children_system for each in times)


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


if __name__ == "__main__":
    main(sys.argv[1:])
