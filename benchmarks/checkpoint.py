"""What saving and loading cost, beside plain copies of the same bytes and beside training without them.

    python -m benchmarks.checkpoint [--gib 4] [--repeats 5] [--folder FOLDER] [--quick]

Prints one JSON line. Every ratio is of two measurements of the same run, taken in turn; each is given as its
median and its least and greatest value over the repeats. Two workers (plain gloo processes on this machine).

- `save`, `load`: throughput as a share of that of plain copies. A worker's copy in memory is written as a
  checkpoint; as many processes write the same bytes to files of the same size, one after the other, each
  synced. The checkpoint is loaded; these files are read into memory that is there. Before reading, the files
  are dropped from the page cache, for both.
  `cpu_s_per_gib` is the processor time that a worker spends on each.
- `memory`: a worker's peak resident memory while a checkpoint is copied and written, less what it had before,
  as a share of the bytes of its own rows. Of both workers the greater one.
- `stall`: real training (`mtlrec.train`) on such tables, in stretches of steps, every other one with a
  checkpoint begun at its start: how much longer such a stretch takes than the one before it, as a share of
  200 steps. The checkpoint has to be complete before its stretch ends (`complete_in_its_stretch`).
  `stall_cpu`: the same in a worker's processor time, all its threads; where the cores have other work too,
  that is what can be told apart. `copy_s` is the part in which nothing else happens: the copy in memory.

4 GiB take half an hour and 20 GiB on the disk, `--quick` (a few MiB, to see that it runs) 30 s.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from tests.distributed.processes import Results, run_processes

HERE = "benchmarks.checkpoint"
WORKERS = 2
EVERY_STEPS = 200
"""Of training, for each checkpoint: what `stall` is a share of."""
DIM = 128
TABLES = 8


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gib", type=float, default=4.0, help="bytes of all tables")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16_384, help="rows of a step, over both workers")
    parser.add_argument("--stretch", type=int, default=EVERY_STEPS, help="steps that are timed together")
    parser.add_argument("--folder", type=Path, help="where to write; default: the folder of temporary files")
    parser.add_argument("--only", choices=("copies", "stall"), help="one half of the figures")
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args(arguments)
    if asked.quick:
        asked.gib, asked.repeats, asked.batch, asked.stretch = 1 / 64, 2, 256, 10
    found: dict[str, Any] = {"gib": asked.gib, "workers": WORKERS, "repeats": asked.repeats}
    with tempfile.TemporaryDirectory(prefix="mtlrec-benchmark-", dir=asked.folder) as scratch:
        folder = Path(scratch)
        rows = int(asked.gib * 2**30 / (TABLES * 4 * (DIM + 1)))
        if asked.only != "stall":
            call = {"folder": str(folder / "copies"), "rows": rows, "repeats": asked.repeats}
            results = run_processes(f"{HERE}:copies", WORKERS, folder / "1", call, timeout=3600)
            found |= _ratios(results)
            shutil.rmtree(folder / "copies")
        if asked.only != "copies":
            found |= _stall(folder, rows, asked.batch, asked.stretch, asked.repeats)
    print(json.dumps(found))
    return found


# Copies


def copies(world: Any, folder: str, rows: int, repeats: int) -> Results:
    """In a worker: save, load, and plain copies, in turn. Seconds of each, the same on every rank."""
    import torch

    from mtlrec.checkpoint.load import load_tables
    from mtlrec.checkpoint.manifest import read_manifest
    from mtlrec.checkpoint.save import Saving, save
    from mtlrec.checkpoint.snapshot import HeldBlock, Snapshot
    from mtlrec.distributed import all_ok

    begin, end = rows * world.rank // WORKERS, rows * (world.rank + 1) // WORKERS
    blocks = [
        HeldBlock(
            table=f"table{number}",
            row=begin,
            rows=end - begin,
            column=0,
            columns=DIM,
            weights=torch.rand(end - begin, DIM),
            state={"sum": torch.rand(end - begin)},
            replicated=False,
        )
        for number in range(TABLES)
    ]
    own = sum(value.nbytes for block in blocks for value in (block.weights, *block.state.values()))
    listed = [{"name": block.table, "rows": rows, "dim": DIM} for block in blocks]
    meta = {
        "job": {},
        "schema": {"tables": listed},
        "schema_fingerprint": "",
        "data": {},
        "step": 1,
        "position": None,
        "metrics": None,
        "attempt": 1,
    }

    seconds: dict[str, list[float]] = {name: [] for name in ("save", "copy", "load", "read")}
    cpu: dict[str, list[float]] = {name: [] for name in seconds}

    def time_it(name: str, action: Callable[[], Any]) -> None:
        all_ok(None, world)
        started = time.perf_counter(), time.process_time()
        action()
        cpu[name].append(time.process_time() - started[1])
        all_ok(None, world)
        seconds[name].append(time.perf_counter() - started[0])

    dense, snapshot, growths = {"weights.a": torch.ones(3)}, Snapshot(world.rank), []
    for number in range(2):
        with _peak_growth() as growth:
            held, rest = snapshot.take(blocks, dense)
            Saving(f"{folder}/memory{number}", held, rest, meta, world).wait()
        growths.append(growth[0] / own)
    all_ok(None, world)
    if world.rank == 0:
        shutil.rmtree(folder)
    for number in range(repeats):
        url, plain = f"{folder}/saved{number}", Path(folder, f"plain{number}-{world.rank}")
        turns: dict[str, Callable[[], Any]] = {
            "save": partial(save, url, held, dense, meta, world),
            "copy": partial(_write_plainly, plain, blocks),
        }
        # Who comes first may find the disk less busy.
        for name in sorted(turns, reverse=bool(number % 2)):
            time_it(name, turns[name])
        manifest = read_manifest(url)
        turns = {
            "load": partial(load_tables, url, manifest, blocks),
            "read": partial(_read_plainly, plain, blocks),
        }
        for name in sorted(turns, reverse=bool(number % 2)):
            for each in (Path(url), plain):
                _drop_from_cache(each)
            time_it(name, turns[name])
        all_ok(None, world)
        shutil.rmtree(plain)
        if world.rank == 0:
            shutil.rmtree(url)
    # The first takes the memory that the later ones use again.
    return {"seconds": seconds, "cpu": cpu, "memory": max(growths[0], sum(growths)), "bytes": own}


def _write_plainly(folder: Path, blocks: Any) -> None:
    """The same bytes, in files as large as those of a checkpoint, one after the other."""
    folder.mkdir(parents=True)
    for path, rest in _plain_files(folder, blocks):
        with open(path, "wb", buffering=0) as file:
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())


def _read_plainly(folder: Path, blocks: Any) -> None:
    """Those files, back into the memory that they came from."""
    for path, rest in _plain_files(folder, blocks):
        with open(path, "rb", buffering=0) as file:
            while rest:
                count = file.readinto(rest)
                assert count, "cut short"
                rest = rest[count:]


def _plain_files(folder: Path, blocks: Any) -> Iterator[tuple[Path, memoryview]]:
    """Each file of plain copies, and the memory that it is a copy of."""
    from mtlrec.checkpoint.parts import BLOCK_BYTES
    from mtlrec.checkpoint.tensors import to_bytes

    for block in blocks:
        for name, value in (("weights", block.weights), *block.state.items()):
            data = to_bytes(value)
            for begin in range(0, len(data), BLOCK_BYTES):
                yield folder / f"{block.table}-{name}-{begin}", data[begin : begin + BLOCK_BYTES]


def _drop_from_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def _peak_growth() -> Iterator[list[int]]:
    """Bytes by which this process's resident memory was greater, at most, than before the block."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, growth = _status("VmRSS"), [0]
    yield growth
    growth[0] = _status("VmHWM") - before


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) * 1024


def _ratios(results: list[Results]) -> dict[str, Any]:
    seconds = results[0]["seconds"]
    total = sum(each["bytes"] for each in results) / 2**30
    return {
        "save": _spread([copy / own for own, copy in zip(seconds["save"], seconds["copy"], strict=True)]),
        "load": _spread([read / own for own, read in zip(seconds["load"], seconds["read"], strict=True)]),
        "memory": round(max(each["memory"] for each in results), 3),
        "gib_per_s": {name: round(total / statistics.median(each), 3) for name, each in seconds.items()},
        "cpu_s_per_gib": {
            name: round(WORKERS * statistics.median(each) / total, 3)
            for name, each in results[0]["cpu"].items()
        },
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
    }


# Training


def _stall(folder: Path, rows: int, batch: int, stretch: int, repeats: int) -> dict[str, Any]:
    from mtlrec.data.shards import Dataset
    from mtlrec.job.job import job_from_dict
    from mtlrec.schema import build_schema

    data = folder / "data"
    _write_data(data, max(16 * batch, 4096))
    job = job_from_dict(_job(folder, rows, batch, stretch * (2 * repeats + 1) + 1), "benchmark")
    schema = build_schema(job.schema_, job.model)
    run = {
        "job": job.to_dict(),
        "url": f"{job.run.storage}/{job.name}",
        "attempt": 1,
        "fingerprint": Dataset.open(str(data), schema.columns()).fingerprint,
    }
    call = {"run": run, "stretch": stretch}
    results = run_processes(f"{HERE}:training", WORKERS, folder / "2", call, timeout=7200)
    # [workers, steps]; the first stretch, with its cold caches, is left out.
    wall, cpu = (
        np.diff(np.array([each[clock] for each in results])[:, ::stretch])[:, 1:] for clock in ("wall", "cpu")
    )
    assert wall.shape == (WORKERS, 2 * repeats)
    copies, writes = results[0]["copies"], results[0]["writes"]
    in_time = bool(max(writes) < wall[0, 1::2].min())
    found: dict[str, Any] = {"stretch": stretch, "batch": batch, "complete_in_its_stretch": in_time}
    for name, lengths in (("stall", wall[0]), ("stall_cpu", cpu.mean(axis=0))):
        # One without a checkpoint, then one with.
        without, more = lengths[0::2], lengths[1::2] - lengths[0::2]
        found[name] = _spread([each / EVERY_STEPS for each in more / without * stretch])
    found["step_s"] = round(float(np.median(wall[0, 0::2])) / stretch, 4)
    found["step_cpu_s"] = round(float(np.median(cpu[:, 0::2])) / stretch, 4)
    return found | {"copy_s": _spread(copies), "write_s": _spread(writes)}


def training(world: Any, run: dict[str, Any], stretch: int) -> Results:
    """In a worker: train, with a checkpoint at the start of every other stretch.

    `wall`, `cpu`: this process's clocks before each step. Seconds of each copy, and until each was complete.
    """
    from mtlrec.checkpoint.snapshot import Snapshot
    from mtlrec.control import Silent
    from mtlrec.preflight import Run
    from mtlrec.train import train

    found: dict[str, list[float]] = {"wall": [], "cpu": [], "copies": [], "writes": []}
    began: list[float] = []

    class Clock(Silent):
        def should_stop(self) -> bool:
            found["wall"].append(time.perf_counter())
            found["cpu"].append(time.process_time())
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
