from __future__ import annotations

import torch

from mtlrec.model.backbones.shared_bottom import SharedBottom
from mtlrec.model.dropout import Dropout


def shared_bottom(inputs: int, hidden: list[int]) -> SharedBottom:
    return SharedBottom(
        inputs=inputs, num_tasks=3, num_scenarios=2, lookups=(), dropout=Dropout(), hidden=hidden
    )


def test_every_task_reads_the_same_trunk() -> None:
    backbone = shared_bottom(5, [6, 4])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(7, 5, generator=generator)
    shared = backbone(x, torch.zeros(7, dtype=torch.int64))
    assert shared.shape == (3, 7, 4)
    first, first_bias, second, second_bias = backbone.trunk.parameters()
    expected = torch.relu(torch.relu(x @ first.T + first_bias) @ second.T + second_bias)
    for task in range(3):
        torch.testing.assert_close(shared[task], expected)


def test_gradients_of_all_tasks_add_up_in_the_trunk() -> None:
    backbone = shared_bottom(2, [1])
    weight, bias = backbone.trunk.parameters()
    with torch.no_grad():
        weight.fill_(1.0)
        bias.zero_()
    x = torch.tensor([[1.0, 2.0]])
    (
        backbone(x, torch.zeros(1, dtype=torch.int64)) * torch.tensor([1.0, 10.0, 100.0]).view(3, 1, 1)
    ).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [[111.0, 222.0]]
