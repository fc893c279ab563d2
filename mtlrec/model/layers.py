"""Layers of the dense part.

B batch rows, N parallel copies (experts or tasks).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from mtlrec.model.starting import dense_parameter


class Linear(nn.Module):
    """x [B, inputs] -> [B, outputs]; starts uniform in +-1/sqrt(inputs), weight and bias alike."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.fan_in = inputs
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class BatchedLinear(nn.Module):
    """N linear maps as one product: x [N, B, inputs] -> [N, B, outputs]. Starts as `Linear` does."""

    def __init__(self, copies: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.fan_in = inputs
        self.weight = nn.Parameter(torch.empty(copies, inputs, outputs))
        self.bias = nn.Parameter(torch.empty(copies, 1, outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class MLP(nn.Module):
    """x [B, inputs] -> [B, hidden[-1]]: linear maps, each followed by ReLU."""

    def __init__(self, inputs: int, hidden: Sequence[int]) -> None:
        super().__init__()
        widths = [inputs, *hidden]
        self.layers = nn.ModuleList(Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).relu_()
        return x


def initialise_dense(module: nn.Module, seed: int) -> None:
    """Give every parameter below `module` the starting value of (seed, its full name), in place.

    A layer with `fan_in` starts uniform in +-1/sqrt(fan_in); any other parameter must be its owner's to fill,
    and is left as its constructor made it.
    """
    for path, owner in module.named_modules():
        fan_in = getattr(owner, "fan_in", None)
        if fan_in is None:
            continue
        for name, parameter in owner.named_parameters(recurse=False):
            start = dense_parameter(seed, f"{path}.{name}", tuple(parameter.shape), fan_in**-0.5)
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(start))
