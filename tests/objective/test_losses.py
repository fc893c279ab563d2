from __future__ import annotations

import math

import pytest
import torch

from mtlrec.objective.losses import binary, regression


@pytest.mark.parametrize(("logit", "label"), [(0.0, 1.0), (2.5, 1.0), (2.5, 0.0), (-7.0, 1.0)])
def test_binary_is_the_cross_entropy(logit: float, label: float) -> None:
    x = torch.tensor([logit], requires_grad=True)
    loss = binary(x, torch.tensor([label]))
    chance = 1 / (1 + math.exp(-logit))
    expected = -(label * math.log(chance) + (1 - label) * math.log(1 - chance))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.sum().backward()
    assert x.grad is not None
    assert x.grad.item() == pytest.approx(chance - label, rel=1e-5)


def test_binary_stays_finite_far_out() -> None:
    x = torch.tensor([200.0, -200.0], requires_grad=True)
    loss = binary(x, torch.tensor([0.0, 1.0]))
    assert loss.tolist() == [200.0, 200.0]
    loss.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [1.0, -1.0]


def test_regression_is_the_squared_error() -> None:
    x = torch.tensor([3.0, -1.0], requires_grad=True)
    loss = regression(x, torch.tensor([1.0, -1.0]))
    assert loss.tolist() == [4.0, 0.0]
    loss.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [4.0, 0.0]
