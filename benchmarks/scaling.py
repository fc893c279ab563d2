"""From 1 worker to 2 at fixed rows per worker: our efficiency beside that of plain TorchRec.

    python -m benchmarks scaling [--repeats 11] [--folder FOLDER] [--quick]

The efficiency of a side is its samples/s on 2 workers over twice that on 1. `efficiency` is ours over theirs,
of the same turn of both numbers of workers; as the sides take turns in the same processes, what else the
machine does drops out of it, which it does not from the efficiency of one side (`ours`, `plain`): where the
workers share caches, memory and a clock, two of them are slower than one by far more than they exchange.
Model, data, both sides and how they take turns: as in `benchmarks/end_to_end.py`, but without checkpoints,
whose writing needs no other worker. A worker has one thread and one core. `cpu`: the same of processor time.

About 6 minutes, 2 GiB of memory, 1 GiB on the disk. `--quick`: a few seconds at a size that says nothing.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.end_to_end import of_turns, rates
from benchmarks.measure import of_each, parser, progress, ratio, report
from benchmarks.sized import QUICK, Size, write_data
from benchmarks.turns import Turns, take_turns

MUST, AIM = 0.95, 1.0


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    found = parser(__doc__)
    # Many short turns: what else the machine does, it does for some seconds.
    found.set_defaults(repeats=11)
    asked = found.parse_args(arguments)
    size, turns = Size(), Turns(asked.repeats, ours=40, plain=24, saves=False)
    if asked.quick:
        size, turns = QUICK, Turns(2, ours=6, plain=4, settle=2, saves=False)
    with tempfile.TemporaryDirectory(prefix="mtlrec-benchmark-", dir=asked.folder) as scratch:
        write_data(Path(scratch), size)
        results = {workers: take_turns(Path(scratch), size, workers, turns) for workers in (1, 2)}
    samples_per_s = {workers: rates(each, size, turns) for workers, each in results.items()}
    progress(f"{samples_per_s}")
    one, two = ({clock: of_turns(results[n], turns, clock) for clock in ("wall", "cpu")} for n in (1, 2))
    return report(
        "scaling",
        {"efficiency": ratio(of_each(two["wall"], one["wall"]), MUST, AIM)},
        cpu={"efficiency": ratio(of_each(two["cpu"], one["cpu"]), MUST, AIM)},
        efficiency={
            side: round(samples_per_s[2][side] / samples_per_s[1][side] / 2, 4) for side in ("ours", "plain")
        },
        samples_per_s={f"workers_{workers}": each for workers, each in samples_per_s.items()},
        parts_ms={f"workers_{workers}": each[0]["parts"] for workers, each in results.items()},
        batch_per_worker=size.batch,
        rows=size.rows,
        table_rows=size.table_rows,
        steps={"ours": turns.ours, "plain": turns.plain},
    )


if __name__ == "__main__":
    main(sys.argv[1:])
