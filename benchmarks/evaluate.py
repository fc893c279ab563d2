"""Measuring a data set, beside the forward pass alone.

    python -m benchmarks evaluate [--rows 10000000] [--repeats 5] [--folder FOLDER] [--quick]

Model and columns are those of end_to_end (`benchmarks/sized.py`: 11 tables x 16, MMoE, two tasks, four
scenarios, 1M users), weights at their start, in batches of 4096, on one worker of one thread; the threads
that read run beside it. Sides, over the same 10M rows, which take turns at every fifth of them:

- ours: `mtlrec.evaluate.evaluate`, whole: Parquet to AUC, log loss, calibration, GAUC, nDCG, recall, hit rate
  and MRR of both tasks, over all and by scenario. Each turn bears a fifth of what comes after the last row
  (`end_s`): what was gathered is sorted and ranked.
- read: `mtlrec.evaluate.score` of the same files, what it yields dropped: the same model over the same rows,
  read the same way, but for labels and users, which are not read. So what measuring adds to predicting.
- memory: the model over as many batches that are in memory (64, again and again), nothing read.

`read`, `memory`: that side's seconds over ours; 1 if the rest cost nothing. `cpu`: the same in processor
time, where reading does not hide behind the model on another core.

About 6 minutes, 2 GiB of memory, 3 GiB on the disk. `--quick`: a few seconds at a size that says nothing.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.measure import of_each, parser, progress, ratio, report, spread
from benchmarks.sized import QUICK, Size, job, write_data
from benchmarks.turns import rest
from tests.distributed.processes import Results, run_processes

MUST, AIM = 0.8, 0.95
SIDES = ("read", "memory")
_PREBUILT = 64


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    found = parser(__doc__)
    found.add_argument("--rows", type=int, default=10_000_000, help="in all")
    asked = found.parse_args(arguments)
    size = replace(Size(), rows=asked.rows)
    if asked.quick:
        size, asked.repeats = QUICK, 2
    with tempfile.TemporaryDirectory(prefix="mtlrec-benchmark-", dir=asked.folder) as scratch:
        folder = Path(scratch)
        write_data(folder, size)
        call = {"job": job(folder, size, 1, None), "rows": size.rows, "repeats": asked.repeats}
        result = run_processes("benchmarks.evaluate:work", 1, folder / "1", call, timeout=3600)[0]
    wall, cpu, rows = result["wall"], result["cpu"], size.rows / asked.repeats
    return report(
        "evaluate",
        {side: ratio(of_each(wall[side], wall["ours"]), MUST, AIM) for side in SIDES},
        cpu={side: ratio(of_each(cpu[side], cpu["ours"]), MUST, AIM) for side in SIDES},
        rows=size.rows,
        batch=size.batch,
        samples_per_s={side: spread([rows / each for each in wall[side]]) for side in ("ours", *SIDES)},
        cpu_ns_per_row={side: round(statistics.median(cpu[side]) / rows * 1e9) for side in ("ours", *SIDES)},
        end_s=round(wall["end"][0], 3),
        metrics=result["metrics"],
    )


def work(world: Any, job: dict[str, Any], rows: int, repeats: int) -> Results:
    """In a worker. `wall`, `cpu`: by side, seconds of each turn; `metrics`: over all rows, by task."""
    import torch

    from mtlrec import evaluate
    from mtlrec.control import Silent
    from mtlrec.data.order import Position
    from mtlrec.data.reader import Reader
    from mtlrec.data.shards import Dataset
    from mtlrec.job.job import job_from_dict
    from mtlrec.model.model import build_model
    from mtlrec.schema import build_schema
    from mtlrec.sharding import initialise_tables, shard

    parsed = job_from_dict(job, "benchmark")
    schema, data = build_schema(parsed.schema_, parsed.model), parsed.data
    model = shard(build_model(parsed, schema, world.device), parsed, world)
    initialise_tables(model, parsed.seed, parsed.model.table_init)
    dataset = Dataset.open(data.train, schema.columns())
    score = evaluate.score
    with Reader(
        dataset,
        schema,
        batch_size=data.batch_size,
        lanes=1,
        window=65536,
        shuffle=False,
        seed=0,
        position=Position.start(1),
        epochs=1,
        labels=False,
    ) as reader:
        batches = cycle(list(islice(reader, min(_PREBUILT, reader.steps_per_epoch - 1))))

    def in_memory() -> Iterator[Any]:
        with torch.no_grad():
            for batch in batches:
                yield batch, model(batch)

    clock = _Clock()
    ends = [rows * (turn + 1) // repeats for turn in range(repeats)]
    sides: dict[str, Any] = {
        "read": score(model, schema, dataset, data.batch_size, world, Silent(), what="read", labels=False),
        "memory": in_memory(),
    }
    done = dict.fromkeys(("ours", *SIDES), 0)

    def take_turns(turn: int) -> None:
        for name in SIDES if turn % 2 == 0 else reversed(SIDES):
            rest()
            clock.start()
            while done[name] < ends[turn]:
                batch, _ = next(sides[name])
                done[name] += batch.num_rows
            clock.stop(name)
            progress(f"{name} {turn + 1}/{repeats}: {clock.wall[name][-1]:.3f} s")
        rest()

    def in_turns(*arguments: Any, **options: Any) -> Iterator[Any]:
        """What `evaluate` has scored; where a turn of it ends, the other sides have theirs."""
        turn = 0
        for batch, outputs in score(*arguments, **options):
            yield batch, outputs
            done["ours"] += batch.num_rows
            if done["ours"] >= ends[turn]:
                clock.stop("ours")
                take_turns(turn)
                turn += 1
                clock.start()

    clock.start()
    with mock.patch.object(evaluate, "score", in_turns):
        measured = evaluate.evaluate(model, schema, data.train, data.batch_size, world, Silent())
    clock.stop("end")
    sides["read"].close()
    assert done["ours"] == done["read"] == rows <= done["memory"], done
    for seconds in (clock.wall, clock.cpu):
        [end] = seconds["end"]
        seconds["ours"] = [each + end / repeats for each in seconds["ours"]]
    return {"wall": clock.wall, "cpu": clock.cpu, "metrics": measured.metrics["all"]}


class _Clock:
    """Seconds of each turn, by side."""

    def __init__(self) -> None:
        self.wall: dict[str, list[float]] = defaultdict(list)
        self.cpu: dict[str, list[float]] = defaultdict(list)

    def start(self) -> None:
        self._began = time.perf_counter(), time.process_time()

    def stop(self, side: str) -> None:
        self.wall[side].append(time.perf_counter() - self._began[0])
        self.cpu[side].append(time.process_time() - self._began[1])


if __name__ == "__main__":
    main(sys.argv[1:])
