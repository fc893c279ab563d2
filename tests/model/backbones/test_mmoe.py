from __future__ import annotations

import torch

from mtlrec.model.backbones.mmoe import MMoE
from mtlrec.model.dropout import Dropout


def mmoe(scenario_gates: bool) -> MMoE:
    backbone = MMoE(
        inputs=5,
        num_tasks=2,
        num_scenarios=3,
        lookups=(),
        dropout=Dropout(),
        experts=4,
        hidden=[6, 3],
        scenario_gates=scenario_gates,
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return backbone


def test_gates_pick_an_expert() -> None:
    """With a gate that is all on one expert, a task's output is that expert's."""
    backbone = mmoe(scenario_gates=False)
    x = torch.rand(7, 5, generator=torch.Generator().manual_seed(1)) + 0.1
    named = dict(backbone.named_parameters())
    with torch.no_grad():
        backbone.gates.weight.zero_()
        backbone.gates.weight[2] = 1000.0  # task 0, expert 2
        backbone.gates.weight[4 + 1] = 1000.0  # task 1, expert 1
        mixed = backbone(x, torch.zeros(7, dtype=torch.int64))
        for task, expert in ((0, 2), (1, 1)):
            first = slice(expert * 6, expert * 6 + 6)
            hidden = torch.relu(x @ named["first.weight"][first].T + named["first.bias"][first])
            expected = torch.relu(hidden @ named["rest.0.weight"][expert] + named["rest.0.bias"][expert])
            torch.testing.assert_close(mixed[task], expected)


def test_equal_gates_average_the_experts_for_all_tasks_alike() -> None:
    backbone = mmoe(scenario_gates=False)
    with torch.no_grad():
        backbone.gates.weight.zero_()
        mixed = backbone(torch.randn(7, 5), torch.zeros(7, dtype=torch.int64))
    torch.testing.assert_close(mixed[0], mixed[1])


def test_scenario_gates_bend_the_gates_of_their_scenario_alone() -> None:
    backbone = mmoe(scenario_gates=True)
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    scenario = torch.tensor([0, 1, 2, 0, 1, 2])
    assert backbone.scenario_bias is not None
    with torch.no_grad():
        before = backbone(x, scenario)
        backbone.scenario_bias[1, :4] += torch.tensor([5.0, 0.0, 0.0, 0.0])  # task 0
        after = backbone(x, scenario)
    changed = (before != after).any(dim=2)
    assert changed.tolist() == [[False, True, False, False, True, False], [False] * 6]


def test_without_scenario_gates_the_scenario_changes_nothing() -> None:
    backbone = mmoe(scenario_gates=False)
    x = torch.randn(6, 5)
    assert torch.equal(
        backbone(x, torch.zeros(6, dtype=torch.int64)), backbone(x, torch.full((6,), 2, dtype=torch.int64))
    )
    assert "scenario_bias" not in dict(backbone.named_parameters())
