"""The end-to-end job with 1e8 rows of tables on one GPU, beside plain TorchRec there; and its lookups alone.

    python -m benchmarks gpu [--batches 4096 65536] [--repeats 5] [--ours 400] [--plain 100] [--quick]

As `end_to_end`, with one worker and 100.2M rows of tables (6.4 GB of weights and 0.4 GB of state): ours
reads Parquet from the disk, keeps losses, shows progress and writes a checkpoint of all tables in each of its
turns; the other side is `benchmarks/plain.py` with all its batches in the GPU's memory, in a process of its
own on the same GPU. They take turns. `parts_ms` are of the host, which only tells the device what to do.

`lookups`: the tables alone, on batches in the GPU's memory. `lookup_ms`, `update_ms`: of a batch, with all
that TorchRec does around it; `kernel_ms`: what fbgemm's kernels took of that, by the profiler. `gb_per_s` is
of the kernels: 64 bytes for each row looked up and each pooled embedding, 8 for each id; of the update (the
backward with its optimizer) each distinct row read and written, with 4 bytes of state, and a pooled gradient
and an id read for each lookup. `share`: of what a copy within the GPU's memory moves, read and written.

Needs a GPU with 20 GB, and 30 GB on the disk; about seven minutes. `--device cpu` with `--quick`: a few
seconds, to see that it runs.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.end_to_end import MUST, of_turns, rates
from benchmarks.measure import parser, progress, ratio, report, run_of, spread
from benchmarks.sized import DIM, QUICK, Size, job, write_data
from benchmarks.turns import Turns, take_turns
from tests.distributed.processes import Results, run_processes

LARGE = Size(rows=64 * 65_536, files=16, group_rows=65_536, users=60_000_000, items=40_000_000)
ROW_BYTES, ID_BYTES, STATE_BYTES = 4 * DIM, 8, 4
_ROUNDS = 5
"""Passes over the batches that are timed together."""


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__)
    options.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    options.add_argument("--batches", type=int, nargs="+", default=(4096, 65_536), help="rows of a step")
    options.add_argument("--ours", type=int, default=400, help="steps of a turn of ours at the largest batch")
    options.add_argument("--plain", type=int, default=100, help="of the plain side")
    asked = options.parse_args(arguments)
    need(asked.device)
    large = LARGE
    if asked.quick:
        large, asked.batches, asked.repeats, asked.ours, asked.plain = QUICK, (256,), 2, 6, 4
    device, ratios, samples, parts, losses, saved, alone = "", {}, {}, {}, {}, {}, {}
    with tempfile.TemporaryDirectory(prefix="mtlrec-benchmark-", dir=asked.folder) as scratch:
        folder = Path(scratch)
        write_data(folder, large)
        progress(f"{large.rows:,} rows are written")
        for batch in asked.batches:
            size, key = replace(large, batch=batch), f"batch_{batch}"
            call = {"run": run_of(job(folder, size, 1, None, asked.device)), "repeats": max(asked.repeats, 2)}
            alone[key] = run_processes(
                "benchmarks.gpu:lookups", 1, folder / key, call, timeout=600, device=asked.device
            )[0]
            device = alone[key].pop("device")
            progress(f"{batch} rows a step: {alone[key]}")
            # A turn is as long in rows whatever the batch, up to four times as many steps.
            longer = min(max(asked.batches) // batch, 4)
            turns = Turns(asked.repeats, ours=longer * asked.ours, plain=longer * asked.plain)
            if asked.quick:
                turns = replace(turns, settle=2)
            results = take_turns(folder, size, 1, turns, asked.device)
            ratios[key] = ratio(of_turns(results, turns, "wall"), MUST)
            samples[key], parts[key] = rates(results, size, turns), results[0]["parts"]
            losses[key], saved[key] = results[0]["losses"], results[0]["saved"]
            progress(f"{batch} rows a step: {samples[key]}")
    return report(
        "gpu",
        ratios,
        device=device,
        samples_per_s=samples,
        parts_ms=parts,
        losses=losses,
        checkpoints=saved,
        lookups=alone,
        table_rows=large.table_rows,
        size={key: value for key, value in asdict(large).items() if key != "batch"},
    )


def need(device: str) -> None:
    """Ends with a line where there is no such device."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device here (mtlrec doctor --device cuda says more)")


def lookups(world: Any, run: dict[str, Any], repeats: int) -> Results:
    """In a worker: how fast the tables alone are looked up and updated, on batches of the job's data."""
    import torch

    from benchmarks.plain import first_batches
    from mtlrec.job.job import job_from_dict
    from mtlrec.model.model import build_model
    from mtlrec.schema import build_schema
    from mtlrec.sharding import shard

    parsed = job_from_dict(run["job"], "benchmark")
    schema = build_schema(parsed.schema_, parsed.model)
    cuda = world.device.type == "cuda"
    batches = [batch.to(world.device) for batch in first_batches(parsed, 8, world)]
    model = shard(build_model(parsed, schema, world.device), parsed, world).model
    ids = statistics.mean(batch.ids.values().numel() for batch in batches)
    touched = statistics.mean(
        sum(len(each.unique()) for each in _by_table(batch, schema)) for batch in batches
    )
    pooled = sum(lookup.width for lookup in schema.lookups) * 4 * len(batches[0].labels)
    grads = [torch.randn_like(model.trunk_input(batch)) for batch in batches]

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                model.trunk_input(batch)

    def both() -> None:
        for batch, grad in zip(batches, grads, strict=True):
            model.trunk_input(batch).backward(grad)

    source = torch.empty(2**28 if cuda else 2**20, dtype=torch.float32, device=world.device)
    target = torch.empty_like(source)
    copy: Callable[[], Any] = lambda: target.copy_(source)  # noqa: E731
    times: dict[str, list[float]] = {}
    for name, action in (("copy", copy), ("lookup", forward), ("both", both)):
        seconds(action, _ROUNDS, cuda)
        times[name] = [seconds(action, _ROUNDS, cuda) for _ in range(repeats)]
    updates = [both - lookup for both, lookup in zip(times["both"], times["lookup"], strict=True)]
    copied = 1e-9 * 2 * source.numel() * source.element_size() / statistics.median(times["copy"])
    found = {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "ids": round(ids),
        "distinct_rows": round(touched),
        "copy_gb_per_s": round(copied),
        "lookup_ms": spread([1e3 * each / len(batches) for each in times["lookup"]]),
        "update_ms": spread([1e3 * each / len(batches) for each in updates]),
    }
    moved = {
        "lookup": ids * (ROW_BYTES + ID_BYTES) + pooled,
        "update": 2 * touched * (ROW_BYTES + STATE_BYTES) + ids * (ROW_BYTES + ID_BYTES),
    }
    spent = kernel_seconds(both) if cuda else {"lookup": times["lookup"][0], "update": times["both"][0]}
    for name, in_all in spent.items():
        rate = 1e-9 * moved[name] * len(batches) / in_all
        found[name] = {
            "kernel_ms": round(1e3 * in_all / len(batches), 4),
            "gb_per_s": round(rate, 1),
            "share": round(rate / copied, 3),
        }
    return found


def _by_table(batch: Any, schema: Any) -> list[Any]:
    """The ids of a batch that each table is asked for."""
    import torch

    parts = batch.ids.to_dict()
    return [torch.cat([parts[feature].values() for feature in table.features]) for table in schema.tables]


def seconds(action: Callable[[], Any], rounds: int, cuda: bool) -> float:
    """Of one call, when so many follow one another; on a GPU by its own clock."""
    import torch

    if not cuda:
        began = time.perf_counter()
        for _ in range(rounds):
            action()
        return (time.perf_counter() - began) / rounds
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(rounds):
        action()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / rounds


def kernel_seconds(action: Callable[[], Any]) -> dict[str, float]:
    """What fbgemm's kernels take of one call on the GPU, without the gaps between them: forward, backward."""
    from torch.profiler import ProfilerActivity, profile

    action()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as watched:
        action()
    found = {"lookup": 0.0, "update": 0.0}
    for each in watched.key_averages():
        name, spent = each.key.lower(), 1e-6 * each.self_device_time_total
        if each.device_type.name == "CUDA" and "embedding" in name:
            found["lookup" if "forward" in name else "update"] += spent
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
