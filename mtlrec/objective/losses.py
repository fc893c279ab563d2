"""Losses of single tasks, element by element.

B batch rows.
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


LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "binary": binary,
    "regression": regression,
}
"""Task kind -> loss."""
