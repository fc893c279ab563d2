"""How fast a step of the end-to-end job could be on this machine, by its bytes and products alone.

    python -m benchmarks floor [--repeats 5] [--quick]

One thread, by its processor time. Measured are: products of large square matrices (`gemm`) and of the batched
shape of the experts' second layer (`bmm`), in GFLOP/s; a copy of 256 MiB, in GB/s read and written; rows of
16 floats gathered from and written to a table of 1M rows, drawn as the job's ids are, in rows/s. The floor of
a step of 4096 rows is the time of its products at `gemm`, forward and twice as many backward, and that of its
tables: forward a row read for each lookup, backward each distinct row read and written, with one number of
state, which takes a line of memory as well. Nothing in between (activations, losses, dispatch) is counted: no
step can reach it.

`ratios` is empty: nothing is compared. A few seconds, 0.6 GiB of memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.measure import in_turn, parser, report, spread
from benchmarks.sized import DIM, EXPERTS, HIDDEN, OTHERS, SCENARIOS, TOWER, Size

LOOKUPS, HISTORY = len(OTHERS) + 4, 10
"""Embeddings that a row reads, one of them the mean of so many."""
NUMBERS, TASKS = 3, 2


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    asked = parser(__doc__).parse_args(arguments)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rates = in_turn(measurements(16 if asked.quick else 1), asked.repeats)
    finally:
        torch.set_num_threads(before)
    rows = Size().batch
    best = {name: max(values) for name, values in rates.items()}
    looked_up, updated = rows * (LOOKUPS - 1 + HISTORY), distinct(Size())
    floor = {
        "products": 1e-6 * operations(rows) / best["gemm"],
        "lookup": 1e3 * looked_up / best["gather"],
        # Of weights and of state: read and write.
        "update": 2e3 * updated * (1 / best["gather"] + 1 / best["scatter"]),
    }
    return report(
        "floor",
        {},
        rates={name: spread(values) for name, values in rates.items()},
        floor_ms={name: round(value, 2) for name, value in floor.items()},
        step_ms=round(sum(floor.values()), 1),
        samples_per_s=round(1e3 * rows / sum(floor.values())),
        gflop=round(1e-9 * operations(rows), 2),
        rows_looked_up=looked_up,
        rows_updated=updated,
        batch=rows,
    )


def operations(rows: int) -> int:
    """Floating-point operations of the model's products in one step, forward and backward."""
    inputs = LOOKUPS * DIM + NUMBERS
    experts = EXPERTS * (inputs * HIDDEN[0] + HIDDEN[0] * HIDDEN[1])
    gates = TASKS * EXPERTS * (inputs + HIDDEN[1])
    towers = TASKS * (HIDDEN[1] * TOWER[0] + TOWER[0])
    return 3 * 2 * rows * (experts + gates + towers)


def distinct(size: Size) -> int:
    """Rows of all tables that a step touches."""
    drawn = {size.users: 1, size.items: 1 + HISTORY, len(SCENARIOS): 1, **dict.fromkeys(size.others, 1)}
    return sum(len(ids(size.batch * each, most).unique()) for most, each in drawn.items())


def ids(count: int, most: int) -> torch.Tensor:
    """0 to `most` - 1, drawn as the job's data are."""
    return (most * torch.rand(count, dtype=torch.float64) ** Size().skew).long()


def measurements(smaller: int) -> dict[str, Callable[[], float]]:
    """Name -> a measurement of it; `smaller`: by which to divide the sizes."""
    size, copied, table_rows, rows = 1024, 2**26 // smaller, 2**20 // smaller, 2**19 // smaller
    a, b = torch.randn(size, size), torch.randn(size, size)
    x, w = torch.randn(EXPERTS, 4096, HIDDEN[0]), torch.randn(EXPERTS, *HIDDEN)
    source, target = torch.ones(copied), torch.ones(copied)
    table, some = torch.zeros(table_rows, DIM), torch.zeros(rows, DIM)
    places = ids(rows, table_rows)

    def rate(amount: float, action: Callable[[], Any]) -> Callable[[], float]:
        def measure() -> float:
            action()
            began = time.process_time()
            action()
            return amount / (time.process_time() - began)

        return measure

    return {
        "gemm": rate(2e-9 * size**3, lambda: torch.mm(a, b)),
        "bmm": rate(2e-9 * x.numel() * HIDDEN[1], lambda: torch.bmm(x, w)),
        "copy": rate(8e-9 * copied, lambda: target.copy_(source)),
        "gather": rate(rows, lambda: torch.index_select(table, 0, places, out=some)),
        "scatter": rate(rows, lambda: table.index_copy_(0, places, some)),
    }
