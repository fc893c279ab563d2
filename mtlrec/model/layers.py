"""Layers of the dense part.

B batch rows, N parallel copies (experts or tasks).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from mtlrec.model.dropout import Activation, Dropout
from mtlrec.model.starting import dense_parameter


class Linear(nn.Module):
    """x [B, inputs] -> [B, outputs]; starts uniform in +-1/sqrt(inputs), weight and bias alike.

    With `dropout` it is a hidden layer: ReLU follows, and that dropout.
    """

    def __init__(self, inputs: int, outputs: int, dropout: Dropout | None = None, bias: bool = True) -> None:
        super().__init__()
        self.fan_in = inputs
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.activation = None if dropout is None else Activation(dropout, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.linear(x, self.weight, self.bias)
        return y if self.activation is None else self.activation(y)


class BatchedLinear(nn.Module):
    """N linear maps as one product: x [N, B, inputs] -> [N, B, outputs]. Else as `Linear`."""

    def __init__(
        self, copies: int, inputs: int, outputs: int, dropout: Dropout | None = None, bias: bool = True
    ) -> None:
        super().__init__()
        self.fan_in = inputs
        self.weight = nn.Parameter(torch.empty(copies, inputs, outputs))
        self.bias = nn.Parameter(torch.empty(copies, 1, outputs)) if bias else None
        self.activation = None if dropout is None else Activation(dropout, outputs, copies)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.bmm(x, self.weight) if self.bias is None else torch.baddbmm(self.bias, x, self.weight)
        return y if self.activation is None else self.activation(y)


class MLP(nn.Module):
    """x [B, inputs] -> [B, hidden[-1]]: hidden layers, one after the other."""

    def __init__(self, inputs: int, hidden: Sequence[int], dropout: Dropout) -> None:
        super().__init__()
        widths = [inputs, *hidden]
        self.layers = nn.ModuleList(Linear(a, b, dropout) for a, b in pairwise(widths))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
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
