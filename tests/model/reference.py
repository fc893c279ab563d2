"""The model and its training as plain PyTorch would have them, in loops: what ours are compared with.

B rows, D embedding dim, T tasks, I input width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mtlrec.job.job import Job
from mtlrec.job.model import PLE, Factorization
from mtlrec.schema import Schema
from tests.model.example import Rows


class PlainModel:
    """Whole tables and the dense parameters, by the names of ours; no sharding, no batched product."""

    def __init__(
        self,
        job: Job,
        schema: Schema,
        tables: Mapping[str, torch.Tensor],
        dense: Mapping[str, torch.Tensor],
    ) -> None:
        self.job, self.schema = job, schema
        self.tables = {name: nn.Parameter(weights.detach().clone()) for name, weights in tables.items()}
        self.dense = {name: nn.Parameter(value.detach().clone()) for name, value in dense.items()}

    def forward(self, rows: Rows) -> torch.Tensor:
        """[B, T]."""
        pooled = [
            self.pooled(rows, feature.name, table)
            for feature in self.schema.id_features
            for table in feature.tables
        ]
        return self.head(
            torch.cat([*pooled, torch.from_numpy(rows.dense)], dim=1), torch.from_numpy(rows.scenario)
        )

    def pooled(self, rows: Rows, name: str, looked_up_in: str) -> torch.Tensor:
        """[B, D]: sum or mean over each row's ids; zero where there is none."""
        table, weights = self.schema.table_of[looked_up_in], self.tables[looked_up_in]
        lengths = torch.from_numpy(rows.lengths[name])
        owner = torch.repeat_interleave(torch.arange(len(rows)), lengths)
        looked_up = weights[torch.from_numpy(rows.values[name])]
        total = torch.zeros(len(rows), table.dim).index_add(0, owner, looked_up)
        return total / lengths.clamp(min=1)[:, None] if table.pooling == "mean" else total

    def head(self, x: torch.Tensor, scenario: torch.Tensor) -> torch.Tensor:
        """x [B, I] -> [B, T]."""
        section = self.job.model.backbone
        tasks = range(len(self.schema.tasks))
        if section.kind == "factorization":
            bias = self.dense["towers.output_bias"][:, 0]
            return torch.stack([self.factorization(x, scenario, task) + bias[task] for task in tasks], dim=1)
        if section.kind == "shared_bottom":
            mixed = [self.perceptron(x, "backbone.trunk", section.hidden)] * len(tasks)
        elif section.kind == "ple":
            mixed = self.ple(x, scenario)
        else:
            experts = [self.expert(x, expert) for expert in range(section.experts)]
            mixed = [self.mixture(x, scenario, experts, task) for task in tasks]
        return torch.stack([self.tower(mixed[task], task) for task in tasks], dim=1)

    def perceptron(self, x: torch.Tensor, path: str, hidden: list[int]) -> torch.Tensor:
        for layer in range(len(hidden)):
            weight, bias = self.named(f"{path}.layers.{layer}")
            x = torch.relu(x @ weight.T + bias)
        return x

    def ple(self, x: torch.Tensor, scenario: torch.Tensor) -> list[torch.Tensor]:
        """Tang et al. 2020, equations 1 to 7, one task, expert and gate at a time: T times [B, H]."""
        section = self.job.model.backbone
        assert isinstance(section, PLE)
        num_tasks, own, shared = len(self.schema.tasks), section.task_experts, section.shared_experts
        inputs = [x] * (num_tasks + 1)
        for level in range(section.levels):
            # The group of each expert: its task, or the shared ones behind all tasks.
            groups = [*(task for task in range(num_tasks) for _ in range(own)), *[num_tasks] * shared]
            experts = [self.ple_expert(inputs[group], level, e, group) for e, group in enumerate(groups)]
            last = level == section.levels - 1
            mixed = []
            for gate in range(num_tasks + (not last)):
                logits = inputs[gate] @ self.ple_gate(level, gate).T
                if last and section.scenario_gates:
                    wide = own + shared
                    bias = self.dense["backbone.scenario_bias"]
                    logits = logits + bias[scenario][:, gate * wide : (gate + 1) * wide]
                seen = [
                    e for e, group in enumerate(groups) if gate == num_tasks or group in (gate, num_tasks)
                ]
                weights = torch.softmax(logits, dim=1)
                mixed.append(sum((weights[:, [i]] * experts[e] for i, e in enumerate(seen)), torch.zeros(())))
            inputs = mixed
        return inputs

    def ple_expert(self, x: torch.Tensor, level: int, expert: int, group: int) -> torch.Tensor:
        section, path = self.job.model.backbone, f"backbone.levels.{level}"
        assert isinstance(section, PLE)
        num_tasks, width = len(self.schema.tasks), section.hidden[0]
        if level == 0:
            weight, bias = self.named(f"{path}.first")
            number = expert
        elif group < num_tasks:
            weight, bias = self.named(f"{path}.first.tasks")
            weight, bias, number = weight[group].T, bias[group, 0], expert - group * section.task_experts
        else:
            weight, bias = self.named(f"{path}.first.shared")
            number = expert - num_tasks * section.task_experts
        mine = slice(number * width, (number + 1) * width)
        x = torch.relu(x @ weight[mine].T + bias[mine])
        for layer in range(len(section.hidden) - 1):
            weight, bias = self.named(f"{path}.rest.{layer}")
            x = torch.relu(x @ weight[expert] + bias[expert])
        return x

    def ple_gate(self, level: int, gate: int) -> torch.Tensor:
        """[experts it sees, I]."""
        section, path = self.job.model.backbone, f"backbone.levels.{level}.gates"
        assert isinstance(section, PLE)
        num_tasks, width = len(self.schema.tasks), section.task_experts + section.shared_experts
        if level == 0:
            end = (gate + 1) * width if gate < num_tasks else None
            return self.dense[f"{path}.weight"][gate * width : end]
        if gate < num_tasks:
            return self.dense[f"{path}.tasks.weight"][gate].T
        return self.dense[f"{path}.shared.weight"]

    def factorization(self, x: torch.Tensor, scenario: torch.Tensor, task: int) -> torch.Tensor:
        """He et al. 2017, equation 12: [B]."""
        section = self.job.model.backbone
        assert isinstance(section, Factorization)
        parts = [(each.table, x[:, each.start : each.start + each.width]) for each in self.schema.lookups]
        of_table = dict(parts)
        p, q = (of_table[table] for table in section.factors)
        product = p * q
        if "backbone.product" in self.dense:
            product = product * self.dense["backbone.product"][task]
        score = product.sum(dim=1)
        for table in section.biases:
            score = score + of_table[table][torch.arange(len(x)), scenario]
        if section.hidden:
            taken = {*section.factors, *section.biases}
            columns = [part for table, part in parts if table not in taken]
            rest = torch.cat([*columns, x[:, self.schema.embedding_width :]], dim=1)
            hidden = self.perceptron(rest, "backbone.mlp", section.hidden)
            score = score + hidden @ self.dense["backbone.last.weight"][task]
        return score

    def expert(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        hidden = self.job.model.backbone.hidden
        weight, bias = self.named("backbone.first")
        mine = slice(expert * hidden[0], (expert + 1) * hidden[0])
        x = torch.relu(x @ weight[mine].T + bias[mine])
        for layer in range(len(hidden) - 1):
            weight, bias = self.named(f"backbone.rest.{layer}")
            x = torch.relu(x @ weight[expert] + bias[expert])
        return x

    def mixture(
        self, x: torch.Tensor, scenario: torch.Tensor, experts: list[torch.Tensor], task: int
    ) -> torch.Tensor:
        mine = slice(task * len(experts), (task + 1) * len(experts))
        logits = x @ self.dense["backbone.gates.weight"][mine].T
        if "backbone.scenario_bias" in self.dense:
            logits = logits + self.dense["backbone.scenario_bias"][scenario][:, mine]
        gate = torch.softmax(logits, dim=1)
        return sum((gate[:, [e]] * expert for e, expert in enumerate(experts)), torch.zeros(()))

    def tower(self, x: torch.Tensor, task: int) -> torch.Tensor:
        for layer in range(len(self.job.model.tower.hidden)):
            weight, bias = self.named(f"towers.layers.{layer}")
            x = torch.relu(x @ weight[task] + bias[task])
        weight, bias = self.named("towers.last")
        return (x @ weight[task] + bias[task])[:, 0]

    def named(self, path: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.dense[f"{path}.weight"], self.dense[f"{path}.bias"]


def train_plainly(model: PlainModel, batches: list[Rows]) -> list[list[float]]:
    """Train on whole global batches; each task's mean loss at every step, before it."""
    job, schema = model.job, model.schema
    section = job.optimizer.dense
    kinds: dict[str, Any] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    optimizer = kinds[section.kind](
        model.dense.values(), lr=section.lr, betas=section.betas, eps=section.eps, foreach=False
    )
    sums: dict[str, torch.Tensor] = {}
    losses = []
    for rows in batches:
        outputs = model.forward(rows)
        means = []
        for index, task in enumerate(schema.tasks):
            valid = torch.from_numpy(rows.valid[:, index])
            output, label = outputs[valid, index], torch.from_numpy(rows.labels[:, index])[valid]
            if task.kind == "binary":
                chance = torch.sigmoid(output)
                each = -(label * chance.log() + (1 - label) * (1 - chance).log())
            else:
                each = (output - label) ** 2
            means.append(each.sum() / max(len(label), 1))
        total = sum(mean * task.weight for mean, task in zip(means, schema.tasks, strict=True))
        assert isinstance(total, torch.Tensor)
        for parameter in (*model.dense.values(), *model.tables.values()):
            parameter.grad = None
        total.backward()
        optimizer.step()
        with torch.no_grad():
            for name, weights in model.tables.items():
                _step_table(job, weights, sums, name)
        losses.append([float(mean.detach()) for mean in means])
    return losses


def _step_table(job: Job, weights: nn.Parameter, sums: dict[str, torch.Tensor], name: str) -> None:
    section, gradient = job.optimizer.tables, weights.grad
    if gradient is None:
        return
    if section.kind == "sgd":
        weights.sub_(section.lr * gradient)
        return
    square = gradient**2
    if section.kind == "rowwise_adagrad":
        square = square.mean(dim=1, keepdim=True)
    sums[name] = sums.get(name, torch.zeros(())) + square
    weights.sub_(section.lr * gradient / (sums[name].sqrt() + section.eps))
