"""Progressive layered extraction; one level is customised gate control (CGC).

Tang et al. 2020, "Progressive Layered Extraction (PLE): A Novel Multi-Task Learning (MTL) Model for
Personalized Recommendations".

M rows, I input width of a level, H output width, T tasks, E experts of a level (each task's own, then the
shared ones), G gates of a level (one a task, then that of the shared experts, if any).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from mtlrec.model.dropout import Dropout
from mtlrec.model.layers import BatchedLinear, Linear
from mtlrec.schema import Lookup


class PLE(nn.Module):
    """x [M, I] -> [T, M, H]: levels of experts, some one task's and some shared, mixed by softmax gates.

    A task's gate mixes its own experts and the shared ones. In every level but the last a gate over all
    experts mixes what the shared ones of the next level read; there a task's experts and gate read what its
    own gate has mixed. With `scenario_gates`, each scenario adds a bias, which starts at zero, to the logits
    of the tasks' last gates.
    """

    scores = False

    def __init__(
        self,
        *,
        inputs: int,
        num_tasks: int,
        num_scenarios: int,
        lookups: Sequence[Lookup],
        dropout: Dropout,
        levels: int,
        shared_experts: int,
        task_experts: int,
        hidden: Sequence[int],
        scenario_gates: bool,
    ) -> None:
        super().__init__()
        self.outputs = hidden[-1]
        self.levels = nn.ModuleList(
            _Level(
                inputs=hidden[-1] if level else inputs,
                num_tasks=num_tasks,
                task_experts=task_experts,
                shared_experts=shared_experts,
                hidden=hidden,
                dropout=dropout,
                first=level == 0,
                last=level == levels - 1,
            )
            for level in range(levels)
        )
        self.scenario_bias = (
            nn.Parameter(torch.zeros(num_scenarios, num_tasks * (task_experts + shared_experts)))
            if scenario_gates
            else None
        )

    def forward(self, x: torch.Tensor, scenario: torch.Tensor) -> torch.Tensor:
        """`scenario` int64 [M]."""
        bias = None
        if self.scenario_bias is not None:
            bias = nn.functional.embedding(scenario, self.scenario_bias)
        for level in self.levels[:-1]:
            x = level(x)
        mixed: torch.Tensor = self.levels[-1](x, bias)
        return mixed


class _Level(nn.Module):
    """x [M, I], of later levels [T + 1, M, I] -> [G, M, H]: what each gate makes of the experts."""

    visible: torch.Tensor

    def __init__(
        self,
        *,
        inputs: int,
        num_tasks: int,
        task_experts: int,
        shared_experts: int,
        hidden: Sequence[int],
        dropout: Dropout,
        first: bool,
        last: bool,
    ) -> None:
        super().__init__()
        own = num_tasks * task_experts
        self.num_experts, self.num_gates = own + shared_experts, num_tasks + (not last)
        seen = [
            gate * self.num_experts + expert
            for gate in range(self.num_gates)
            for expert in range(self.num_experts)
            if gate == num_tasks or expert // task_experts == gate or expert >= own
        ]
        self.register_buffer("visible", torch.tensor(seen), persistent=False)
        each, all_of_them = task_experts + shared_experts, 0 if last else self.num_experts
        self.first: nn.Module
        self.gates: nn.Module
        if first:
            # All experts and gates read the same x: one wide map.
            self.first = Linear(inputs, self.num_experts * hidden[0], dropout)
            self.gates = Linear(inputs, len(seen), bias=False)
        else:
            widths = (task_experts * hidden[0], shared_experts * hidden[0])
            self.first = _EachItsOwn(num_tasks, inputs, *widths, dropout)
            self.gates = _EachItsOwn(num_tasks, inputs, each, all_of_them, bias=False)
        self.rest = nn.ModuleList(BatchedLinear(self.num_experts, a, b, dropout) for a, b in pairwise(hidden))

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`bias` [M, logits of the tasks' gates] is added to them; only the last level takes one."""
        rows = x.shape[-2]
        expert = self.first(x).view(rows, self.num_experts, -1).transpose(0, 1)
        for layer in self.rest:
            expert = layer(expert)
        logits = self.gates(x)
        if bias is not None:
            logits = logits + bias
        # Every gate looks at all experts, so that all of them are one product; what it may not see weighs 0.
        everywhere = logits.new_full((rows, self.num_gates * self.num_experts), -torch.inf)
        everywhere = everywhere.index_copy(1, self.visible, logits)
        gates = everywhere.view(rows, self.num_gates, self.num_experts).softmax(dim=-1)
        return torch.einsum("bge,ebh->gbh", gates, expert)


class _EachItsOwn(nn.Module):
    """x [T + 1, M, I] -> [M, T * each + shared]: a map of each task's input, and one of the shared input.

    Without `shared` the last is not read.
    """

    def __init__(
        self,
        num_tasks: int,
        inputs: int,
        each: int,
        shared: int,
        dropout: Dropout | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.tasks = BatchedLinear(num_tasks, inputs, each, dropout, bias)
        self.shared = Linear(inputs, shared, dropout, bias) if shared else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [*self.tasks(x[:-1])]
        if self.shared is not None:
            parts.append(self.shared(x[-1]))
        return torch.cat(parts, dim=1)
