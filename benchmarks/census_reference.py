"""The census recipe in plain PyTorch: what mtlrec's own numbers on this data are held against.

    python -m benchmarks.census_reference OUT --backbone shared_bottom --seeds 3

Reads the jobs and the Parquet that `mtlrec prepare census` wrote to OUT, and imports nothing of mtlrec:
features, model, loss and both optimizers are written out here. Shuffling, dropout and starting weights are
torch's, so only averages over seeds can be compared. The epoch that is best on valid, by the mean of both
AUCs, is scored on the test rows. Prints one JSON line with their AUC.

N rows of a split, B batch rows, F id features, D embedding dim, I trunk input width, H hidden, T tasks,
E experts that a gate mixes.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
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
    """Ids [B, F] and numbers -> logits [B, T]. `rates` [T]: how often each task is positive in training."""

    def __init__(self, job: dict[str, Any], data: Data, rates: torch.Tensor) -> None:
        super().__init__()
        model, num_tasks = job["model"], len(rates)
        dim, dropout = model["dim"], model["dropout"]
        self.table = nn.Embedding(sum(data.tables), dim)
        nn.init.uniform_(self.table.weight, -model["table_init"], model["table_init"])
        self.backbone = _backbone(
            model["backbone"], len(data.tables) * dim + data.num_numbers, num_tasks, dropout
        )
        tower = [model["backbone"]["hidden"][-1], *model["tower"]["hidden"]]
        outputs = [nn.Linear(tower[-1], 1) for _ in range(num_tasks)]
        for output, rate in zip(outputs, rates, strict=True):
            # Before anything is learnt, each task is as probable as its label is frequent.
            nn.init.constant_(output.bias, float(rate.logit()))
        self.towers = nn.ModuleList(nn.Sequential(_mlp(tower, dropout), output) for output in outputs)

    def forward(self, ids: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.table(ids).flatten(1), numbers], dim=1)
        return torch.cat([tower(h) for tower, h in zip(self.towers, self.backbone(x), strict=True)], dim=1)


class SharedBottom(nn.Module):
    """x [B, I] -> the same [B, H] for each task."""

    def __init__(self, widths: list[int], num_tasks: int, dropout: float) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        self.trunk = _mlp(widths, dropout)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.trunk(x)] * self.num_tasks


class Experts(nn.Module):
    """x [B, I] -> [B, H] for each task: a softmax gate mixes the shared experts and those of the task.

    Without experts of a task it is MMoE, with them one level of PLE.
    """

    def __init__(self, widths: list[int], num_tasks: int, dropout: float, shared: int, own: int) -> None:
        super().__init__()
        self.shared = nn.ModuleList(_mlp(widths, dropout) for _ in range(shared))
        self.own = nn.ModuleList(_mlp(widths, dropout) for _ in range(num_tasks * own))
        self.gates = nn.ModuleList(nn.Linear(widths[0], own + shared, bias=False) for _ in range(num_tasks))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        shared = [expert(x) for expert in self.shared]
        own = [expert(x) for expert in self.own]
        each = len(own) // len(self.gates)
        mixed = []
        for task, gate in enumerate(self.gates):
            experts = torch.stack([*own[task * each : (task + 1) * each], *shared], dim=1)  # [B, E, H]
            mixed.append((gate(x).softmax(dim=1).unsqueeze(2) * experts).sum(dim=1))
        return mixed


def _backbone(section: dict[str, Any], inputs: int, num_tasks: int, dropout: float) -> nn.Module:
    widths = [inputs, *section["hidden"]]
    match section:
        case {"kind": "shared_bottom"}:
            return SharedBottom(widths, num_tasks, dropout)
        case {"kind": "mmoe", "experts": shared}:
            return Experts(widths, num_tasks, dropout, shared, own=0)
        case {"kind": "ple", "levels": 1, "shared_experts": shared, "task_experts": own}:
            return Experts(widths, num_tasks, dropout, shared, own)
    raise ValueError(f"backbone {section} has no reference")


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


def train(job: dict[str, Any], data: Data, learn: Split, valid: Split, seed: int) -> tuple[Model, int]:
    """The model after the epoch that is best on `valid`, in evaluation mode, and that epoch, from 1."""
    _check_recipe(job)
    torch.manual_seed(seed)
    ids, numbers, labels = learn
    model = Model(job, data, labels.mean(dim=0))
    section = job["optimizer"]
    weights = torch.tensor([task.get("weight", 1.0) for task in job["schema"]["tasks"].values()])
    dense = [parameter for name, parameter in model.named_parameters() if not name.startswith("table.")]
    adam = torch.optim.Adam(dense, lr=section["dense"]["lr"])
    tables = RowWiseAdagrad(model.table.weight, section["tables"]["lr"], eps=1e-8)
    step, best, best_epoch, kept = 0, 0.0, 0, model.state_dict()
    for epoch in range(1, job["run"]["epochs"] + 1):
        model.train()
        for rows in torch.randperm(len(ids)).split(job["data"]["batch_size"]):
            for group in adam.param_groups:
                left = 1 - min(step / section["dense"]["schedule"]["decay_steps"], 1)
                group["lr"] = section["dense"]["lr"] * left
            logits = model(ids[rows], numbers[rows])
            loss = functional.binary_cross_entropy_with_logits(logits, labels[rows], reduction="none")
            # Each task's mean over the batch; the last, shorter one takes a step in proportion to its rows.
            (loss.sum(dim=0) / job["data"]["batch_size"] @ weights).backward()
            adam.step()
            adam.zero_grad()
            tables.step()
            step += 1
        score = statistics.fmean(auc(model.eval(), valid))
        if score > best:
            best, best_epoch, kept = score, epoch, copy.deepcopy(model.state_dict())
    model.load_state_dict(kept)
    return model, best_epoch


def _check_recipe(job: dict[str, Any]) -> None:
    """Refuse a job that says more than this program follows."""
    dense, tasks = job["optimizer"]["dense"], job["schema"]["tasks"]
    metrics = [f"{task}/auc" for task in tasks]
    followed = {
        "optimizer.tables": set(job["optimizer"]["tables"]) == {"kind", "lr"}
        and job["optimizer"]["tables"]["kind"] == "rowwise_adagrad",
        "optimizer.dense": set(dense) == {"kind", "lr", "schedule"} and dense["kind"] == "adam",
        "optimizer.dense.schedule": set(dense.get("schedule") or ()) == {"decay", "decay_steps"}
        and dense["schedule"]["decay"] == "linear",
        "schema.tasks": all(
            set(task) <= {"kind", "weight"} and task["kind"] == "binary" for task in tasks.values()
        ),
        "objective": "objective" not in job,
        "run.evaluate": job["run"]["evaluate"] == {"every_epochs": 1, "metric": metrics},
    }
    for place, is_followed in followed.items():
        if not is_followed:
            raise ValueError(f"{place}: what it says is not part of the recipe")


@torch.no_grad()
def auc(model: Model, split: Split) -> list[float]:
    """Of each task."""
    ids, numbers, labels = split
    scores = torch.cat(
        [model(*rows) for rows in zip(ids.split(8192), numbers.split(8192), strict=True)]
    ).numpy()
    return [float(roc_auc_score(labels[:, task], scores[:, task])) for task in range(labels.shape[1])]


def _mlp(widths: list[int], dropout: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        linear = nn.Linear(a, b)
        # torch's own start of a linear map: uniform in +-1/sqrt(a), weight and bias alike.
        layers += [linear, nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers)


def find_job(folder: Path, backbone: str) -> dict[str, Any]:
    """Of the jobs in `folder`, the one with this kind of backbone."""
    jobs = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("job*.yaml"))]
    found = [job for job in jobs if job["model"]["backbone"]["kind"] == backbone]
    if len(found) != 1:
        raise SystemExit(f"{folder}: {len(found)} jobs with the backbone {backbone}; one is needed")
    job: dict[str, Any] = found[0]
    return job


def main() -> None:
    parser = argparse.ArgumentParser(description="The census recipe in plain PyTorch.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder that mtlrec prepare census wrote")
    parser.add_argument("--backbone", default="shared_bottom", choices=("mmoe", "ple", "shared_bottom"))
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ...")
    parser.add_argument("--split", default="test", help="rows that are scored (default: test)")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    job = find_job(arguments.out, arguments.backbone)
    start = time.perf_counter()
    data = Data(arguments.out, job)
    learn, valid = data.read(job["data"]["train"]), data.read(job["data"]["eval"])
    scored = data.read(arguments.split)
    scores, epochs = [], []
    for seed in range(arguments.seeds):
        model, epoch = train(job, data, learn, valid, seed)
        scores.append(auc(model, scored))
        epochs.append(epoch)
        print(f"seed {seed}: epoch {epoch}, AUC {scores[-1]}", file=sys.stderr, flush=True)
    tasks = list(job["schema"]["tasks"])
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
