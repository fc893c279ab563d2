from __future__ import annotations

from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch

from mtlrec.batch import Batch
from mtlrec.objective.losses import LOSSES
from mtlrec.objective.objective import Objective
from mtlrec.schema import Task
from tests.model.example import Rows, counts, cut, example_job, example_schema, global_rows

SCHEMA = example_schema(example_job())


def data(seed: int = 0) -> tuple[Rows, Batch]:
    rows = global_rows(SCHEMA, 96, seed, 5)
    return rows, cut(rows, SCHEMA, 0, 1)


def outputs_for(batch: Batch) -> torch.Tensor:
    return torch.randn(batch.labels.shape, generator=torch.Generator().manual_seed(1)).requires_grad_()


def test_kinds_of_the_schema_have_a_loss() -> None:
    assert {*LOSSES, "pairwise"} == set(get_args(get_type_hints(Task)["kind"]))


def test_closed_form() -> None:
    """Weighted sum over tasks of the mean over valid labels, and its gradient."""
    rows, batch = data()
    outputs = outputs_for(batch)
    loss, sums = Objective(SCHEMA).loss(outputs, batch, counts(rows), 1)
    loss.backward()
    x, labels, valid = outputs.detach().double().numpy(), batch.labels.double().numpy(), batch.valid.numpy()
    chance = 1 / (1 + np.exp(-x))
    each = [-(labels * np.log(chance) + (1 - labels) * np.log(1 - chance)), (x - labels) ** 2]
    slope = [chance - labels, 2 * (x - labels)]
    expected, gradient = 0.0, np.zeros_like(x)
    for index, task in enumerate(SCHEMA.tasks):
        kind = 0 if task.kind == "binary" else 1
        here, count = valid[:, index], valid[:, index].sum()
        assert sums[index].item() == pytest.approx(each[kind][here, index].sum(), rel=1e-5)
        expected += task.weight * each[kind][here, index].mean()
        gradient[here, index] = task.weight * slope[kind][here, index] / count
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert outputs.grad is not None
    np.testing.assert_allclose(outputs.grad.numpy(), gradient, rtol=1e-5, atol=1e-9)
    assert not outputs.grad[~batch.valid].any()


def test_a_task_without_a_valid_label_adds_exactly_nothing() -> None:
    rows, batch = data()
    full = outputs_for(batch)
    rows.valid[:, 1], batch.valid[:, 1] = False, False
    outputs = full.detach().clone().requires_grad_()
    loss, sums = Objective(SCHEMA).loss(outputs, batch, counts(rows), 1)
    loss.backward()
    assert counts(rows)[1] == 0 and sums[1].item() == 0.0
    assert outputs.grad is not None
    assert not outputs.grad[:, 1].any()
    others = torch.cat([full[:, :1], torch.full_like(full[:, 1:2], 1e9), full[:, 2:]], dim=1)
    moved, _ = Objective(SCHEMA).loss(others, batch, counts(rows), 1)
    assert moved.item() == loss.item()


def test_a_batch_without_any_label_is_zero_with_zero_gradient() -> None:
    rows, batch = data()
    rows.valid[:], batch.valid[:] = False, False
    outputs = outputs_for(batch)
    loss, _ = Objective(SCHEMA).loss(outputs, batch, counts(rows), 2)
    loss.backward()
    assert loss.item() == 0.0
    assert outputs.grad is not None and not outputs.grad.any()


@pytest.mark.parametrize("absent", [float("nan"), float("inf"), 1e38])
def test_what_stands_in_an_absent_label_reaches_nothing(absent: float) -> None:
    rows, batch = data()
    expected_outputs, outputs = outputs_for(batch), outputs_for(batch)
    expected, _ = Objective(SCHEMA).loss(expected_outputs, batch, counts(rows), 1)
    expected.backward()
    batch.labels[~batch.valid] = absent
    loss, _ = Objective(SCHEMA).loss(outputs, batch, counts(rows), 1)
    loss.backward()
    assert loss.item() == expected.item()
    assert outputs.grad is not None and expected_outputs.grad is not None
    assert torch.equal(outputs.grad, expected_outputs.grad)


@pytest.mark.parametrize("world_size", [2, 3])
def test_workers_average_to_what_one_computes(world_size: int) -> None:
    """Workers have other rows and other masks: their losses and gradients average to the whole batch's."""
    rows, whole = data()
    weight = torch.randn(SCHEMA.dense_width, 3, generator=torch.Generator().manual_seed(2)).requires_grad_()
    one, sums = Objective(SCHEMA).loss(whole.dense @ weight, whole, counts(rows), 1)
    (expected,) = torch.autograd.grad(one, weight)
    losses, gradients, parts = [], [], []
    for rank in range(world_size):
        batch = cut(rows, SCHEMA, rank, world_size)
        loss, part = Objective(SCHEMA).loss(batch.dense @ weight, batch, counts(rows), world_size)
        losses.append(loss.item())
        parts.append(part)
        gradients.append(torch.autograd.grad(loss, weight)[0])
    assert len({len(cut(rows, SCHEMA, rank, world_size).rows) for rank in range(world_size)}) == 1
    assert np.mean(losses) == pytest.approx(one.item(), rel=1e-6)
    torch.testing.assert_close(torch.stack(gradients).mean(dim=0), expected)
    torch.testing.assert_close(torch.stack(parts).sum(dim=0), sums)


def test_weights_scale_their_task() -> None:
    rows, batch = data()
    outputs = outputs_for(batch)
    loss, sums = Objective(SCHEMA).loss(outputs, batch, counts(rows), 1)
    means = sums / counts(rows)[:-2]
    assert [task.weight for task in SCHEMA.tasks] == [1.0, 0.5, 0.2]
    assert loss.item() == pytest.approx((means[0] + 0.5 * means[1] + 0.2 * means[2]).item(), rel=1e-6)
