"""What a worker's memory grows by for its share of the tables: 1, 2 and 4 workers, 2 GiB of tables.

    python -m benchmarks memory [--gib 2] [--repeats 5] [--steps 5] [--folder FOLDER] [--quick]

Real training (`mtlrec.train`, plain gloo processes on this machine): the job of the end-to-end benchmark with
so many users and items that weights and optimizer state make up `--gib`, spread as the planner has it.
Measured is the greatest resident memory (VmHWM) until some steps are trained, the building of the model
included. From it goes the same of the same job with tables of a few rows (`constant_gib`, by rank: the
process, its libraries, the reader, the dense part; it is measured first, in the same process); the rest, as a
share of tables / workers, is the ratio, of the worker that has the most. Each repeat builds everything anew.

`with_copy`: the same while an asynchronous checkpoint is taken and written, once. One copy of its own rows is
what a worker has by contract then, so that 2 is what can be reached. `resumed`: the same from that checkpoint
on, without another, once. `ranks`: on how many workers each of the
two large tables lies. `first_step_s`: from the start of training to the first step, the slowest.

The full size takes five minutes, 6 GiB of memory and 3 GiB on the disk; `--quick` 15 s.
"""

from __future__ import annotations

import contextlib
import gc
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import sized
from benchmarks.measure import forget_peak, memory, parser, progress, ratio, report, run_of
from tests.distributed.processes import Results, run_processes

WORKERS = (1, 2, 4)
MUST, AIM = 1.25, 1.1
ROW_BYTES = 4 * (sized.DIM + 1)
"""Weights, and the one number that RowWiseAdagrad keeps."""


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__)
    options.add_argument("--gib", type=float, default=2.0, help="bytes of all tables")
    options.add_argument("--steps", type=int, default=5, help="that are trained before it is measured")
    asked = options.parse_args(arguments)
    small = replace(sized.QUICK, batch=1024)
    if asked.quick:
        asked.gib, asked.repeats, asked.steps = 1 / 8, 1, 3
    # Two users an item, as in the end-to-end benchmark.
    items = int(asked.gib * 2**30 / ROW_BYTES - small.table_rows) // 3
    large = replace(small, users=small.users + 2 * items, items=small.items + items)
    ratios, found = {}, {}
    with tempfile.TemporaryDirectory(prefix="mtlrec-benchmark-", dir=asked.folder) as scratch:
        folder = Path(scratch)
        sized.write_data(folder, small)
        for workers in WORKERS[: 1 if asked.quick else None]:
            name = f"workers_{workers}"
            runs = []
            # Without checkpoints; and with such as are written beside training, though only when told to.
            for kind, section in (("plain", {}), ("saving", {"every_minutes": 1e6})):
                for size in (small, large):
                    job = sized.job(folder, size, workers, every_steps=None)
                    job["run"]["checkpoint"] = section
                    runs.append(run_of(job | {"name": f"{name}-{size.table_rows}-{kind}"}))
            call = {"runs": runs, "repeats": asked.repeats, "steps": asked.steps}
            target, share = "benchmarks.memory:peaks", large.table_rows * ROW_BYTES / workers
            by_rank = run_processes(target, workers, folder / name, call, timeout=3600)
            repeats = zip(*(each["growths"] for each in by_rank), strict=True)
            ratios[name] = ratio([max(growths) / share for growths in repeats], MUST, AIM, least=False)
            found[name] = {
                **{
                    case: round(max(each[case] for each in by_rank) / share, 4)
                    for case in ("with_copy", "resumed")
                },
                "constant_gib": [_gib(each["constant"]) for each in by_rank],
                "growth_gib": [_gib(statistics.median(each["growths"])) for each in by_rank],
                "ranks": by_rank[0]["ranks"],
                "first_step_s": round(max(max(each["seconds"]) for each in by_rank), 2),
            }
            shutil.rmtree(folder / "runs")
            progress(f"{name}: {ratios[name]} {found[name]}")
    return report("memory", ratios, gib=asked.gib, table_rows=large.table_rows, **found)


def peaks(world: Any, runs: list[dict[str, Any]], repeats: int, steps: int) -> Results:
    """In a worker: train `runs`, a small one and a large one, and both again with checkpoints.

    Bytes of the small one's greatest memory, and by how much the large one's was greater: each time, with a
    checkpoint, and from there on.
    """
    from mtlrec.control import Silent
    from mtlrec.preflight import Run
    from mtlrec.train import train

    class Over(Exception):
        """Enough was seen."""

    class Watch(Silent):
        """Ends training after some steps; where a checkpoint is asked for, once that is complete."""

        def __init__(self, saves: bool) -> None:
            self.asked, self.saves, self.is_done = 0, saves, not saves
            self.began, self.first_step_s = time.perf_counter(), 0.0
            self.ranks: dict[str, int] = {}

        def show(self, event: dict[str, Any]) -> None:
            if event["kind"] == "plan":
                ranks = {table["table"]: len(table["ranks"]) for table in event["tables"]}
                self.ranks = {name: ranks[name] for name in ("user_id", "item_id")}

        def report(self, metrics: dict[str, float], checkpoint: str) -> None:
            self.is_done = True

        def should_stop(self) -> bool:
            if self.asked == 1:
                self.first_step_s = time.perf_counter() - self.began
            # Every rank hears of a complete checkpoint at the same step.
            if self.asked >= steps and self.is_done:
                raise Over
            self.asked += 1
            return False

        def should_save(self) -> bool:
            return self.saves and self.asked == 1

    def peak(run: dict[str, Any], saves: bool = False) -> tuple[int, Watch]:
        gc.collect()
        forget_peak()
        watch = Watch(saves)
        with contextlib.suppress(Over):
            train(Run(**run), world, watch)
        return memory("VmHWM"), watch

    small, large, small_saving, large_saving = runs
    constant, _ = peak(small)
    growths, seconds = [], []
    for _ in range(repeats):
        most, watch = peak(large)
        growths.append(most - constant)
        seconds.append(watch.first_step_s)
    before, _ = peak(small_saving, saves=True)
    with_copy = peak(large_saving, saves=True)[0] - before
    before, _ = peak(small | {"url": small_saving["url"]})
    resumed = peak(large | {"url": large_saving["url"]})[0] - before
    return {
        "constant": constant,
        "growths": growths,
        "with_copy": with_copy,
        "resumed": resumed,
        "ranks": watch.ranks,
        "seconds": seconds,
    }


def _gib(size: float) -> float:
    return round(size / 2**30, 3)


if __name__ == "__main__":
    main(sys.argv[1:])
