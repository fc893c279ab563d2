"""A loss or gradient that is not finite: where it comes from, and whether the run stops or passes over it.

B batch rows, K negatives a row, M = B (1 + K) model rows, I trunk input width, T tasks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mtlrec.batch import Batch
from mtlrec.control import Control
from mtlrec.data.order import Position
from mtlrec.data.shards import Dataset
from mtlrec.distributed import World, all_gather_bytes
from mtlrec.job.errors import FinalFailure
from mtlrec.job.run import RunSection
from mtlrec.schema import Schema

_SHOWN = 3
"""Rows, tasks, features and parameters that a message names, of each; the others it counts."""


@dataclass
class Skipped:
    """Batches that were passed over, since the run's beginning. Kept in checkpoints."""

    steps: int = 0
    rows: int = 0
    in_a_row: int = 0
    """Of those steps the last ones, with none between that was applied."""

    @classmethod
    def from_json(cls, value: dict[str, int] | None) -> Skipped:
        """What `to_json` made; nothing was skipped where a checkpoint is older than the count."""
        return cls(**value) if value else cls()

    def to_json(self) -> dict[str, int]:
        return {"steps": self.steps, "rows": self.rows, "in_a_row": self.in_a_row}


@dataclass(frozen=True)
class Evidence:
    """What this rank has of a step that was not applied."""

    batch: Batch
    outputs: torch.Tensor
    """[M, T]"""
    row_losses: torch.Tensor
    """[B, T]"""
    x: torch.Tensor
    """[M, I or more], the trunk's input, perhaps with its padding."""
    gradient: torch.Tensor | None
    """Of x, of the same shape; None where nothing is looked up."""
    parameters: list[str]
    """Dense parameters whose averaged gradient is not finite: the same on every rank."""


class Guard:
    """Told of every step whether it was applied. Every rank has one, and all decide alike."""

    def __init__(
        self, run: RunSection, schema: Schema, world: World, control: Control, skipped: Skipped
    ) -> None:
        self._run, self._schema, self._world, self._control = run, schema, world, control
        self.skipped = skipped

    def consider(
        self, step: int, before: Position, rows: int, dataset: Dataset, evidence: Evidence | None
    ) -> None:
        """Pass over step `step` (from 1) of `rows` rows where there is evidence against it, and count it.

        `before`: where the run stood. `dataset`: what it trains on. Raises FinalFailure on every rank, with
        the same words, where `run.non_finite` does not allow it or too many came one after another. Where
        there is evidence, which every rank then has, it is a collective.
        """
        if evidence is None:
            self.skipped.in_a_row = 0
            return
        found = _merge(
            json.loads(each)
            for each in all_gather_bytes(json.dumps(_examine(self._schema, evidence)).encode(), self._world)
        )
        self.skipped.steps += 1
        self.skipped.rows += rows
        self.skipped.in_a_row += 1
        done = sum(before.done)
        what = f"step {step:,} (epoch {before.epoch}, after {done:,} of its rows) {_describe(found, dataset)}"
        if self._run.non_finite == "stop":
            raise FinalFailure(
                f"{what}; nothing of this step was applied and the last checkpoint stands: look at these "
                "rows, or lower the learning rates; run.non_finite: skip passes over such batches"
            )
        if self.skipped.in_a_row > self._run.max_skipped:
            raise FinalFailure(
                f"{what}; the {self._run.max_skipped} steps before were skipped for the like, and "
                "run.max_skipped allows no more; the last checkpoint stands: lower the learning rates, or go "
                "on from an earlier checkpoint"
            )
        # One line for each would drown the others where a whole shard is like that.
        if self.skipped.steps & (self.skipped.steps - 1) == 0 and self._world.rank == 0:
            text = f"{what}; skipped ({self.skipped.steps} so far; told of the 1st, 2nd, 4th, 8th, ...)"
            self._control.show({"kind": "log", "text": text})


def _examine(schema: Schema, evidence: Evidence) -> dict[str, Any]:
    """This rank's findings, as JSON: rows (numbers in the data set), and names of what is involved."""
    batch, per_positive, losses = evidence.batch, evidence.batch.per_positive, evidence.row_losses
    width = sum(each for _, each in _columns(schema))
    x, outputs = evidence.x[:, :width], ~torch.isfinite(evidence.outputs)
    inputs = ~torch.isfinite(x)
    wrong_losses = _wrong(losses, losses.sum())
    gradients = torch.zeros_like(inputs)
    if evidence.gradient is not None:
        gradient = evidence.gradient[:, :width]
        gradients = _wrong(gradient, torch.linalg.vector_norm(gradient))
    model_rows = (inputs | gradients).any(dim=1) | outputs.any(dim=1)
    # Row b's negatives are the model rows B + b K to B + b K + K - 1.
    rows = model_rows[: len(losses)] | wrong_losses.any(dim=1)
    if per_positive:
        rows = rows | model_rows[len(losses) :].view(-1, per_positive).any(dim=1)
    tasks = wrong_losses.any(dim=0) | outputs.any(dim=0)
    numbers = batch.rows[rows.cpu() & (batch.rows >= 0)]
    return {
        "rows": numbers[:_SHOWN].tolist(),
        "num_rows": len(numbers),
        "tasks": [task.name for task, wrong in zip(schema.tasks, tasks.tolist(), strict=True) if wrong],
        "inputs": _features(schema, inputs.any(dim=0)),
        "gradients": _features(schema, gradients.any(dim=0)),
        "largest": _largest(schema, x, torch.cat([rows, rows.repeat_interleave(per_positive)])),
        "parameters": evidence.parameters,
    }


def _wrong(values: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """bool, of the same shape: what is not finite; where all is and the total is not, what is largest.

    That is what lies within a factor of 1,000 of the very largest.
    """
    finite = torch.isfinite(values)
    if torch.isfinite(total) or not finite.all():
        return ~finite
    size = values.abs()
    return size >= size.max() / 1000


def _columns(schema: Schema) -> list[tuple[str, int]]:
    """Name and width of the parts of the trunk's input."""
    lookups = [
        (look.feature if look.feature == look.table else f"{look.feature} in table {look.table}", look.width)
        for look in schema.lookups
    ]
    return lookups + [(feature.name, feature.width) for feature in schema.dense_features]


def _features(schema: Schema, wrong: torch.Tensor) -> list[str]:
    """wrong: bool [I]. The features that have a column of it."""
    found, start = [], 0
    columns = wrong.tolist()
    for name, width in _columns(schema):
        if any(columns[start : start + width]):
            found.append(name)
        start += width
    return found


def _largest(schema: Schema, x: torch.Tensor, rows: torch.Tensor) -> tuple[float, str] | None:
    """The finite input of greatest size in the rows (bool [M]), and whose it is."""
    if not x.shape[1] or not rows.any():
        return None
    sizes = torch.nan_to_num(x[rows].abs(), nan=0.0, posinf=0.0).amax(dim=0)
    column, start = int(sizes.argmax()), 0
    for name, width in _columns(schema):
        if column < start + width:
            return float(sizes[column]), name
        start += width
    return None


def _merge(findings: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The findings of all ranks as one."""
    all_found = list(findings)
    merged: dict[str, Any] = {
        key: list(dict.fromkeys(name for found in all_found for name in found[key]))
        for key in ("tasks", "inputs", "gradients", "parameters")
    }
    merged["rows"] = sorted(row for found in all_found for row in found["rows"])[:_SHOWN]
    merged["num_rows"] = sum(found["num_rows"] for found in all_found)
    merged["largest"] = max((found["largest"] for found in all_found if found["largest"]), default=None)
    return merged


def _describe(found: dict[str, Any], dataset: Dataset) -> str:
    """In one line what is not finite, and in which rows."""
    parts = []
    if found["tasks"]:
        parts.append(f"loss of {_some(found['tasks'])}")
    if found["inputs"]:
        parts.append(f"input of {_some(found['inputs'])}")
    if found["gradients"] and not parts:
        # Behind a loss that is not finite every gradient is not.
        parts.append(f"gradient of {_some(found['gradients'])}")
    if not found["num_rows"]:
        parts.append(f"gradient of the weights {_some(found['parameters']) or 'of all layers together'}")
    text = f"is not finite: {'; '.join(parts)}"
    if found["num_rows"]:
        rows = [_place(row, dataset) for row in found["rows"]]
        text += f"; in {found['num_rows']} row(s): {_some(rows, found['num_rows'])}"
    if found["largest"]:
        size, name = found["largest"]
        text += f"; their largest input is {name} with {size:.4g}"
    return text


def _place(row: int, dataset: Dataset) -> str:
    group = int(np.searchsorted(dataset.group_start, row, side="right")) - 1
    path = dataset.shards[int(dataset.group_shard[group])].path
    at = row - int(dataset.group_start[group])
    return f"{row} ({path}, row group {int(dataset.group_index[group])}, row {at})"


def _some(names: Sequence[str], count: int | None = None) -> str:
    more = (count or len(names)) - len(names[:_SHOWN])
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more else "")
