"""Dropout (Srivastava et al. 2014) whose chance is counted, not drawn: any number of workers drops alike.

Whether a unit is dropped is a function of (seed, step, global row, number of the negative, layer, unit), by
integer hashing on the batch's device. docs/model.md states it.

M rows of the model, B rows of the batch, K negatives a row.
"""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from mtlrec.batch import Batch, carry

_GAMMA = 0x9E3779B97F4A7C15
_FACTORS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31

_UNITS = 4
"""Units that share a hash of 64 bits, 16 bits each, the lowest first."""
_STEPS = 2**16
"""The rate is a multiple of one part in so many."""


class Dropout:
    """What all activations of a model share: the rate, and the keys of the rows in hand.

    `rate`: share of the units that is dropped, 0 <= rate < 1, in effect the nearest multiple of 2^-16.
    """

    def __init__(self, rate: float = 0.0, seed: int = 0) -> None:
        self._dropped = min(round(rate * _STEPS), _STEPS - 1)
        self._seed = seed
        self._keys: torch.Tensor | None = None

    def __bool__(self) -> bool:
        """Whether anything is ever dropped."""
        return self._dropped > 0

    @property
    def scale(self) -> float:
        """What is kept is multiplied by it, so that the mean stays."""
        return _STEPS / (_STEPS - self._dropped)

    def name_layers(self, model: nn.Module) -> None:
        """Give each activation below `model` the keys of its units, which follow from its full name."""
        if self:
            for path, module in model.named_modules():
                if isinstance(module, Activation):
                    module.name(path)

    def begin(self, batch: Batch) -> None:
        """Hash the rows of `batch`: before every forward in training. Nothing where nothing is dropped."""
        if not self:
            return
        device = batch.dense.device
        rows = carry(batch.rows, device)
        start = _mix_number(_mix_number(self._seed) + batch.step * _GAMMA)
        keys = _mix(rows * _signed(_GAMMA) + _signed(start))
        if batch.negatives is not None:
            # Column 0 is the row itself, column k its k-th negative; rows come before all negatives.
            which = torch.arange(batch.per_positive + 1, device=device) * _signed(_GAMMA)
            drawn = _mix(keys[:, None] + which)
            keys = torch.cat([drawn[:, 0], drawn[:, 1:].reshape(-1)])
        self._keys = keys[:, None]

    def keep(self, unit_keys: torch.Tensor) -> torch.Tensor:
        """Keys of units int64 [..., 1, U / 4] -> bool [..., M, U]: which of them each row keeps."""
        assert self._keys is not None, "the rows must be known before the forward"
        words = _mix(self._keys ^ unit_keys)
        return words.view(torch.int16) >= self._dropped - _STEPS // 2


class Activation(nn.Module):
    """ReLU of a layer's fresh output x [M, units], or [copies, M, units], in place; dropout when training."""

    def __init__(self, dropout: Dropout, units: int, copies: int = 0) -> None:
        super().__init__()
        self._dropout, self._units, self._copies = dropout, units, copies
        self.register_buffer("unit_keys", None, persistent=False)
        self.unit_keys: torch.Tensor | None

    def name(self, path: str) -> None:
        """`path` tells this layer's units from those of all others."""
        words = -(-self._units // _UNITS)
        start = int.from_bytes(hashlib.blake2b(f"dropout|{path}".encode(), digest_size=8).digest(), "little")
        index = torch.arange(max(self._copies, 1) * words) * _signed(_GAMMA)
        self.unit_keys = _mix(index + _signed(start)).view(-1, 1, words)
        if not self._copies:
            self.unit_keys = self.unit_keys[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not (self.training and self._dropout):
            return x.relu_()
        assert self.unit_keys is not None, "Dropout.name_layers was not called"
        keep = self._dropout.keep(self.unit_keys)[..., : self._units]
        dropped: torch.Tensor = _ReLUThenDrop.apply(x, keep, self._dropout.scale)
        return dropped


class _ReLUThenDrop(torch.autograd.Function):
    """In place, and with its result alone kept for the backward: it says by itself what passed through."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, keep: torch.Tensor, scale: float) -> torch.Tensor:  # type: ignore[no-untyped-def]
        ctx.mark_dirty(x)
        x.relu_().mul_(keep).mul_(scale)
        ctx.save_for_backward(x)
        ctx.scale = scale
        return x

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[no-untyped-def]
        (y,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(gradient, y, 0).mul_(ctx.scale), None, None


def _mix(words: torch.Tensor) -> torch.Tensor:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014), in place: a bijection of 64-bit words.

    Torch has no unsigned shift, so the sign's copies are cut off after an arithmetic one; products wrap.
    """
    shifted = torch.empty_like(words)
    for shift, factor in _FACTORS:
        torch.bitwise_right_shift(words, shift, out=shifted)
        words ^= shifted.bitwise_and_(2 ** (64 - shift) - 1)
        words *= _signed(factor)
    torch.bitwise_right_shift(words, _LAST_SHIFT, out=shifted)
    words ^= shifted.bitwise_and_(2 ** (64 - _LAST_SHIFT) - 1)
    return words


def _mix_number(word: int) -> int:
    """`_mix` of one number, modulo 2^64."""
    word &= 2**64 - 1
    for shift, factor in _FACTORS:
        word = (word ^ word >> shift) * factor & 2**64 - 1
    return word ^ word >> _LAST_SHIFT


def _signed(word: int) -> int:
    """The int64 with the 64 bits of `word`."""
    word &= 2**64 - 1
    return word - 2**64 if word >= 2**63 else word
