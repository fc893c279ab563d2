"""The census recipe in plain PyTorch: what mtlrec's own numbers on this data are held against.

    python -m benchmarks.census_reference OUT --backbone mmoe --seeds 3

Reads the jobs and the Parquet that `mtlrec prepare census` wrote to OUT, and imports nothing of mtlrec:
features, model, loss and both optimizers are written out here. Shuffling and starting weights are torch's, so
only averages over seeds can be compared. Prints one JSON line with the AUC on the test rows.

N rows of a split, B batch rows, F id features, D embedding dim, I trunk input width, H hidden, T tasks,
E experts.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import yaml
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn import functional

Split = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Ids int64 [N, F] (rows of one table that holds all of them), numbers [N, I - F * D], labels [N, T]."""


class Data:
    """The job's features, and the splits as tensors."""

    def __init__(self, folder: Path, job: dict[str, Any]) -> None:
        self._folder, self._job = folder, job
        self.tables: list[int] = [len(job["schema"]["scenario"]["values"])]
        for feature in job["schema"]["features"].values():
            if feature["kind"] == "id":
                self.tables.append(feature["rows"])
            elif feature["transform"] == "bucketise":
                # One more bucket than boundaries, and one for missing numbers.
                self.tables.append(len(feature["boundaries"]) + 2)
        self.num_numbers = len(job["schema"]["features"]) + 1 - len(self.tables)

    def read(self, split: str) -> Split:
        table = pq.read_table(self._folder / split)
        schema = self._job["schema"]
        values = np.array(schema["scenario"]["values"])
        ids = [np.searchsorted(values, table[schema["scenario"]["column"]].to_numpy())]
        numbers = []
        for name, feature in schema["features"].items():
            column = table[feature.get("column", name)].to_numpy()
            if feature["kind"] == "id":
                ids.append(column)
            elif feature["transform"] == "bucketise":
                ids.append(1 + np.searchsorted(np.array(feature["boundaries"]), column, side="right"))
            elif feature["transform"] == "log1p":
                numbers.append(np.sign(column) * np.log1p(np.abs(column)))
            else:
                raise ValueError(f"feature {name}: {feature} is not part of the recipe")
        starts = np.cumsum([0, *self.tables[:-1]])
        labels = [table[task].to_numpy() for task in schema["tasks"]]
        return (
            torch.from_numpy(np.stack(ids, axis=1) + starts),
            torch.from_numpy(np.stack(numbers, axis=1).astype(np.float32)),
            torch.from_numpy(np.stack(labels, axis=1).astype(np.float32)),
        )


class Model(nn.Module):
    """Ids [B, F] and numbers -> logits [B, T]."""

    def __init__(self, job: dict[str, Any], data: Data) -> None:
        super().__init__()
        model, num_tasks = job["model"], len(job["schema"]["tasks"])
        dim = model["dim"]
        self.table = nn.Embedding(sum(data.tables), dim)
        nn.init.uniform_(self.table.weight, -model["table_init"], model["table_init"])
        inputs = len(data.tables) * dim + data.num_numbers
        backbone = model["backbone"]
        hidden = backbone["hidden"]
        self.gates = nn.ModuleList()
        if backbone["kind"] == "mmoe":
            self.experts = nn.ModuleList(_mlp([inputs, *hidden]) for _ in range(backbone["experts"]))
            for _ in range(num_tasks):
                self.gates.append(nn.Linear(inputs, backbone["experts"], bias=False))
        elif backbone["kind"] == "shared_bottom":
            self.trunk = _mlp([inputs, *hidden])
        else:
            raise ValueError(f"backbone {backbone['kind']} has no reference")
        tower = [hidden[-1], *model["tower"]["hidden"]]
        self.towers = nn.ModuleList(
            nn.Sequential(_mlp(tower), nn.Linear(tower[-1], 1)) for _ in range(num_tasks)
        )

    def forward(self, ids: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.table(ids).flatten(1), numbers], dim=1)
        if len(self.gates):
            experts = torch.stack([expert(x) for expert in self.experts], dim=1)  # [B, E, H]
            mixed = [(gate(x).softmax(dim=1).unsqueeze(2) * experts).sum(dim=1) for gate in self.gates]
        else:
            mixed = [self.trunk(x)] * len(self.towers)
        return torch.cat([tower(h) for tower, h in zip(self.towers, mixed, strict=True)], dim=1)


class RowWiseAdagrad:
    """One sum a row r: s_r += mean_d g_rd^2, then w_r -= lr g_r / (sqrt(s_r) + eps).

    A row that the batch did not touch has a gradient of zero, and stays as it is.
    """

    def __init__(self, weight: torch.Tensor, lr: float, eps: float) -> None:
        self._weight, self._lr, self._eps = weight, lr, eps
        self._sum = torch.zeros(weight.shape[0], 1)

    @torch.no_grad()
    def step(self) -> None:
        gradient = self._weight.grad
        assert gradient is not None
        self._sum += gradient.square().mean(dim=1, keepdim=True)
        self._weight.sub_(self._lr * gradient / (self._sum.sqrt() + self._eps))
        self._weight.grad = None


def train(job: dict[str, Any], data: Data, split: Split, seed: int, epochs: int) -> Model:
    torch.manual_seed(seed)
    model = Model(job, data)
    section = job["optimizer"]
    allowed = {"tables": {"kind", "lr", "eps"}, "dense": {"kind", "lr", "weight_decay", "schedule"}}
    for part, kind in (("tables", "rowwise_adagrad"), ("dense", "adam")):
        if section[part]["kind"] != kind or set(section[part]) - allowed[part]:
            raise ValueError(f"optimizer.{part}: {section[part]} is not part of the recipe")
    dense = [parameter for name, parameter in model.named_parameters() if not name.startswith("table.")]
    adam = torch.optim.Adam(
        dense, lr=section["dense"]["lr"], weight_decay=section["dense"].get("weight_decay", 0.0)
    )
    tables = RowWiseAdagrad(model.table.weight, section["tables"]["lr"], section["tables"].get("eps", 1e-8))
    ids, numbers, labels = split
    step = 0
    for _ in range(epochs):
        for rows in torch.randperm(len(ids)).split(job["data"]["batch_size"]):
            for group in adam.param_groups:
                group["lr"] = section["dense"]["lr"] * _factor(section["dense"].get("schedule"), step)
            logits = model(ids[rows], numbers[rows])
            # The sum over tasks of each task's mean over the batch.
            loss = functional.binary_cross_entropy_with_logits(logits, labels[rows], reduction="none")
            loss.mean(dim=0).sum().backward()
            adam.step()
            adam.zero_grad()
            tables.step()
            step += 1
    return model


@torch.no_grad()
def auc(model: Model, split: Split) -> list[float]:
    """Of each task."""
    ids, numbers, labels = split
    scores = torch.cat(
        [model(*rows) for rows in zip(ids.split(8192), numbers.split(8192), strict=True)]
    ).numpy()
    return [float(roc_auc_score(labels[:, task], scores[:, task])) for task in range(labels.shape[1])]


def _mlp(widths: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        linear = nn.Linear(a, b)
        # torch's own start of a linear map: uniform in +-1/sqrt(a), weight and bias alike.
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers)


def _factor(schedule: dict[str, Any] | None, step: int) -> float:
    """Linear decay from 1 to 0 over `decay_steps`, or none."""
    if schedule is None:
        return 1.0
    if set(schedule) != {"decay", "decay_steps"} or schedule["decay"] not in ("linear", "cosine"):
        raise ValueError(f"optimizer.dense.schedule: {schedule} is not part of the recipe")
    progress = min(step / schedule["decay_steps"], 1.0)
    return 1.0 - progress if schedule["decay"] == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def main() -> None:
    parser = argparse.ArgumentParser(description="The census recipe in plain PyTorch.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder that mtlrec prepare census wrote")
    parser.add_argument("--backbone", default="mmoe", choices=("mmoe", "shared_bottom"))
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ...")
    parser.add_argument("--epochs", type=int, help="default: the job's run.epochs")
    parser.add_argument("--split", default="test", help="rows that are scored (default: test)")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    file = "job.yaml" if arguments.backbone == "mmoe" else f"job_{arguments.backbone}.yaml"
    job = yaml.safe_load((arguments.out / file).read_text(encoding="utf-8"))
    epochs = arguments.epochs or job["run"]["epochs"]
    start = time.perf_counter()
    data = Data(arguments.out, job)
    learn, held_out = data.read(job["data"]["train"]), data.read(arguments.split)
    tasks = list(job["schema"]["tasks"])
    scores = [auc(train(job, data, learn, seed, epochs), held_out) for seed in range(arguments.seeds)]
    by_task = dict(zip(tasks, zip(*scores, strict=True), strict=True))
    result = {
        "backbone": job["model"]["backbone"],
        "split": arguments.split,
        "epochs": epochs,
        "auc": by_task,
        "mean": {task: statistics.fmean(values) for task, values in by_task.items()},
        "sd": {task: statistics.stdev(v) if len(v) > 1 else None for task, v in by_task.items()},
        "seconds": round(time.perf_counter() - start, 1),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
