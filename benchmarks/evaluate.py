"""Measuring a data set, beside the forward pass alone.

    python -m benchmarks evaluate [--rows 2000000] [--repeats 5] [--folder FOLDER] [--quick]

Model and columns are those of end_to_end (`benchmarks/sized.py`: 11 tables x 16, MMoE, two tasks, four
scenarios, 1M users), weights at their start, in batches of 4096, on one worker of one thread that has one
core: the threads that read share it. Sides, in turn:

- ours: `mtlrec.evaluate.evaluate`, whole: Parquet to AUC, log loss, calibration, GAUC, nDCG, recall, hit rate
  and MRR of both tasks, over all and by scenario.
- read: `mtlrec.evaluate.score` of the same files, what it yields dropped: the same model over the same rows,
  read the same way, but for labels and users, which are not read. So what measuring adds to predicting.
- memory: the model over as many batches that are in memory (64, again and again), nothing read.

`read`, `memory`: that side's seconds over ours; 1 if the rest cost nothing. `cpu`: the same in processor
time. Five repeats of 2M rows are 10M. Of one pass over 10M (`--rows 10000000 --repeats 1`) a row costs less,
because the work at its end is bounded.

About 5 minutes, 2 GiB of memory, 1 GiB on the disk. `--quick`: a few seconds at a size that says nothing.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from benchmarks.measure import in_turn, of_each, parser, ratio, report, spread
from benchmarks.sized import QUICK, Size, job, write_data
from tests.distributed.processes import Results, run_processes

MUST, AIM = 0.8, 0.95
SIDES = ("read", "memory")
_PREBUILT = 64


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    found = parser(__doc__)
    found.add_argument("--rows", type=int, default=2_000_000, help="of each measurement")
    asked = found.parse_args(arguments)
    size = replace(Size(), rows=asked.rows)
    if asked.quick:
        size, asked.repeats = QUICK, 2
    with tempfile.TemporaryDirectory(prefix="mtlrec-benchmark-", dir=asked.folder) as scratch:
        folder = Path(scratch)
        write_data(folder, size)
        call = {"job": job(folder, size, 1, None), "rows": size.rows, "repeats": asked.repeats}
        results = run_processes("benchmarks.evaluate:work", 1, folder / "1", call, timeout=3600)[0]
    wall, cpu = results["wall"], results["cpu"]
    return report(
        "evaluate",
        {side: ratio(of_each(wall[side], wall["ours"]), MUST, AIM) for side in SIDES},
        cpu={side: ratio(of_each(cpu[side], cpu["ours"]), MUST, AIM) for side in SIDES},
        rows=size.rows,
        batch=size.batch,
        samples_per_s={side: spread([size.rows / each for each in wall[side]]) for side in wall},
        cpu_ns_per_row={side: round(statistics.median(cpu[side]) / size.rows * 1e9) for side in cpu},
        metrics=results["metrics"],
    )


def work(world: Any, job: dict[str, Any], rows: int, repeats: int) -> Results:
    """In a worker. `wall`, `cpu`: by side, seconds of each measurement; `metrics`: over all rows, by task."""
    import torch

    from mtlrec.control import Silent
    from mtlrec.data.order import Position
    from mtlrec.data.reader import Reader
    from mtlrec.data.shards import Dataset
    from mtlrec.evaluate import evaluate, score
    from mtlrec.job.job import job_from_dict
    from mtlrec.model.model import build_model
    from mtlrec.schema import build_schema
    from mtlrec.sharding import initialise_tables, shard

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    parsed = job_from_dict(job, "benchmark")
    schema, data = build_schema(parsed.schema_, parsed.model), parsed.data
    model = shard(build_model(parsed, schema, world.device), parsed, world)
    initialise_tables(model, parsed.seed, parsed.model.table_init)
    dataset = Dataset.open(data.train, schema.columns())
    metrics: list[dict[str, Any]] = []

    def ours() -> int:
        metrics.append(evaluate(model, schema, data.train, data.batch_size, world, Silent()).metrics["all"])
        counted: int = metrics[-1]["click"]["rows"]
        return counted

    def read() -> int:
        scored = score(model, schema, dataset, data.batch_size, world, Silent(), what="read", labels=False)
        return sum(batch.num_rows for batch, _ in scored)

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
        batches = list(islice(reader, _PREBUILT))

    def memory() -> int:
        model.eval()
        done = 0
        with torch.no_grad():
            for batch in cycle(batches):
                model(batch)
                done += batch.num_rows
                if done >= rows:
                    return done
        raise AssertionError

    cpu: dict[str, list[float]] = defaultdict(list)

    def timed(name: str, side: Callable[[], int]) -> float:
        began, cpu_began = time.perf_counter(), time.process_time()
        done = side()
        cpu[name].append(time.process_time() - cpu_began)
        # The last batch of what is in memory is a whole one.
        assert rows <= done < rows + data.batch_size, f"{name} did {done} rows of {rows}"
        return time.perf_counter() - began

    sides = {"ours": ours, "read": read, "memory": memory}
    # Files into the page cache, memory from the system.
    read()
    wall = in_turn({name: partial(timed, name, side) for name, side in sides.items()}, repeats)
    assert all(each == metrics[0] for each in metrics), "the same rows are worth the same"
    return {"wall": wall, "cpu": dict(cpu), "metrics": metrics[0]}


if __name__ == "__main__":
    main(sys.argv[1:])
