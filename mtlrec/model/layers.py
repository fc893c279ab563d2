"""Layers of the dense part.

B batch rows, N parallel copies (experts or tasks), I trunk input width, W the width it is padded to.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from mtlrec.model.dropout import Activation, Dropout
from mtlrec.model.starting import dense_parameter

_ALIGNMENT = 8
"""Rows of a padded trunk input are a multiple of so many numbers: products of other widths take 1.2 to 1.5
times as long on the CPU, and half precision on CUDA wants it for its fast kernels."""


def pad_trunk(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Parts of the trunk's input, [B, I] side by side -> [B, W]: behind them ones, then zeros.

    The column of ones makes a bias one more column of its layer's weight: see `Linear`.
    """
    width = sum(part.shape[1] for part in parts)
    padding = parts[0].new_zeros(len(parts[0]), _ALIGNMENT - width % _ALIGNMENT)
    padding[:, 0] = 1.0
    return torch.cat([*parts, padding], dim=1)


class Linear(nn.Module):
    """x [B, inputs] -> [B, outputs]; starts uniform in +-1/sqrt(inputs), weight and bias alike.

    An x that is wider was padded by `pad_trunk`. With `dropout` it is a hidden layer: ReLU follows, and that
    dropout.
    """

    def __init__(self, inputs: int, outputs: int, dropout: Dropout | None = None, bias: bool = True) -> None:
        super().__init__()
        self.fan_in = inputs
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.activation = None if dropout is None else Activation(dropout, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padding = x.shape[-1] - self.fan_in
        y = nn.functional.linear(x, *(self._padded(padding) if padding else (self.weight, self.bias)))
        return y if self.activation is None else self.activation(y)

    def _padded(self, columns: int) -> tuple[torch.Tensor]:
        """The weight with so many columns more, of which the first is the bias."""
        if self.bias is None:
            return (nn.functional.pad(self.weight, (0, columns)),)
        return (torch.cat([self.weight, nn.functional.pad(self.bias[:, None], (0, columns - 1))], dim=1),)


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
        if x.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
            y: torch.Tensor = _Batched.apply(x, self.weight, self.bias)
        elif self.bias is None:
            y = torch.bmm(x, self.weight)
        else:
            y = torch.baddbmm(self.bias, x, self.weight)
        return y if self.activation is None else self.activation(y)


class _Batched(torch.autograd.Function):
    """x [N, B, inputs], weight [N, inputs, outputs], bias [N, 1, outputs] or None -> [N, B, outputs].

    The gradient of x is laid out as x is. Experts read slices of one wide row, and autograd's own gradient,
    copies one after the other, would be copied into that order.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return torch.bmm(x, weight) if bias is None else torch.baddbmm(bias, x, weight)

    @staticmethod
    def backward(  # type: ignore[no-untyped-def]
        ctx, gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = torch.bmm(gradient, weight.transpose(1, 2), out=torch.empty_like(x))
        of_bias = gradient.sum(dim=1, keepdim=True) if ctx.has_bias else None
        return of_x, torch.bmm(x.transpose(1, 2), gradient), of_bias


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
