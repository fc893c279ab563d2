from __future__ import annotations

import pytest
import torch

from mtlrec.model.dropout import Dropout
from mtlrec.model.layers import BatchedLinear, Linear, initialise_dense, pad_trunk


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [3, 7, 8, 19])
def test_a_padded_input_gives_what_the_same_without_padding_does(width: int, bias: bool) -> None:
    layer = Linear(width, 5, Dropout(), bias)
    initialise_dense(layer, 1)
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(6, each, generator=generator, requires_grad=True) for each in (2, width - 2)]
    slope = torch.randn(6, 5, generator=generator)
    inputs = [*parts, *layer.parameters()]
    plain = layer(torch.cat(parts, dim=1))
    x = pad_trunk(parts)
    assert x.shape[1] % 8 == 0 and width < x.shape[1] <= width + 8
    padded = layer(x)
    torch.testing.assert_close(padded, plain)
    one = torch.autograd.grad((padded * slope).sum(), inputs)
    other = torch.autograd.grad((plain * slope).sum(), inputs)
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("bias", [True, False])
def test_batched_gradients_are_autograds_own_and_lie_as_the_input_does(bias: bool) -> None:
    layer = BatchedLinear(3, 4, 2, bias=bias)
    initialise_dense(layer, 1)
    generator = torch.Generator().manual_seed(0)
    # Three experts' slices of one wide row.
    wide = torch.randn(6, 12, generator=generator, requires_grad=True)
    x = wide.view(6, 3, 4).transpose(0, 1)
    slope = torch.randn(3, 6, 2, generator=generator)
    found = layer(x)
    expected = torch.einsum("nbi,nio->nbo", x, layer.weight)
    if layer.bias is not None:
        expected = expected + layer.bias
    torch.testing.assert_close(found, expected)
    one = torch.autograd.grad((found * slope).sum(), [x, wide, *layer.parameters()])
    other = torch.autograd.grad((expected * slope).sum(), [x, wide, *layer.parameters()])
    assert one[0].stride() == x.stride()
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine, theirs)
    (weights_alone,) = torch.autograd.grad(layer(x.detach()).sum(), [layer.weight])
    assert weights_alone.shape == layer.weight.shape


def test_batched_gradients_in_double_precision() -> None:
    layer = BatchedLinear(2, 3, 2).double()
    initialise_dense(layer, 1)
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, [x])
