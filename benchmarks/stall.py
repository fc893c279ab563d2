"""What a checkpoint costs training: steps with one per 200 steps, beside steps without.

    python -m benchmarks stall [--gib 4] [--repeats 5] [--batch 8192] [--stretch 40] [--folder F] [--quick]

Real training (`mtlrec.train`) with two workers (plain gloo processes on this machine) on tables of `--gib`,
in stretches of steps; every other one has a checkpoint begun at its start, so that both sides are of one run,
in turn. The ratio is the time of 200 steps without by that of 200 steps with a checkpoint; `cpu` is the same
ratio of a worker's processor time, all its threads: where the cores have other work too, that is what can be
told apart. The checkpoint has to be complete before its stretch ends (`complete_in_its_stretch`); `copy_s` is
the part of it in which nothing else happens: the copy in memory; `write_s` all of it. `stolen_s`: seconds in
which this machine's cores wanted to run and were not let, of stretches without and with: a virtual machine's
host may take from its cores what it does for its disk. `but_stolen` is the ratio without that.

The full size takes 6 minutes, 10 GiB of memory and 10 GiB on the disk; `--quick` (a few MiB) 15 s.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.checkpoint import DIM, TABLES, WORKERS
from benchmarks.measure import parser, ratio, report, run_of, spread
from tests.distributed.processes import Results, run_processes

EVERY_STEPS = 200
"""Of training, for each checkpoint."""
MUST, AIM = 0.98, 0.995


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__)
    options.add_argument("--gib", type=float, default=4.0, help="bytes of all tables")
    options.add_argument("--batch", type=int, default=8192, help="rows of a step, over both workers")
    options.add_argument("--stretch", type=int, default=40, help="steps that are timed together")
    asked = options.parse_args(arguments)
    if asked.quick:
        asked.gib, asked.repeats, asked.batch, asked.stretch = 1 / 64, 2, 256, 10
    rows = int(asked.gib * 2**30 / (TABLES * 4 * (DIM + 1)))
    with tempfile.TemporaryDirectory(prefix="mtlrec-benchmark-", dir=asked.folder) as scratch:
        run = _prepare(Path(scratch), rows, asked.batch, asked.stretch * (2 * asked.repeats + 1) + 1)
        call = {"run": run, "stretch": asked.stretch}
        results = run_processes(
            "benchmarks.stall:training", WORKERS, Path(scratch, "call"), call, timeout=7200
        )
    # [workers, stretches]; the first one, with its cold caches, is left out.
    wall, cpu = (
        np.diff(np.array([each[clock] for each in results])[:, :: asked.stretch])[:, 1:]
        for clock in ("wall", "cpu")
    )
    assert wall.shape == (WORKERS, 2 * asked.repeats)
    copies, writes = results[0]["copies"], results[0]["writes"]
    # [stretches]: of the whole machine, on all its cores together.
    stolen = np.diff(np.array(results[0]["stolen"])[:: asked.stretch])[1:]

    def shares(lengths: np.ndarray) -> list[float]:
        # One without a checkpoint, then one with.
        without, more = lengths[0::2] * EVERY_STEPS / asked.stretch, lengths[1::2] - lengths[0::2]
        return [float(share) for share in without / (without + more)]

    return report(
        "stall",
        {"stall": ratio(shares(wall[0]), MUST, AIM)},
        cpu=spread(shares(cpu.mean(axis=0))),
        but_stolen=spread(shares(wall[0] - stolen / (os.cpu_count() or 1))),
        stolen_s={"without": spread(stolen[0::2].tolist()), "with": spread(stolen[1::2].tolist())},
        gib=asked.gib,
        workers=WORKERS,
        repeats=asked.repeats,
        batch=asked.batch,
        stretch=asked.stretch,
        complete_in_its_stretch=bool(max(writes) < wall[0, 1::2].min()),
        step_s=round(float(np.median(wall[0, 0::2])) / asked.stretch, 4),
        step_cpu_s=round(float(np.median(cpu[:, 0::2])) / asked.stretch, 4),
        copy_s=spread(copies),
        write_s=spread(writes),
    )


def training(world: Any, run: dict[str, Any], stretch: int) -> Results:
    """In a worker: train, with a checkpoint at the start of every other stretch.

    `wall`, `cpu`: this process's clocks before each step; `stolen`: the machine's. Seconds of each copy, and
    until each was complete.
    """
    from mtlrec.checkpoint.snapshot import Snapshot
    from mtlrec.control import Silent
    from mtlrec.preflight import Run
    from mtlrec.train import train

    found: dict[str, list[float]] = {name: [] for name in ("wall", "cpu", "stolen", "copies", "writes")}
    began: list[float] = []

    class Clock(Silent):
        def should_stop(self) -> bool:
            found["wall"].append(time.perf_counter())
            found["cpu"].append(time.process_time())
            found["stolen"].append(stolen())
            return False

        def should_save(self) -> bool:
            # Asked before the step of this number; the save comes after it.
            step = len(found["wall"])
            return step > 1 and step % (2 * stretch) == 1

        def report(self, metrics: dict[str, float], checkpoint: str) -> None:
            found["writes"].append(time.perf_counter() - began[-1])

    take = Snapshot.take

    def timed(*arguments: Any) -> Any:
        began.append(time.perf_counter())
        copied = take(*arguments)
        found["copies"].append(time.perf_counter() - began[-1])
        return copied

    with mock.patch.object(Snapshot, "take", timed):
        train(Run(**run), world, Clock())
    del found["writes"][-1]  # the run's end, which waits for it
    return dict(found)


def stolen() -> float:
    """Seconds, since this machine was started and over all its cores, that its host kept from them."""
    with open("/proc/stat") as file:
        return int(file.readline().split()[8]) / os.sysconf("SC_CLK_TCK")


def _prepare(folder: Path, rows: int, batch: int, steps: int) -> dict[str, Any]:
    """Data and the run that trains on them, as plain data."""
    _write_data(folder / "data", max(16 * batch, 4096))
    return run_of(_job(folder, rows, batch, steps))


def _job(folder: Path, rows: int, batch: int, steps: int) -> dict[str, Any]:
    features = {f"id{number}": {"kind": "id", "rows": rows} for number in range(TABLES)}
    return {
        "name": "stall",
        "seed": 1,
        "schema": {
            "user": "id0",
            "item": "id1",
            "features": features,
            "tasks": {"click": {"kind": "binary"}, "buy": {"kind": "binary"}},
        },
        "data": {"train": str(folder / "data"), "batch_size": batch, "lanes": 4, "window": 4096},
        "model": {
            "dim": DIM,
            "backbone": {"kind": "mmoe", "experts": 2, "hidden": [256, 128]},
            "tower": {"hidden": [64]},
        },
        "run": {
            "storage": str(folder / "runs"),
            "workers": 0,
            "epochs": 10**6,
            "max_steps": steps,
            "sharding": "row_wise",
            "report_every_s": 1e9,
            "checkpoint": {"every_minutes": 1e6, "keep_last": 1},
        },
    }


def _write_data(folder: Path, rows: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    random = np.random.default_rng(0)
    folder.mkdir()
    columns: dict[str, Any] = {f"id{n}": random.integers(0, 2**40, rows) for n in range(TABLES)}
    columns |= {name: (random.random(rows) < 0.2).astype(np.int8) for name in ("click", "buy")}
    pq.write_table(pa.table(columns), folder / "part-0.parquet", row_group_size=4096)


if __name__ == "__main__":
    main(sys.argv[1:])
