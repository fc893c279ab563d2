"""What predictions are worth, per scenario and task: accumulated row by row, merged over workers.

B batch rows, S scenarios, T tasks.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtlrec.metrics.sketch import DEFAULT_CAP, ScoreSketch

ALL = "all"
"""Names the total over scenarios."""

_MAGIC = b"mtlrec metrics 1\n"
_BUFFER_ROWS = 2**16
_SKETCH_BUDGET = 2**22
"""Keys of all sketches together (20 bytes each), where there are many scenarios and tasks."""
_ROWS, _POSITIVES, _NOT_FINITE = range(3)
_FIRST, _SECOND = range(2)
"""Sums of a binary task: log loss and predicted probability; of a regression: squared and absolute error."""


class Metrics:
    """AUC, log loss and calibration of binary tasks, RMSE and MAE of regressions.

    Rows and the area under the ROC curve do not depend on the order of the rows or of the merges, sums of
    losses only in their last bits (float64). Memory is bounded whatever the number of rows (`ScoreSketch`).
    """

    def __init__(
        self, scenarios: Sequence[str], tasks: Sequence[tuple[str, str]], cap: int | None = None
    ) -> None:
        """`scenarios`: names by index; ["all"] alone: no scenarios. `tasks`: (name, "binary" | "regression").

        `cap`: distinct scores that each scenario and task holds exactly; None: 2**18, or fewer (never below
        2**12) where the number of scenarios times tasks would take more than about 80 MB.
        """
        self.scenarios, self.tasks = tuple(scenarios), tuple((name, kind) for name, kind in tasks)
        unknown = [kind for _, kind in self.tasks if kind not in ("binary", "regression")]
        if not self.scenarios or not self.tasks or unknown:
            raise ValueError(f"metrics need scenarios, and binary or regression tasks, not {unknown}")
        if cap is None:
            per_sketch = _SKETCH_BUDGET // (len(self.scenarios) * len(self.tasks))
            cap = min(DEFAULT_CAP, max(2**12, per_sketch))
        self.cap = cap
        shape = (len(self.scenarios), len(self.tasks))
        self._counts = np.zeros((*shape, 3), np.int64)
        self._sums = np.zeros((*shape, 2), np.float64)
        self._sketches: dict[tuple[int, int], ScoreSketch] = {}
        self._buffered = 0
        self._outputs, self._labels = np.zeros((2, shape[1], _BUFFER_ROWS), np.float32)
        self._valid = np.zeros((shape[1], _BUFFER_ROWS), bool)
        self._scenario = np.zeros(_BUFFER_ROWS, np.int32)

    def update(
        self,
        outputs: NDArray[np.float32],
        labels: NDArray[np.float32],
        valid: NDArray[np.bool_],
        scenario: NDArray[np.int64],
        num_rows: int | None = None,
    ) -> None:
        """Add a batch; rows from `num_rows` on are padding.

        `outputs` [B, T]: logits of binary tasks, values of regressions. `labels` [B, T]: 0 or 1, or a value.
        `valid` [B, T]: the row has a label for the task. `scenario` [B]: index into the scenarios.
        """
        rows = len(outputs) if num_rows is None else num_rows
        assert outputs.shape == labels.shape == valid.shape == (len(scenario), len(self.tasks))
        begin = 0
        while begin < rows:
            end = min(rows, begin + _BUFFER_ROWS - self._buffered)
            into = slice(self._buffered, self._buffered + end - begin)
            self._outputs[:, into] = outputs[begin:end].T
            self._labels[:, into] = labels[begin:end].T
            self._valid[:, into] = valid[begin:end].T
            self._scenario[into] = scenario[begin:end]
            self._buffered += end - begin
            begin = end
            if self._buffered == _BUFFER_ROWS:
                self._flush()

    def merge(self, other: Metrics) -> None:
        """Add what `other` has seen. ValueError if it is of other scenarios, tasks or cap."""
        if (self.scenarios, self.tasks, self.cap) != (other.scenarios, other.tasks, other.cap):
            raise ValueError("metrics of different scenarios, tasks or caps cannot be merged")
        self._flush()
        other._flush()
        self._counts += other._counts
        self._sums += other._sums
        for place, sketch in other._sketches.items():
            self._sketch(place).merge(sketch)

    def to_bytes(self) -> bytes:
        """Everything seen so far, for another process: a JSON header and raw little-endian arrays."""
        self._flush()
        held = [(place, self._sketches[place].arrays()) for place in sorted(self._sketches)]
        header = {
            "scenarios": self.scenarios,
            "tasks": self.tasks,
            "cap": self.cap,
            "sketches": [[*place, shift, len(keys)] for place, (shift, keys, _, _) in held],
        }
        text = json.dumps(header).encode()
        arrays = [self._counts.astype("<i8"), self._sums.astype("<f8")]
        for _, (_, keys, positives, negatives) in held:
            arrays += [keys.astype("<u4"), positives.astype("<i8"), negatives.astype("<i8")]
        parts = [_MAGIC, struct.pack("<Q", len(text)), text, *(array.tobytes() for array in arrays)]
        return b"".join(parts)

    @classmethod
    def from_bytes(cls, data: bytes) -> Metrics:
        """The inverse of `to_bytes`. ValueError where `data` is not what it wrote."""
        if data[: len(_MAGIC)] != _MAGIC or len(data) < len(_MAGIC) + 8:
            raise ValueError("these bytes are not metrics, or of another version")
        (length,) = struct.unpack_from("<Q", data, len(_MAGIC))
        start = len(_MAGIC) + 8
        if length > len(data) - start:
            raise ValueError("these metrics are cut short")
        header = json.loads(data[start : start + length])
        raw = _Raw(data, start + length)
        metrics = cls(header["scenarios"], [(name, kind) for name, kind in header["tasks"]], header["cap"])
        metrics._counts = raw.take("<i8", metrics._counts.size).reshape(metrics._counts.shape)
        metrics._sums = raw.take("<f8", metrics._sums.size).reshape(metrics._sums.shape)
        for scenario, task, shift, num_keys in header["sketches"]:
            keys = raw.take("<u4", num_keys)
            positives, negatives = raw.take("<i8", num_keys), raw.take("<i8", num_keys)
            sketch = ScoreSketch.from_arrays(metrics.cap, shift, keys, positives, negatives)
            metrics._sketches[scenario, task] = sketch
        raw.check_end()
        return metrics

    def result(self) -> dict[str, dict[str, dict[str, Any]]]:
        """{"all": {task: {metric: value}}, scenario: {task: ...}}, plain JSON.

        Binary: auc, logloss (mean, nats), calibration (sum of predicted probabilities / positive rows), rows,
        positives. Regression: rmse, mae, rows, and positives null. An undefined metric is null, and "reasons"
        beside it says why. Without scenarios there is "all" alone.
        """
        self._flush()
        result = {ALL: self._describe(range(len(self.scenarios)))}
        if self.scenarios != (ALL,):
            result |= {name: self._describe([s]) for s, name in enumerate(self.scenarios)}
        return result

    def _describe(self, scenarios: Sequence[int]) -> dict[str, dict[str, Any]]:
        """The tasks' metrics over the rows of `scenarios`."""
        described: dict[str, dict[str, Any]] = {}
        for t, (name, kind) in enumerate(self.tasks):
            rows, positives, not_finite = (int(self._counts[scenarios, t, i].sum()) for i in range(3))
            first, second = (float(self._sums[scenarios, t, i].sum()) for i in range(2))
            reason = None
            if rows == 0:
                reason = "no row has a label"
            elif not_finite:
                reason = f"{not_finite} of {rows} predictions are not finite"
            values: dict[str, float | None] = {}
            reasons: dict[str, str] = {}
            if kind == "binary":
                values["auc"] = None if reason else self._auc(scenarios, t)
                values["logloss"] = None if reason else first / rows
                values["calibration"] = None if reason or not positives else second / positives
                if not reason and positives in (0, rows):
                    reasons["auc"] = f"every label is {int(positives > 0)}"
                if not reason and not positives:
                    reasons["calibration"] = "every label is 0"
            else:
                values["rmse"] = None if reason else (first / rows) ** 0.5
                values["mae"] = None if reason else second / rows
            if reason:
                reasons = dict.fromkeys(values, reason)
            described[name] = {**values, "rows": rows, "positives": positives if kind == "binary" else None}
            if reasons:
                described[name]["reasons"] = reasons
        return described

    def _auc(self, scenarios: Sequence[int], task: int) -> float | None:
        total = ScoreSketch(self.cap)
        for scenario in scenarios:
            if (scenario, task) in self._sketches:
                total.merge(self._sketches[scenario, task])
        return total.auc()

    def _sketch(self, place: tuple[int, int]) -> ScoreSketch:
        return self._sketches.setdefault(place, ScoreSketch(self.cap))

    def _flush(self) -> None:
        """Count the buffered rows, scenario by scenario."""
        rows, self._buffered = self._buffered, 0
        if rows == 0:
            return
        scenario = self._scenario[:rows]
        order = np.argsort(scenario, kind="stable") if len(self.scenarios) > 1 else np.arange(rows)
        for t, (_, kind) in enumerate(self.tasks):
            chosen = order[self._valid[t, order]]
            outputs, labels = self._outputs[t, chosen], self._labels[t, chosen]
            first, second = (_binary_sums if kind == "binary" else _regression_sums)(outputs, labels)
            finite = np.isfinite(outputs)
            ends = np.cumsum(np.bincount(scenario[chosen], minlength=len(self.scenarios)))
            begin = 0
            for s, end in enumerate(ends.tolist()):
                if end == begin:
                    continue
                part = slice(begin, end)
                begin = end
                positive = labels[part] > 0.5
                count = self._counts[s, t]
                count[_ROWS] += len(positive)
                count[_NOT_FINITE] += len(positive) - np.count_nonzero(finite[part])
                self._sums[s, t, _FIRST] += first[part].sum()
                self._sums[s, t, _SECOND] += second[part].sum()
                if kind == "binary":
                    count[_POSITIVES] += np.count_nonzero(positive)
                    # One value that is not finite leaves the task's metrics undefined: nothing to rank then.
                    if not count[_NOT_FINITE]:
                        self._sketch((s, t)).update(outputs[part], positive)


class _Raw:
    """Arrays one after the other in `data`, from `start` on."""

    def __init__(self, data: bytes, start: int) -> None:
        self._data, self._start = data, start

    def take(self, kind: str, count: int) -> NDArray[Any]:
        size = count * np.dtype(kind).itemsize
        if count < 0 or size > len(self._data) - self._start:
            raise ValueError("these metrics are cut short")
        array = np.frombuffer(self._data, kind, count, self._start)
        self._start += size
        # A copy in the machine's own byte order, which may be written to.
        return array.astype(array.dtype.newbyteorder("="))

    def check_end(self) -> None:
        if self._start != len(self._data):
            raise ValueError("these metrics are followed by something else")


def _binary_sums(
    logits: NDArray[np.float32], labels: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Each row's log loss and predicted probability. A logit that is not finite gives whatever it gives."""
    with np.errstate(invalid="ignore", over="ignore"):
        z = logits.astype(np.float64)
        small = np.exp(-np.abs(z))
        losses = np.maximum(z, 0) - z * labels + np.log(1 + small)
        return losses, np.where(z >= 0, 1, small) / (1 + small)


def _regression_sums(
    values: NDArray[np.float32], labels: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Each row's squared and absolute error."""
    with np.errstate(invalid="ignore", over="ignore"):
        errors = np.abs(values.astype(np.float64) - labels)
        return errors**2, errors
