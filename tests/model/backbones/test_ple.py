from __future__ import annotations

import torch

from mtlrec.model.backbones.ple import PLE
from mtlrec.model.dropout import Dropout


def ple(levels: int, scenario_gates: bool = False) -> PLE:
    """Three tasks with two experts each, and two shared ones, of width 4."""
    backbone = PLE(
        inputs=5,
        num_tasks=3,
        num_scenarios=3,
        lookups=(),
        dropout=Dropout(),
        levels=levels,
        shared_experts=2,
        task_experts=2,
        hidden=[6, 4],
        scenario_gates=scenario_gates,
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return backbone


def changed(backbone: PLE, parameter: torch.Tensor, part: tuple[int | slice, ...]) -> list[bool]:
    """Which tasks' outputs a change of `parameter[part]` reaches."""
    x = torch.rand(64, 5, generator=torch.Generator().manual_seed(1)) + 0.1
    scenario = torch.zeros(64, dtype=torch.int64)
    with torch.no_grad():
        before = backbone(x, scenario)
        kept = parameter[part].clone()
        parameter[part] += 0.1
        after = backbone(x, scenario)
        parameter[part] = kept
    return (before != after).flatten(1).any(dim=1).tolist()


def test_an_expert_of_a_task_is_seen_by_it_alone_and_a_shared_one_by_all() -> None:
    backbone = ple(levels=1)
    bias = dict(backbone.named_parameters())["levels.0.rest.0.bias"]
    for expert in range(6):
        assert changed(backbone, bias, (expert,)) == [task == expert // 2 for task in range(3)]
    for expert in (6, 7):
        assert changed(backbone, bias, (expert,)) == [True] * 3


def test_with_two_levels_a_task_reaches_others_through_the_shared_experts() -> None:
    backbone = ple(levels=2)
    named = dict(backbone.named_parameters())
    assert changed(backbone, named["levels.0.rest.0.bias"], (0,)) == [True] * 3
    # The first task's own part of the last level reaches no other.
    assert changed(backbone, named["levels.1.rest.0.bias"], (0,)) == [True, False, False]
    assert changed(backbone, named["levels.1.gates.tasks.weight"], (0,)) == [True, False, False]
    assert changed(backbone, named["levels.1.first.tasks.bias"], (0,)) == [True, False, False]
    assert changed(backbone, named["levels.1.first.shared.bias"], (slice(0, 3),)) == [True] * 3
    # Rows of the first gates: four of each task, then eight of the shared gate, which shared experts read.
    assert changed(backbone, named["levels.0.gates.weight"], (4,)) == [False, True, False]
    assert changed(backbone, named["levels.0.gates.weight"], (12,)) == [True] * 3


def test_gates_pick_an_expert() -> None:
    backbone = ple(levels=1)
    x = torch.rand(7, 5, generator=torch.Generator().manual_seed(1)) + 0.1
    named = dict(backbone.named_parameters())
    with torch.no_grad():
        gates = named["levels.0.gates.weight"].zero_()
        gates[1] = 1000.0  # task 0, its second own expert
        gates[4 + 0] = 1000.0  # task 1, its first own expert
        gates[8 + 3] = 1000.0  # task 2, the second shared expert
        mixed = backbone(x, torch.zeros(7, dtype=torch.int64))
        for task, expert in ((0, 1), (1, 2), (2, 7)):
            first = slice(expert * 6, expert * 6 + 6)
            weight, bias = named["levels.0.first.weight"][first], named["levels.0.first.bias"][first]
            hidden = torch.relu(x @ weight.T + bias)
            weight, bias = named["levels.0.rest.0.weight"][expert], named["levels.0.rest.0.bias"][expert]
            torch.testing.assert_close(mixed[task], torch.relu(hidden @ weight + bias))


def test_scenario_gates_bend_the_last_gates_of_their_scenario_alone() -> None:
    backbone = ple(levels=2, scenario_gates=True)
    x = torch.rand(6, 5, generator=torch.Generator().manual_seed(1)) + 0.1
    scenario = torch.tensor([0, 1, 2, 0, 1, 2])
    assert backbone.scenario_bias is not None
    assert backbone.scenario_bias.shape == (3, 12)
    with torch.no_grad():
        before = backbone(x, scenario)
        backbone.scenario_bias[1, 4:8] += torch.tensor([5.0, 0.0, -5.0, 0.0])  # task 1
        after = backbone(x, scenario)
    moved = (before != after).any(dim=2)
    assert moved.tolist() == [[False] * 6, [False, True, False, False, True, False], [False] * 6]
