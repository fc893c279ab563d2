"""Weights, normalisation, smoothing, negatives, uncertainty and L2, each against its formula in loops."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mtlrec.batch import Batch
from mtlrec.data.order import Position
from mtlrec.objective.objective import Objective
from mtlrec.schema import Schema, Task

TASKS = (
    Task("click", "binary", "click", 1.0, label_smoothing=0.1),
    Task("buy", "binary", "buy", 0.5, normalise="batch"),
    Task("rating", "regression", "rating", 0.2, mean=3.0, std=2.0),
    Task("rank", "pairwise", "rank", 0.7),
)
BATCH_SIZE, NEGATIVES, EMBEDDING = 16, 3, 4


def schema_of(tasks: tuple[Task, ...] = TASKS) -> Schema:
    return Schema((), (), (), tasks, ("all",), None, None, None)


def batch_of(rows: int, present: int, seed: int, weighted: bool = True, drawn: bool = True) -> Batch:
    """Random rows, the last of them padding."""
    random = np.random.default_rng(seed)
    here = np.arange(rows) < present
    labels = np.zeros((rows, 4), np.float32)
    labels[:, [0, 1, 3]] = random.random((rows, 3)) < 0.5
    labels[:, 2] = random.normal(3, 2, rows)
    there = (random.random((rows, NEGATIVES)) < 0.8) & (labels[:, 3:] > 0.5) & here[:, None]
    return Batch(
        ids=KeyedJaggedTensor.empty(),
        dense=torch.zeros(0, 0),
        labels=torch.from_numpy(labels),
        valid=torch.from_numpy((random.random((rows, 4)) < 0.7) & here[:, None]),
        scenario=torch.zeros(rows, dtype=torch.int64),
        rows=torch.arange(rows),
        num_rows=present,
        position=Position.start(1),
        weight=torch.from_numpy((random.random(rows) * 2 * here).astype(np.float32)) if weighted else None,
        negatives=torch.from_numpy(there) if drawn else None,
    )


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def by_hand(batch: Batch, outputs: np.ndarray, tasks: tuple[Task, ...], sampled: str) -> list[list[float]]:
    """By task, in loops: weighted sum of losses, weight of what trains it, weight of all rows."""
    rows = len(batch.valid)
    weight = (
        batch.weight.numpy()
        if batch.weight is not None
        else np.ones(rows) * (np.arange(rows) < batch.num_rows)
    )
    assert batch.negatives is not None
    found = []
    for t, task in enumerate(tasks):
        total = trained = 0.0
        for row in range(rows):
            y, x, w = float(batch.labels[row, t]), float(outputs[row, t]), float(weight[row])
            negatives = [
                float(outputs[rows + row * NEGATIVES + k, t])
                for k in range(NEGATIVES)
                if batch.negatives[row, k]
            ]
            if task.name == sampled and task.kind == "binary":
                low = task.label_smoothing / 2
                total += sum(w * (softplus(z) - low * z) for z in negatives)
                trained += w * len(negatives)
            if not batch.valid[row, t]:
                continue
            if task.kind == "pairwise":
                if y and negatives:
                    total += w * sum(softplus(z - x) for z in negatives) / len(negatives)
                    trained += w
                continue
            if task.kind == "binary":
                y = y * (1 - task.label_smoothing) + task.label_smoothing / 2
                total += w * (softplus(x) - y * x)
            else:
                total += w * (x - (y - task.mean) / task.std) ** 2
            trained += w
        found.append([total, trained, float(weight.sum())])
    return found


def expected_loss(
    parts: list[list[float]], present: int, log_variance: list[float] | None, tasks: tuple[Task, ...] = TASKS
) -> float:
    total = 0.0
    for t, (task, (loss, trained, everything)) in enumerate(zip(tasks, parts, strict=True)):
        if not trained:
            continue
        mean = loss / (everything if task.normalise == "batch" else trained)
        if log_variance is not None:
            half = 0.5 if task.kind == "regression" else 1.0
            mean = half * math.exp(-log_variance[t]) * mean + log_variance[t] / 2
        total += task.weight * mean
    return total * present / BATCH_SIZE


def outputs_of(batch: Batch, seed: int) -> torch.Tensor:
    rows = len(batch.valid) * (1 + batch.per_positive)
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@settings(deadline=None, max_examples=25)
@given(
    present=st.integers(1, BATCH_SIZE),
    seed=st.integers(0, 10**6),
    weighted=st.booleans(),
    uncertain=st.booleans(),
    sampled=st.sampled_from(["rank", "click", "buy"]),
)
def test_the_loss_is_its_formula(
    present: int, seed: int, weighted: bool, uncertain: bool, sampled: str
) -> None:
    batch = batch_of(BATCH_SIZE, present, seed, weighted)
    options: dict[str, Any] = {"batch_size": BATCH_SIZE, "sampled": sampled}
    objective = Objective(schema_of(), balance="uncertainty" if uncertain else "weights", **options)
    log_variance = None
    if objective.log_variance is not None:
        log_variance = [0.3, -1.2, 2.0, 0.1]
        with torch.no_grad():
            objective.log_variance.copy_(torch.tensor(log_variance))
    outputs = outputs_of(batch, seed)
    parts = by_hand(batch, outputs.detach().numpy(), TASKS, sampled)
    amounts = objective.amounts(batch)
    np.testing.assert_allclose(amounts[:-2].numpy(), [part[1] for part in parts], rtol=1e-6, atol=1e-12)
    loss, sums = objective.loss(outputs, batch, amounts.float(), 1)
    np.testing.assert_allclose(sums.detach().numpy(), [part[0] for part in parts], rtol=1e-4, atol=1e-5)
    assert loss.item() == pytest.approx(expected_loss(parts, present, log_variance), rel=1e-4, abs=1e-5)
    loss.backward()
    assert outputs.grad is not None and torch.isfinite(outputs.grad).all()
    assert not outputs.grad[present:BATCH_SIZE].any(), "padding has no gradient"


def test_the_gradient_of_log_variance_is_its_formula() -> None:
    batch = batch_of(BATCH_SIZE, BATCH_SIZE, 4)
    objective = Objective(schema_of(), balance="uncertainty", batch_size=BATCH_SIZE, sampled="rank")
    assert objective.log_variance is not None
    outputs = outputs_of(batch, 1)
    amounts = objective.amounts(batch).float()
    loss, sums = objective.loss(outputs, batch, amounts, 1)
    loss.backward()
    divisors = [amounts[-2] if task.normalise == "batch" else amounts[t] for t, task in enumerate(TASKS)]
    slope = [
        task.weight
        * (0.5 - (0.5 if task.kind == "regression" else 1.0) * float(sums[t].detach() / divisors[t]))
        for t, task in enumerate(TASKS)
    ]
    assert objective.log_variance.grad is not None
    np.testing.assert_allclose(objective.log_variance.grad.numpy(), slope, rtol=1e-5)


def test_a_task_that_nothing_trains_leaves_even_its_variance_alone() -> None:
    batch = batch_of(BATCH_SIZE, BATCH_SIZE, 5)
    batch.valid[:, 1:] = False
    objective = Objective(schema_of(), balance="uncertainty", batch_size=BATCH_SIZE, sampled="rank")
    assert objective.log_variance is not None
    with torch.no_grad():
        objective.log_variance.fill_(0.8)
    outputs = outputs_of(batch, 1)
    loss, _ = objective.loss(outputs, batch, objective.amounts(batch).float(), 1)
    loss.backward()
    assert objective.log_variance.grad is not None and outputs.grad is not None
    assert objective.log_variance.grad[0] != 0 and not objective.log_variance.grad[1:].any()
    assert not outputs.grad[:, 1:].any()
    parts = by_hand(batch, outputs.detach().numpy(), TASKS, "rank")
    assert loss.item() == pytest.approx(expected_loss(parts, BATCH_SIZE, [0.8] * 4), rel=1e-5)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_uncertainty_is_stable_for_losses_of_any_size(scale: float) -> None:
    tasks = (replace(TASKS[2], std=1.0, mean=0.0, weight=1.0),)
    objective = Objective(schema_of(tasks), balance="uncertainty")
    assert objective.log_variance is not None
    batch = batch_of(8, 8, 1, weighted=False, drawn=False)
    labels = torch.full((8, 1), math.sqrt(scale))
    batch = replace(batch, labels=labels, valid=torch.ones(8, 1, dtype=torch.bool))
    optimizer = torch.optim.SGD(objective.parameters(), lr=1.0)
    with torch.no_grad():
        objective.log_variance.fill_(math.log(scale) + 0.5)
    for _ in range(200):
        optimizer.zero_grad()
        loss, _ = objective.loss(torch.zeros(8, 1), batch, objective.amounts(batch).float(), 1)
        loss.backward()
        optimizer.step()
    # The minimum of exp(-s) L / 2 + s / 2 is at s = log L.
    assert objective.log_variance.item() == pytest.approx(math.log(scale), abs=1e-3)


@pytest.mark.parametrize("balance", ["weights", "uncertainty"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_workers_average_to_what_one_computes(world_size: int, balance: Any) -> None:
    whole = batch_of(BATCH_SIZE, BATCH_SIZE - 3, 8)
    objective = Objective(
        schema_of(), balance=balance, batch_size=BATCH_SIZE, sampled="rank", embedding_l2=0.3
    )
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(BATCH_SIZE * (1 + NEGATIVES), EMBEDDING, generator=generator)
    weight = torch.randn(EMBEDDING, 4, generator=generator).requires_grad_()
    learnt = [weight, *objective.parameters()]
    amounts = objective.amounts(whole)
    one, _ = objective.loss(features @ weight, whole, amounts.float(), 1, features * weight[:, 0])
    expected = torch.autograd.grad(one, learnt)
    losses, gradients, shares = [], [], []
    each = BATCH_SIZE // world_size
    for rank in range(world_size):
        mine = slice(rank * each, (rank + 1) * each)
        assert whole.weight is not None and whole.negatives is not None
        part = replace(
            whole,
            labels=whole.labels[mine],
            valid=whole.valid[mine],
            weight=whole.weight[mine],
            negatives=whole.negatives[mine],
            num_rows=min(max(BATCH_SIZE - 3 - rank * each, 0), each),
        )
        shares.append(objective.amounts(part))
        drawn = features[BATCH_SIZE:].view(BATCH_SIZE, NEGATIVES, EMBEDDING)[mine].flatten(0, 1)
        x = torch.cat([features[mine], drawn])
        loss, _ = objective.loss(x @ weight, part, amounts.float(), world_size, x * weight[:, 0])
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, learnt))
    torch.testing.assert_close(torch.stack(shares).sum(dim=0), amounts)
    assert np.mean(losses) == pytest.approx(one.item(), rel=1e-6)
    for found, wanted in zip(zip(*gradients, strict=True), expected, strict=True):
        torch.testing.assert_close(torch.stack(found).mean(dim=0), wanted, rtol=1e-5, atol=1e-7)


def test_l2_is_the_mean_square_of_what_rows_look_up() -> None:
    batch = batch_of(BATCH_SIZE, 10, 2)
    plain = Objective(schema_of(), batch_size=BATCH_SIZE, sampled="rank")
    penal = Objective(schema_of(), batch_size=BATCH_SIZE, sampled="rank", embedding_l2=0.25)
    outputs = outputs_of(batch, 2)
    embeddings = torch.randn(len(outputs), 5).requires_grad_()
    amounts = plain.amounts(batch).float()
    without, _ = plain.loss(outputs, batch, amounts, 1)
    loss, _ = penal.loss(outputs, batch, amounts, 1, embeddings)
    square = float(embeddings.detach().double().square().sum())
    assert loss.item() - without.item() == pytest.approx(0.25 * square / BATCH_SIZE, rel=1e-4)
    loss.backward()
    assert embeddings.grad is not None
    torch.testing.assert_close(embeddings.grad, embeddings.detach() * (2 * 0.25 / BATCH_SIZE))


def test_doubling_every_sample_weight_changes_nothing() -> None:
    batch = batch_of(BATCH_SIZE, BATCH_SIZE, 9)
    assert batch.weight is not None
    twice = replace(batch, weight=batch.weight * 2)
    objective = Objective(schema_of(), batch_size=BATCH_SIZE, sampled="click")
    outputs = outputs_of(batch, 9)
    one, _ = objective.loss(outputs, batch, objective.amounts(batch).float(), 1)
    two, _ = objective.loss(outputs, twice, objective.amounts(twice).float(), 1)
    assert one.item() == pytest.approx(two.item(), rel=1e-6)
