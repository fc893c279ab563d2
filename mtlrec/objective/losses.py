"""Losses of single tasks, element by element.

B batch rows, K negatives a row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional


def binary(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy with logits: -[y log s(x) + (1 - y) log(1 - s(x))]. [B], [B] -> [B]."""
    return functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")


def regression(values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Squared error (x - y)^2, so that the task's loss is the mean squared error. [B], [B] -> [B]."""
    return (values - labels).square()


def pairwise(scores: torch.Tensor, negatives: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """BPR (Rendle et al. 2009, eq. 4): the mean over a row's negatives j of -log s(x_i - x_j).

    scores [B], of the row's own item; negatives [B, K], of the items drawn for it, of which those count that
    are `there`, bool [B, K]. -> [B]; 0 for a row without any.
    """
    each = functional.softplus(negatives - scores[:, None])
    mask = there.to(each.dtype)
    return (each * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1.0)


LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "binary": binary,
    "regression": regression,
}
"""Kind of a task whose loss is that of its rows one by one -> loss."""
