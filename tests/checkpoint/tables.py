"""Tables without a model: reference values, cut into blocks as any plan would, and a manifest's meta."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from mtlrec.checkpoint.manifest import Manifest
from mtlrec.checkpoint.parts import merge, write_part
from mtlrec.checkpoint.tensors import TableBlock
from mtlrec.data.vocabulary import Vocabulary
from mtlrec.distributed import World

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


@dataclass
class FakeTable:
    """All of one table: weights [rows, dim]; state by name, [rows] or [rows, dim]."""

    name: str
    weights: torch.Tensor
    state: dict[str, torch.Tensor]


def random_bits(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Any bit pattern: NaNs of every kind, denormals, infinities, minus zero."""
    generator = torch.Generator().manual_seed(seed)
    size = int(torch.Size(shape).numel()) * dtype.itemsize
    return (
        torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
        .view(dtype)
        .reshape(tuple(shape))
    )


def make_table(name: str, rows: int, dim: int, state: str = "row", seed: int = 0) -> FakeTable:
    """state: "row", "element" or "none"."""
    shapes = {
        "row": {"sum": [rows]},
        "element": {"exp_avg": [rows, dim], "exp_avg_sq": [rows, dim]},
        "none": {},
    }
    states = {key: random_bits(shape, seed + 7 + i) for i, (key, shape) in enumerate(shapes[state].items())}
    return FakeTable(name, random_bits([rows, dim], seed), states)


def blank(table: FakeTable) -> FakeTable:
    """A table of the same shape that holds none of the values."""
    states = {key: torch.full_like(value, 0.25) for key, value in table.state.items()}
    return FakeTable(table.name, torch.full_like(table.weights, 0.25), states)


def cut(
    table: FakeTable, rows: Sequence[int] = (), columns: Sequence[int] = (), replicated: bool = False
) -> list[TableBlock]:
    """Blocks (views) between the given inner row and column borders, row by row."""
    num_rows, dim = table.weights.shape
    found = []
    for top, bottom in pairwise([0, *rows, num_rows]):
        for left, right in pairwise([0, *columns, dim]):
            state = {
                key: value[top:bottom] if value.dim() == 1 else value[top:bottom, left:right]
                for key, value in table.state.items()
            }
            weights = table.weights[top:bottom, left:right]
            found.append(
                TableBlock(table.name, top, bottom - top, left, right - left, weights, state, replicated)
            )
    return found


def meta_of(tables: Sequence[FakeTable], **changes: Any) -> dict[str, Any]:
    """`meta` as a run would write it, reduced to what the format asks for."""
    listed = [{"name": t.name, "rows": t.weights.shape[0], "dim": t.weights.shape[1]} for t in tables]
    return {
        "job": {"name": "fake", "run": {"workers": 2}},
        "schema": {"tables": listed},
        "schema_fingerprint": "f" * 32,
        "data": {"fingerprint": "d" * 32, "index": {}},
        "step": 12,
        "position": {"generation": 0, "epoch": 1, "done": [3, 4]},
        "metrics": None,
        "attempt": 1,
        **changes,
    }


def save_ranks(
    url: str,
    ranks: Sequence[Sequence[TableBlock]],
    tables: Sequence[FakeTable],
    dense: dict[str, torch.Tensor] | None = None,
    vocabularies: dict[str, Vocabulary] | None = None,
    **changes: Any,
) -> Manifest:
    """Save as so many ranks would, one after the other in this process."""
    for rank, blocks in enumerate(ranks):
        write_part(
            url, blocks, (dense or {}) if rank == 0 else None, rank, vocabularies if rank == 0 else None
        )
    meta = {**meta_of(tables, **changes), "saved_at": "2024-05-06T07:08:09+00:00", "mtlrec_version": "0.1.0"}
    return merge(url, meta, len(ranks))


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal to the bit, NaNs included."""
    flat = [each.contiguous().reshape(-1).view(torch.uint8) for each in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*flat)


def tensors(table: FakeTable) -> Iterator[tuple[str, torch.Tensor]]:
    yield "weights", table.weights
    yield from table.state.items()


def assert_same(one: FakeTable, other: FakeTable) -> None:
    assert [name for name, _ in tensors(one)] == [name for name, _ in tensors(other)]
    for (name, value), (_, expected) in zip(tensors(one), tensors(other), strict=True):
        assert same_bits(value, expected), f"{name} of {one.name} differs"
