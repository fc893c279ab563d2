"""Multi-gate mixture of experts.

Ma et al. 2018, "Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts".

B batch rows, I trunk input width, H output width, T tasks, E experts, S scenarios.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from mtlrec.model.dropout import Dropout
from mtlrec.model.layers import BatchedLinear, Linear
from mtlrec.schema import Lookup


class MMoE(nn.Module):
    """x [B, I] -> [T, B, H]: each task's softmax gate mixes the outputs of the experts.

    With `scenario_gates`, each scenario adds a bias of its own, which starts at zero, to every gate's logits.
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
        experts: int,
        hidden: Sequence[int],
        scenario_gates: bool,
    ) -> None:
        super().__init__()
        self.num_tasks, self.num_experts = num_tasks, experts
        self.outputs = hidden[-1]
        # All experts read the same x, so their first layers are one wide map; the later ones are batched.
        self.first = Linear(inputs, experts * hidden[0], dropout)
        self.rest = nn.ModuleList(BatchedLinear(experts, a, b, dropout) for a, b in pairwise(hidden))
        self.gates = Linear(inputs, num_tasks * experts, bias=False)
        self.scenario_bias = (
            nn.Parameter(torch.zeros(num_scenarios, num_tasks * experts)) if scenario_gates else None
        )

    def forward(self, x: torch.Tensor, scenario: torch.Tensor) -> torch.Tensor:
        """`scenario` int64 [B]."""
        batch = x.shape[0]
        expert = self.first(x).view(batch, self.num_experts, -1).transpose(0, 1)
        for layer in self.rest:
            expert = layer(expert)
        logits = self.gates(x)
        if self.scenario_bias is not None:
            logits = logits + nn.functional.embedding(scenario, self.scenario_bias)
        gates = logits.view(batch, self.num_tasks, self.num_experts).softmax(dim=-1)
        return torch.einsum("bte,ebh->tbh", gates, expert)
