"""From 1 worker to 2 at fixed rows per worker: our efficiency beside that of plain TorchRec.

    python -m benchmarks scaling [--repeats 5] [--folder FOLDER] [--quick]

The efficiency of a side is its samples/s on 2 workers over twice that on 1. `efficiency` is ours over theirs:
each repeat is a run on 1 worker and then one on 2, in each of which both sides take turns in the same
processes. So what else the machine does drops out of it, which it does not from the efficiency of one side
(`ours`, `plain`): where the workers share caches, memory and a clock, two of them are slower than one by far
more than they exchange. Model, data, both sides and how they take turns: as in `benchmarks/end_to_end.py`,
but without checkpoints, whose writing needs no other worker. A worker has one thread and one core. `cpu`: the
same of processor time.

About 11 minutes, 2 GiB of memory, 1 GiB on the disk. `--quick`: some seconds at a size that says nothing.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.end_to_end import WORKERS, of_turns, rates
from benchmarks.measure import of_each, parser, progress, ratio, report
from benchmarks.sized import QUICK, Size, write_data
from benchmarks.turns import Turns, take_turns
from tests.distributed.processes import Results

MUST, AIM = 0.95, 1.0


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    asked = parser(__doc__).parse_args(arguments)
    size, turns = Size(), Turns(3, ours=40, plain=24, saves=False)
    if asked.quick:
        size, turns, asked.repeats = QUICK, Turns(2, ours=6, plain=4, settle=2, saves=False), 1
    rounds: list[dict[int, list[Results]]] = []
    with tempfile.TemporaryDirectory(prefix="mtlrec-benchmark-", dir=asked.folder) as scratch:
        write_data(Path(scratch), size)
        for number in range(asked.repeats):
            folder = Path(scratch) / f"round-{number}"
            folder.mkdir()
            (folder / "data").symlink_to(Path(scratch) / "data")
            rounds.append({workers: take_turns(folder, size, workers, turns) for workers in WORKERS})
            progress(f"{[rates(each, size, turns) for each in rounds[-1].values()]}")

    def efficiency(clock: str) -> list[float]:
        one, two = (
            [statistics.median(of_turns(each[workers], turns, clock)) for each in rounds]
            for workers in WORKERS
        )
        return of_each(two, one)

    samples_per_s = {
        workers: {
            side: round(statistics.median(rates(each[workers], size, turns)[side] for each in rounds))
            for side in ("ours", "plain")
        }
        for workers in WORKERS
    }
    return report(
        "scaling",
        {"efficiency": ratio(efficiency("wall"), MUST, AIM)},
        cpu={"efficiency": ratio(efficiency("cpu"), MUST, AIM)},
        efficiency={
            side: round(samples_per_s[2][side] / samples_per_s[1][side] / 2, 4) for side in ("ours", "plain")
        },
        samples_per_s={f"workers_{workers}": each for workers, each in samples_per_s.items()},
        parts_ms={f"workers_{workers}": each[0]["parts"] for workers, each in rounds[-1].items()},
        batch_per_worker=size.batch,
        rows=size.rows,
        table_rows=size.table_rows,
        turns=asdict(turns),
    )


if __name__ == "__main__":
    main(sys.argv[1:])
