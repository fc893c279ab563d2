"""Parquet on disk to a trained model, beside plain TorchRec on batches that are in memory.

    python -m benchmarks end_to_end [--repeats 5] [--folder FOLDER] [--quick]

Ours is `mtlrec.train.train`, whole: it reads 17 Parquet columns with a list (from a disk whose pages are in
memory after the first epoch), hashes ids, shuffles, exchanges amounts, keeps losses, shows progress, writes
TensorBoard events, and writes a checkpoint of all tables beside training every 168 steps (every 20 s here;
real runs save less often). The other side is `benchmarks/plain.py`: the same model and optimizers in
plain TorchRec, its batches built before, no metrics and no checkpoints. They take turns
(`benchmarks/turns.py`), 1 worker and 2 workers with one thread and one core each, 4096 rows a worker and
step, 11 tables x 16 (`benchmarks/sized.py`).

`workers_1`, `workers_2`: samples/s of each turn of ours, over the mean of the plain turns before and behind
it. `cpu`: the plain side's processor time for a row over ours, reading and saving included. `parts`:
milliseconds of a step, of rank 0. Both sides learn as many numbers (`parameters`), and the summed loss of
both tasks falls (`losses`: first and last).

About 6 minutes, 5 GiB of memory, 1 GiB on the disk. `--quick`: a few seconds at a size that says nothing.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.measure import of_each, parser, progress, ratio, report
from benchmarks.sized import QUICK, Size, write_data
from benchmarks.turns import Turns, take_turns
from tests.distributed.processes import Results

WORKERS = (1, 2)
MUST, AIM = 0.95, 1.15


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    found = parser(__doc__)
    found.add_argument("--workers", type=int, nargs="+", default=WORKERS, help="numbers of workers to try")
    asked = found.parse_args(arguments)
    size, turns = Size(), Turns(asked.repeats)
    if asked.quick:
        size, turns = QUICK, Turns(2, ours=6, plain=4, settle=2)
    results: dict[int, list[Results]] = {}
    with tempfile.TemporaryDirectory(prefix="mtlrec-benchmark-", dir=asked.folder) as scratch:
        write_data(Path(scratch), size)
        for workers in asked.workers:
            results[workers] = take_turns(Path(scratch), size, workers, turns)
            progress(f"{workers} worker(s): {rates(results[workers], size, turns)}")
    return report(
        "end_to_end",
        {f"workers_{n}": ratio(of_turns(each, turns, "wall"), MUST, AIM) for n, each in results.items()},
        cpu={f"workers_{n}": ratio(of_turns(each, turns, "cpu"), MUST, AIM) for n, each in results.items()},
        samples_per_s={f"workers_{n}": rates(each, size, turns) for n, each in results.items()},
        parts_ms={f"workers_{n}": each[0]["parts"] for n, each in results.items()},
        losses={f"workers_{n}": each[0]["losses"] for n, each in results.items()},
        parameters=results[asked.workers[0]][0]["parameters"],
        checkpoints={f"workers_{n}": each[0]["saved"] for n, each in results.items()},
        batch_per_worker=size.batch,
        rows=size.rows,
        table_rows=size.table_rows,
        steps={"ours": turns.ours, "plain": turns.plain, "checkpoint_every": turns.period},
    )


def of_turns(results: list[Results], turns: Turns, clock: str) -> list[float]:
    """For each turn of ours, the seconds of a plain step over those of ours, summed over the workers."""
    ours, plain = (
        [sum(each) / steps for each in zip(*(worker[clock][side] for worker in results), strict=True)]
        for side, steps in (("ours", turns.ours), ("plain", turns.plain))
    )
    return of_each([(before + behind) / 2 for before, behind in pairwise(plain)], ours)


def rates(results: list[Results], size: Size, turns: Turns) -> dict[str, int]:
    """Samples a second over all workers, of the median turn."""
    rows = size.batch * len(results)
    return {
        side: round(rows * steps / statistics.median(results[0]["wall"][side]))
        for side, steps in (("ours", turns.ours), ("plain", turns.plain))
    }


if __name__ == "__main__":
    main(sys.argv[1:])
