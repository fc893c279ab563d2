"""User x item: the product of two embeddings, alone or beside a multi-layer perceptron.

Koren et al. 2009, "Matrix Factorization Techniques for Recommender Systems"; He et al. 2017, "Neural
Collaborative Filtering" (NeuMF, equation 12).

M rows, I input width, D embedding dim of the factors, T tasks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from mtlrec.model.dropout import Dropout
from mtlrec.model.layers import MLP, Linear
from mtlrec.schema import Lookup


class Factorization(nn.Module):
    """x [M, I] -> [T, M, 1]: each task's score, without the bias that its output adds.

    With p and q [D] the embeddings of the two `factors` and b the sum over `biases` of column s of its
    embedding, s the row's scenario, the score of task t is

    - one task, no `hidden`: sum over d of p_d q_d, plus b;
    - several tasks: sum over d of h_td p_d q_d, plus b, with h learnt from 1 on (GMF, He et al. equation 9);
    - with `hidden`: the same, for one task too, plus g_t . phi(rest), where phi is the multi-layer perceptron
      over all columns of x but those of factors and biases, and g_t starts as a linear layer does.
    """

    scores = True
    outputs = 1

    def __init__(
        self,
        *,
        inputs: int,
        num_tasks: int,
        num_scenarios: int,
        lookups: Sequence[Lookup],
        dropout: Dropout,
        factors: Sequence[str],
        biases: Sequence[str],
        hidden: Sequence[int],
    ) -> None:
        super().__init__()
        self._num_tasks = num_tasks
        width = sum(lookup.width for lookup in lookups)
        self._widths = [*(lookup.width for lookup in lookups), inputs - width]
        tables = [lookup.table for lookup in lookups]
        self._factors = [tables.index(table) for table in factors]
        self._biases = [tables.index(table) for table in biases]
        taken = {*self._factors, *self._biases}
        self._rest = [part for part in range(len(self._widths)) if part not in taken]
        self.product = (
            nn.Parameter(torch.ones(num_tasks, self._widths[self._factors[0]]))
            if hidden or num_tasks > 1
            else None
        )
        self.mlp = self.last = None
        if hidden:
            rest = sum(self._widths[part] for part in self._rest)
            assert rest, "the multi-layer perceptron has nothing to read"
            self.mlp = MLP(rest, hidden, dropout)
            self.last = Linear(hidden[-1], num_tasks, bias=False)

    def forward(self, x: torch.Tensor, scenario: torch.Tensor) -> torch.Tensor:
        """`scenario` int64 [M]."""
        parts = x[:, : sum(self._widths)].split(self._widths, dim=1)
        p, q = (parts[part] for part in self._factors)
        # [M, T], or [M, 1] where one sum serves.
        score = (p * q).sum(dim=1, keepdim=True) if self.product is None else (p * q) @ self.product.t()
        for part in self._biases:
            score = score + parts[part].gather(1, scenario[:, None])
        if self.mlp is not None and self.last is not None:
            score = score + self.last(self.mlp(torch.cat([parts[part] for part in self._rest], dim=1)))
        return score.t().unsqueeze(-1)
