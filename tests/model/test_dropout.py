"""Dropout is the function that docs/model.md states, and as good as chance.

M rows, U units.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mtlrec.batch import Batch
from mtlrec.data.order import Position
from mtlrec.model.dropout import Activation, Dropout
from mtlrec.model.model import build_model
from tests.model.example import cut, example_job, example_schema, global_rows
from tests.model.test_model import CPU, with_tables

WORD = 2**64 - 1
GAMMA = 0x9E3779B97F4A7C15


def batch_of(rows: Any, step: int = 0, per_positive: int = 0) -> Batch:
    """As much of a batch as dropout looks at."""
    rows = torch.from_numpy(np.array(rows, dtype=np.int64))
    num_rows = len(rows)
    none = torch.zeros(num_rows, 0)
    return Batch(
        KeyedJaggedTensor(keys=[], values=none, lengths=none),
        torch.zeros(num_rows * (1 + per_positive), 1),
        none,
        none.bool(),
        torch.zeros(num_rows * (1 + per_positive), dtype=torch.int64),
        rows,
        num_rows,
        Position.start(1),
        step=step,
        negatives=torch.ones(num_rows, per_positive, dtype=torch.bool) if per_positive else None,
    )


def kept(
    batch: Batch,
    rate: float = 0.5,
    *,
    seed: int = 7,
    units: int = 256,
    copies: int = 0,
    name: str = "layer",
) -> np.ndarray:
    """bool [M, U], or [copies, M, U]: what a layer called `name` keeps of ones."""
    dropout = Dropout(rate, seed)
    model = nn.ModuleDict({name: Activation(dropout, units, copies)})
    dropout.name_layers(model)
    dropout.begin(batch)
    shape = (len(batch.dense), units)
    y = model[name](torch.ones(copies, *shape) if copies else torch.ones(shape))
    assert set(y.unique().tolist()) <= {0.0, np.float32(dropout.scale)}
    keeps: np.ndarray = y.numpy() > 0
    return keeps


def mix(word: int) -> int:
    word &= WORD
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & WORD
    return word ^ (word >> 31)


def plainly(
    rate: float, seed: int, step: int, row: int, negative: int | None, name: str, copies: int, units: int
) -> list[list[bool]]:
    """What docs/model.md says, one unit at a time; `negative` None: the batch has none."""
    key = mix(row * GAMMA + mix(mix(seed) + step * GAMMA))
    if negative is not None:
        key = mix(key + negative * GAMMA)
    start = int.from_bytes(hashlib.blake2b(f"dropout|{name}".encode(), digest_size=8).digest(), "little")
    words = -(-units // 4)
    found = []
    for copy in range(copies):
        bits = [mix(key ^ mix((copy * words + u // 4) * GAMMA + start)) >> 16 * (u % 4) for u in range(units)]
        signed = [(each & 0xFFFF) - (0x10000 if each & 0x8000 else 0) for each in bits]
        found.append([each >= round(rate * 65536) - 32768 for each in signed])
    return found


@given(
    seed=st.integers(0, 2**63 - 1),
    step=st.integers(0, 10**6),
    rows=st.lists(st.integers(-1, 2**40), min_size=1, max_size=4),
    per_positive=st.integers(0, 3),
    copies=st.integers(0, 3),
    units=st.integers(1, 9),
    rate=st.floats(0.01, 0.99),
)
def test_the_function_that_is_written_down(
    seed: int, step: int, rows: list[int], per_positive: int, copies: int, units: int, rate: float
) -> None:
    found = kept(batch_of(rows, step, per_positive), rate, seed=seed, units=units, copies=copies)
    found = found if copies else found[None]
    places = [(row, 0) for row in rows] + [(row, k) for row in rows for k in range(1, per_positive + 1)]
    for place, (row, k) in enumerate(places):
        negative = k if per_positive else None
        expected = plainly(rate, seed, step, row, negative, "layer", max(copies, 1), units)
        assert found[:, place].tolist() == expected


def test_a_row_is_dropped_alike_whoever_has_it() -> None:
    rows = np.arange(96)
    whole = kept(batch_of(rows, step=3, per_positive=2))
    mine = rows[40:64][::-1]
    part = kept(batch_of(mine, step=3, per_positive=2))
    np.testing.assert_array_equal(part[:24], whole[mine])
    np.testing.assert_array_equal(part[24:].reshape(24, 2, -1), whole[96:].reshape(96, 2, -1)[mine])


def agreement(one: np.ndarray, other: np.ndarray, rate: float) -> float:
    """How far two masks are from independent, in standard deviations of their correlation."""
    correlation = ((one - (1 - rate)) * (other - (1 - rate))).mean() / (rate * (1 - rate))
    return abs(float(correlation)) * one.size**0.5


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.75])
def test_units_are_dropped_at_the_rate_and_independently(rate: float) -> None:
    rows, units = 2048, 512
    base = kept(batch_of(np.arange(rows)), rate, units=units)
    others = {
        "step": kept(batch_of(np.arange(rows), step=1), rate, units=units),
        "rows": kept(batch_of(np.arange(rows) + rows), rate, units=units),
        "layer": kept(batch_of(np.arange(rows)), rate, units=units, name="layer2"),
        "seed": kept(batch_of(np.arange(rows)), rate, units=units, seed=8),
    }
    with_negatives = kept(batch_of(np.arange(rows), per_positive=2), rate, units=units)
    negatives = with_negatives[rows:].reshape(rows, 2, units)
    others |= {"negative 1": negatives[:, 0], "negative 2": negatives[:, 1], "itself": with_negatives[:rows]}
    copies = kept(batch_of(np.arange(rows)), rate, units=units, copies=2)
    others["copy"] = copies[1]
    np.testing.assert_array_equal(copies[0], base)
    for name, mask in {"base": base, **others}.items():
        deviation = (rate * (1 - rate) / mask.size) ** 0.5
        assert abs(mask.mean() - (1 - rate)) < 4 * deviation, name
        # Chi-square of the counts of each unit, and of each row: mean df, deviation sqrt(2 df).
        for axis in (0, 1):
            count, length = mask.sum(axis=axis), mask.shape[axis]
            chi = ((count - length * (1 - rate)) ** 2 / (length * rate * (1 - rate))).sum()
            freedom = len(count)
            assert abs(chi - freedom) < 4 * (2 * freedom) ** 0.5, (name, axis)
    for name, mask in others.items():
        assert agreement(base, mask, rate) < 4, name
    for shift in (1, 2, 3, 4, 8, 64, 128):
        assert agreement(base[:, shift:], base[:, :-shift], rate) < 4, f"units {shift} apart"
        assert agreement(base[shift:], base[:-shift], rate) < 4, f"rows {shift} apart"
    # Four at a time: what is a function of others shows only here.
    corners = (base[:-1, :-1] ^ base[1:, :-1] ^ base[:-1, 1:] ^ base[1:, 1:]).mean()
    expected = 0.5 * (1 - (2 * rate - 1) ** 4)
    assert abs(corners - expected) < 5 * (expected * (1 - expected) / base.size) ** 0.5


def test_patterns_of_neighbouring_units_are_uniform() -> None:
    """Bytes of eight units: chi-square over the 256 patterns, down the rows and across them."""
    base = kept(batch_of(np.arange(4096)), 0.5, units=256)
    for mask in (base, base.T):
        patterns = np.bincount(np.packbits(mask, axis=1).ravel(), minlength=256)
        mean = mask.size / 8 / 256
        chi = ((patterns - mean) ** 2 / mean).sum()
        assert abs(chi - 255) < 4 * (2 * 255) ** 0.5


def test_values_and_gradients() -> None:
    dropout = Dropout(0.25, 1)
    model = nn.ModuleDict({"layer": Activation(dropout, 10)})
    dropout.name_layers(model)
    dropout.begin(batch_of(range(6)))
    assert dropout.scale == 1 / 0.75
    x = torch.randn(6, 10, generator=torch.Generator().manual_seed(0), requires_grad=True)
    mask = torch.from_numpy(kept(batch_of(range(6)), 0.25, seed=1, units=10)).float() / 0.75
    assert 0 < (mask == 0).sum() < 60
    y, expected = model["layer"](x * 1.0), torch.relu(x) * mask
    torch.testing.assert_close(y, expected)
    slope = torch.randn(6, 10, generator=torch.Generator().manual_seed(1))
    (one,) = torch.autograd.grad((y * slope).sum(), [x])
    (other,) = torch.autograd.grad((expected * slope).sum(), [x])
    torch.testing.assert_close(one, other)
    model.eval()
    assert torch.equal(model["layer"](x * 1.0), torch.relu(x))


@pytest.mark.parametrize(
    "backbone",
    [
        {"kind": "shared_bottom", "hidden": [12, 10]},
        {"kind": "mmoe", "experts": 3, "hidden": [12, 10]},
        {"kind": "ple", "levels": 2, "hidden": [12, 10]},
        {"kind": "factorization", "factors": ["flag", "user"], "hidden": [12, 10]},
    ],
)
def test_every_hidden_layer_drops_while_training_alone(backbone: dict[str, Any]) -> None:
    job, plain = (example_job(model={"dim": 8, "backbone": backbone, "dropout": rate}) for rate in (0.5, 0.0))
    schema = example_schema(job)
    model, without = (with_tables(build_model(each, schema, CPU)) for each in (job, plain))
    batch = cut(global_rows(schema, 96, 1), schema, 0, 1)
    names = {path for path, module in model.named_modules() if isinstance(module, Activation)}
    # A linear layer without an activation ends a tower, a gate or the factorization.
    hidden = {
        path
        for path, module in model.named_modules()
        if hasattr(module, "fan_in") and not path.endswith("last") and "gates" not in path
    }
    assert names == {f"{path}.activation" for path in hidden}
    keys = [module.unit_keys for module in model.modules() if isinstance(module, Activation)]
    assert all(key is not None for key in keys)
    flat = torch.cat([key.flatten() for key in keys if key is not None])
    assert len(flat.unique()) == len(flat)
    trained, again = model(batch), model(batch)
    assert torch.equal(trained, again)
    assert not torch.equal(trained, model(replace(batch, step=1)))
    model.eval()
    without_any = without(batch)
    assert torch.equal(model(batch), without_any)
    assert not torch.equal(trained, without_any)
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in without.named_parameters()}


def test_mixed_precision() -> None:
    job = example_job(model={"dim": 8, "dropout": 0.5})
    schema = example_schema(job)
    model = with_tables(build_model(job, schema, CPU))
    batch = cut(global_rows(schema, 96, 1), schema, 0, 1)
    exact = model(batch)
    model.mixed = True
    mixed = model(batch)
    torch.testing.assert_close(mixed, exact, atol=0.05, rtol=0.05)
    mixed.sum().backward()
    for name, parameter in model.backbone.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name
