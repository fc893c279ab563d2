"""What saving and loading a checkpoint cost, beside plain copies of the same bytes.

    python -m benchmarks checkpoint [--gib 4] [--repeats 5] [--folder FOLDER] [--quick]

Two workers (plain gloo processes on this machine). What is compared is done in turn, in the same processes.

- `save`: a worker's copy in memory is written as a checkpoint; as many processes write the same bytes to
  files of the same size, one after the other, each synced.
- `load`: the last such checkpoint is read into its tables; those files are read into memory that is there.
  Before either, the files are dropped from the page cache.

The ratio is that of throughputs; `cpu` is the same ratio of a worker's processor time. `memory`: a worker's
peak resident memory while a checkpoint is copied and written, less what it had before, as a share of the
bytes of its own rows; of both workers the greater one.

4 GiB take ten minutes, 10 GiB of memory and 10 GiB on the disk; `--quick` (a few MiB) 10 s.
"""

from __future__ import annotations

import contextlib
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

from benchmarks.measure import forget_peak, in_turn, memory, of_each, parser, ratio, report, spread
from tests.distributed.processes import Results, run_processes

WORKERS = 2
DIM = 128
TABLES = 8
MUST, AIM = 0.7, 0.9
SIDES = {"save": "copy", "load": "read"}
"""Ours, and what it is measured against."""


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__)
    options.add_argument("--gib", type=float, default=4.0, help="bytes of all tables")
    asked = options.parse_args(arguments)
    if asked.quick:
        asked.gib, asked.repeats = 1 / 64, 2
    rows = int(asked.gib * 2**30 / (TABLES * 4 * (DIM + 1)))
    with tempfile.TemporaryDirectory(prefix="mtlrec-benchmark-", dir=asked.folder) as scratch:
        call = {"folder": f"{scratch}/copies", "rows": rows, "repeats": asked.repeats}
        results = run_processes(
            "benchmarks.checkpoint:copies", WORKERS, Path(scratch, "call"), call, timeout=3600
        )
    seconds, cpu = results[0]["seconds"], results[0]["cpu"]
    gib = sum(each["bytes"] for each in results) / 2**30
    return report(
        "checkpoint",
        {ours: ratio(of_each(seconds[plain], seconds[ours]), MUST, AIM) for ours, plain in SIDES.items()},
        cpu={ours: spread(of_each(cpu[plain], cpu[ours])) for ours, plain in SIDES.items()},
        gib=round(gib, 4),
        workers=WORKERS,
        repeats=asked.repeats,
        memory=round(max(each["memory"] for each in results), 3),
        gib_per_s={name: round(gib / statistics.median(each), 3) for name, each in seconds.items()},
        cpu_s_per_gib={name: round(WORKERS * statistics.median(each) / gib, 3) for name, each in cpu.items()},
    )


def copies(world: Any, folder: str, rows: int, repeats: int) -> Results:
    """In a worker: save, load, and plain copies, in turn. Seconds of each, the same on every rank."""
    import torch

    from mtlrec.checkpoint.load import load_tables
    from mtlrec.checkpoint.manifest import read_manifest
    from mtlrec.checkpoint.save import Saving, save
    from mtlrec.checkpoint.snapshot import Snapshot
    from mtlrec.checkpoint.tensors import TableBlock
    from mtlrec.distributed import all_ok

    begin, end = rows * world.rank // WORKERS, rows * (world.rank + 1) // WORKERS
    blocks = [
        TableBlock(
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
    cpu: dict[str, list[float]] = {name: [] for pair in SIDES.items() for name in pair}

    def timed(name: str, action: Callable[[], Any]) -> float:
        all_ok(None, world)
        started = time.perf_counter(), time.process_time()
        action()
        cpu[name].append(time.process_time() - started[1])
        all_ok(None, world)
        return time.perf_counter() - started[0]

    dense, snapshot, growths = {"weights.a": torch.ones(3)}, Snapshot(world.rank), []
    for number in range(2):
        with _peak_growth() as growth:
            held, rest = snapshot.take(blocks, dense)
            Saving(f"{folder}/memory{number}", held, rest, meta, world).wait()
        growths.append(growth[0] / own)
    all_ok(None, world)
    if world.rank == 0:
        shutil.rmtree(folder)

    url, plain = Path(folder, "saved"), Path(folder, f"plain{world.rank}")

    def saved() -> float:
        all_ok(None, world)
        if world.rank == 0:
            shutil.rmtree(url, ignore_errors=True)
        return timed("save", partial(save, str(url), held, dense, meta, world))

    def copied() -> float:
        shutil.rmtree(plain, ignore_errors=True)
        return timed("copy", partial(_write_plainly, plain, blocks))

    seconds = in_turn({"save": saved, "copy": copied}, repeats)
    manifest = read_manifest(str(url))

    def drop_from_cache() -> None:
        for path in (*url.rglob("*"), *plain.rglob("*")):
            if path.is_file():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    seconds |= in_turn(
        {
            "load": lambda: timed("load", partial(load_tables, str(url), manifest, blocks)),
            "read": lambda: timed("read", partial(_read_plainly, plain, blocks)),
        },
        repeats,
        between=drop_from_cache,
    )
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


@contextlib.contextmanager
def _peak_growth() -> Iterator[list[int]]:
    """Bytes by which this process's resident memory was greater, at most, than before the block."""
    forget_peak()
    before, growth = memory("VmRSS"), [0]
    yield growth
    growth[0] = memory("VmHWM") - before


if __name__ == "__main__":
    main(sys.argv[1:])
