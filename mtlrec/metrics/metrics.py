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

from mtlrec.metrics.groups import DEFAULT_CAP as DEFAULT_GROUP_CAP
from mtlrec.metrics.groups import Groups
from mtlrec.metrics.ranking import DEFAULT_K, NEGATIVE, NO_LABEL, POSITIVE, summary
from mtlrec.metrics.sketch import DEFAULT_CAP, ScoreSketch, auc, score_keys

ALL = "all"
"""Names the total over scenarios."""

_MAGIC = b"mtlrec metrics 1\n"
_BUFFER_ROWS = 2**16
_BLOCK = 2**13
"""Rows whose losses are computed at a time: what lies between stays in the cache."""
_SKETCH_BUDGET = 2**22
"""Keys of all sketches together (20 bytes each), where there are many scenarios and tasks."""
_ROWS, _POSITIVES, _NOT_FINITE = range(3)
_FIRST, _SECOND = range(2)
"""Of a binary task log loss and predicted probability, of a regression squared and absolute error: sums."""
_GROUP_ARRAYS = ("<u8", "<i4", "<u8", "<f4", "u1")
_NO_POSITIVE = "no user has a positive row"
_KINDS = ("binary", "regression", "pairwise")


class Metrics:
    """AUC, log loss and calibration of binary tasks, AUC of pairwise ones, RMSE and MAE of regressions.

    With `grouped`, for binary and pairwise tasks also what their ranking within the rows of each user and
    scenario is worth: GAUC, nDCG@k, recall@k, hit@k, MRR (`Ranked.summary`).

    Rows, the area under the ROC curve and the ranking metrics do not depend on the order of the rows or of
    the merges, sums of losses only in their last bits (float64). Memory is bounded whatever the number of
    rows (`ScoreSketch`, `Groups`).
    """

    def __init__(
        self,
        scenarios: Sequence[str],
        tasks: Sequence[tuple[str, str]],
        cap: int | None = None,
        grouped: bool = False,
        k: int = DEFAULT_K,
        group_cap: int = DEFAULT_GROUP_CAP,
    ) -> None:
        """`scenarios`: names by index; ["all"] alone: no scenarios.

        `tasks`: (name, "binary" | "regression" | "pairwise").

        `cap`: distinct scores that each scenario and task holds exactly; None: 2**18, or fewer (never below
        2**12) where the number of scenarios times tasks would take more than about 80 MB.

        `grouped`: rows come with their users. `k`: places that nDCG@k, recall@k and hit@k look at.
        `group_cap`: outputs (rows times tasks that are ranked) up to which the ranking metrics are exact;
        beyond, they are those of a sample of the groups. 2**24 take about 400 MB.
        """
        self.scenarios, self.tasks = tuple(scenarios), tuple((name, kind) for name, kind in tasks)
        unknown = [kind for _, kind in self.tasks if kind not in _KINDS]
        if not self.scenarios or not self.tasks or unknown or k < 1:
            raise ValueError(f"metrics need scenarios, k of at least 1, and tasks of {_KINDS}, not {unknown}")
        if cap is None:
            per_sketch = _SKETCH_BUDGET // (len(self.scenarios) * len(self.tasks))
            cap = min(DEFAULT_CAP, max(2**12, per_sketch))
        self.cap, self.k = cap, k
        self._ranked = [t for t, (_, kind) in enumerate(self.tasks) if grouped and kind != "regression"]
        self._groups = Groups(len(self._ranked), group_cap) if self._ranked else None
        shape = (len(self.scenarios), len(self.tasks))
        self._counts = np.zeros((*shape, 3), np.int64)
        self._sums = np.zeros((*shape, 2), np.float64)
        self._sketches: dict[tuple[int, int], ScoreSketch] = {}
        self._buffered = 0
        self._outputs, self._labels = np.zeros((2, shape[1], _BUFFER_ROWS), np.float32)
        self._valid = np.zeros((shape[1], _BUFFER_ROWS), bool)
        self._scenario = np.zeros(_BUFFER_ROWS, np.int32)
        self._losses = np.zeros((2, _BUFFER_ROWS))
        # Small numbers are sorted faster.
        self._class_type = np.min_scalar_type(2 * shape[0])
        self._users, self._ties = np.zeros((2, _BUFFER_ROWS if self._ranked else 0), np.uint64)

    def update(
        self,
        outputs: NDArray[np.float32],
        labels: NDArray[np.float32],
        valid: NDArray[np.bool_],
        scenario: NDArray[np.int64],
        num_rows: int | None = None,
        users: NDArray[np.uint64] | None = None,
        ties: NDArray[np.uint64] | None = None,
    ) -> None:
        """Add a batch; rows from `num_rows` on are padding.

        `outputs` [B, T]: logits of binary tasks, scores of pairwise ones, values of regressions. `labels`
        [B, T]: 0 or 1, or a value. `valid` [B, T]: the row has a label for the task. `scenario` [B]: index
        into the scenarios. With `grouped`: `users` [B], a hash of each row's user, NO_GROUP where it has
        none, and `ties` [B], a hash of its number in the data set, by which rows of one score are ranked.
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
            if self._ranked:
                assert users is not None and ties is not None, "grouped metrics need users and ties"
                self._users[into], self._ties[into] = users[begin:end], ties[begin:end]
            self._buffered += end - begin
            begin = end
            if self._buffered == _BUFFER_ROWS:
                self._flush()

    def merge(self, other: Metrics) -> None:
        """Add what `other` has seen. ValueError if it was made with other arguments."""
        if self._made_with() != other._made_with():
            raise ValueError("metrics of different scenarios, tasks, caps or k cannot be merged")
        self._flush()
        other._flush()
        self._counts += other._counts
        self._sums += other._sums
        for place, sketch in other._sketches.items():
            self._sketch(place).merge(sketch)
        if self._groups is not None and other._groups is not None:
            self._groups.merge(other._groups)

    def _made_with(self) -> tuple[object, ...]:
        grouped = (self.k, self._groups.cap) if self._groups is not None else None
        return self.scenarios, self.tasks, self.cap, grouped

    def to_bytes(self) -> bytes:
        """Everything seen so far, for another process: a JSON header and raw little-endian arrays."""
        self._flush()
        held = [(place, self._sketches[place].arrays()) for place in sorted(self._sketches)]
        header: dict[str, Any] = {
            "scenarios": self.scenarios,
            "tasks": self.tasks,
            "cap": self.cap,
            "sketches": [[*place, shift, len(keys)] for place, (shift, keys, _, _) in held],
        }
        if self._groups is not None:
            rows = self._groups.arrays()
            header["groups"] = [self.k, self._groups.cap, self._groups.shift, len(rows[0])]
        text = json.dumps(header).encode()
        arrays: list[NDArray[Any]] = [self._counts.astype("<i8"), self._sums.astype("<f8")]
        for _, (_, keys, positives, negatives) in held:
            arrays += [keys.astype("<u4"), positives.astype("<i8"), negatives.astype("<i8")]
        if self._groups is not None:
            for array, array_kind in zip(rows, _GROUP_ARRAYS, strict=True):
                arrays.append(np.asarray(array, array_kind))
        # Arrays lend their memory: the one copy is the result.
        return b"".join([_MAGIC, struct.pack("<Q", len(text)), text, *(array.data for array in arrays)])

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
        tasks = [(name, kind) for name, kind in header["tasks"]]
        k, group_cap, group_shift, rows = header.get("groups", (DEFAULT_K, DEFAULT_GROUP_CAP, 0, 0))
        metrics = cls(header["scenarios"], tasks, header["cap"], "groups" in header, k, group_cap)
        metrics._counts = raw.take("<i8", metrics._counts.size).reshape(metrics._counts.shape)
        metrics._sums = raw.take("<f8", metrics._sums.size).reshape(metrics._sums.shape)
        for scenario, task, shift, num_keys in header["sketches"]:
            keys = raw.take("<u4", num_keys)
            positives, negatives = raw.take("<i8", num_keys), raw.take("<i8", num_keys)
            sketch = ScoreSketch.from_arrays(metrics.cap, shift, keys, positives, negatives)
            metrics._sketches[scenario, task] = sketch
        if metrics._groups is not None:
            num_ranked = len(metrics._ranked)
            groups, scenarios, ties = (raw.take(kind, rows) for kind in _GROUP_ARRAYS[:3])
            scores, labels = (
                raw.take(kind, num_ranked * rows).reshape(num_ranked, rows) for kind in _GROUP_ARRAYS[3:]
            )
            state = (groups, scenarios, ties, scores, labels)
            metrics._groups = Groups.from_arrays(group_cap, group_shift, state)
        raw.check_end()
        return metrics

    def result(self) -> dict[str, dict[str, dict[str, Any]]]:
        """{"all": {task: {metric: value}}, scenario: {task: ...}}, plain JSON.

        Binary: auc, logloss (mean, nats), calibration (sum of predicted probabilities / positive rows), rows,
        positives. Pairwise: auc, rows, positives. Both, with `grouped`: gauc, ndcg@k, recall@k, hit@k, mrr,
        and `groups`, the number of groups with a positive; a group is the rows of one user in one scenario,
        in "all" too. `sampled` is true where there were too many rows to hold them all. Regression: rmse,
        mae, rows, and positives null. An undefined metric is null, and "reasons" beside it says why. Without
        scenarios there is "all" alone.
        """
        self._flush()
        places = range(len(self.scenarios))
        sums = self._groups.ranking_sums(len(places), self.k) if self._groups is not None else ()
        ranked = dict(zip(self._ranked, sums, strict=True))
        result = {ALL: self._describe(places, ranked)}
        if self.scenarios != (ALL,):
            result |= {name: self._describe([s], ranked) for s, name in enumerate(self.scenarios)}
        return result

    def _describe(
        self, scenarios: Sequence[int], ranked: dict[int, NDArray[np.float64]]
    ) -> dict[str, dict[str, Any]]:
        """The tasks' metrics over the rows of `scenarios`. `ranked`: by task, as of `Groups.ranking_sums`."""
        described: dict[str, dict[str, Any]] = {}
        for t, (name, kind) in enumerate(self.tasks):
            rows, positives, not_finite = (int(self._counts[scenarios, t, i].sum()) for i in range(3))
            first, second = (float(self._sums[scenarios, t, i].sum()) for i in range(2))
            reason = None
            if rows == 0:
                reason = "no row has a label"
            elif not_finite:
                reason = f"{not_finite} of {rows} predictions are not finite"
            values: dict[str, Any] = {}
            counts: dict[str, Any] = {"rows": rows, "positives": None if kind == "regression" else positives}
            reasons: dict[str, str] = {}
            if kind == "regression":
                values["rmse"] = None if reason else (first / rows) ** 0.5
                values["mae"] = None if reason else second / rows
            else:
                sketches = [self._sketches[s, t] for s in scenarios if (s, t) in self._sketches]
                values["auc"] = None if reason else auc(sketches)
                if positives in (0, rows):
                    reasons["auc"] = f"every label is {int(positives > 0)}"
            if kind == "binary":
                values["logloss"] = None if reason else first / rows
                values["calibration"] = None if reason or not positives else second / positives
                if not positives:
                    reasons["calibration"] = "every label is 0"
            if t in ranked:
                ranking = summary(ranked[t][scenarios].sum(axis=0), self.k)
                counts["groups"] = ranking.pop("groups")
                if self._groups is not None and self._groups.shift:
                    counts["sampled"] = True
                values |= dict.fromkeys(ranking) if reason else ranking
                if ranking["gauc"] is None:
                    reasons["gauc"] = "no user has both labels"
                if not counts["groups"]:
                    reasons |= dict.fromkeys([name for name in ranking if name != "gauc"], _NO_POSITIVE)
            if reason:
                reasons = dict.fromkeys(values, reason)
            described[name] = {**values, **counts}
            if reasons:
                described[name]["reasons"] = reasons
        return described

    def _sketch(self, place: tuple[int, int]) -> ScoreSketch:
        return self._sketches.setdefault(place, ScoreSketch(self.cap))

    def _flush(self) -> None:
        """Count the buffered rows."""
        rows, self._buffered = self._buffered, 0
        if rows == 0:
            return
        scenario = self._scenario[:rows]
        if self._groups is not None:
            ranked = self._ranked if len(self._ranked) < len(self.tasks) else slice(None)
            states = np.where(self._labels[ranked, :rows] > 0.5, np.uint8(POSITIVE), np.uint8(NEGATIVE))
            states[~self._valid[ranked, :rows]] = NO_LABEL
            scores = self._outputs[ranked, :rows]
            self._groups.update(self._users[:rows], scenario, scores, states, self._ties[:rows])
        for t, (_, kind) in enumerate(self.tasks):
            # Scenario after scenario, of each the negative rows first; at the end those without a label.
            unlabelled = 2 * len(self.scenarios)
            classes = scenario.astype(self._class_type) * 2 + (self._labels[t, :rows] > 0.5)
            classes[~self._valid[t, :rows]] = unlabelled
            counts = np.bincount(classes, minlength=unlabelled + 1)[:-1].reshape(-1, 2)
            order = np.argsort(classes, kind="stable")[: counts.sum()]
            self._count(t, kind, counts, self._outputs[t][order], self._labels[t][order])

    def _count(
        self,
        t: int,
        kind: str,
        counts: NDArray[np.int64],
        outputs: NDArray[np.float32],
        labels: NDArray[np.float32],
    ) -> None:
        """Add rows with a label for task `t`, which come by scenario, negative ones first.

        `counts` [S, 2]: how many negative and positive ones each scenario has.
        """
        rows = counts.sum(axis=1)
        ends = np.cumsum(rows)
        some = np.flatnonzero(rows)
        self._counts[:, t, _ROWS] += rows
        finite = np.isfinite(outputs)
        if not finite.all():
            wrong = np.searchsorted(ends, np.flatnonzero(~finite), side="right")
            self._counts[:, t, _NOT_FINITE] += np.bincount(wrong, minlength=len(rows))
        if kind != "pairwise" and len(some):
            losses = self._losses[:, : len(outputs)]
            for begin in range(0, len(outputs), _BLOCK):
                block = slice(begin, begin + _BLOCK)
                losses[:, block] = (binary_losses if kind == "binary" else regression_errors)(
                    outputs[block], labels[block]
                )
            self._sums[some, t] += np.add.reduceat(losses, (ends - rows)[some], axis=1).T
        if kind == "regression":
            return
        self._counts[:, t, _POSITIVES] += counts[:, 1]
        keys = score_keys(outputs)
        for s in some.tolist():
            # One value that is not finite leaves the task's metrics undefined: nothing to rank then.
            if not self._counts[s, t, _NOT_FINITE]:
                begin, between = int(ends[s] - rows[s]), int(ends[s] - counts[s, 1])
                # Copied, so that a rare scenario's few rows do not hold the memory of all.
                self._sketch((s, t)).update_keys(keys[between : ends[s]].copy(), keys[begin:between].copy())


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


def binary_losses(
    logits: NDArray[np.float32], labels: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Each row's log loss and predicted probability, to about 3e-7 of their value.

    `labels`: 0 or 1. A logit that is not finite gives whatever it gives.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        # numpy's exp of float32 is several times as fast as that of float64.
        small = np.exp(-np.abs(logits)).astype(np.float64)
        whole = 1 + small
        losses = np.log(whole)
        losses += np.maximum(logits, 0) - logits * labels  # exact: it is 0 or the logit's size
        return losses, np.where(logits >= 0, 1, small) / whole


def regression_errors(
    values: NDArray[np.float32], labels: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Each row's squared and absolute error."""
    with np.errstate(invalid="ignore", over="ignore"):
        errors = np.abs(values.astype(np.float64) - labels)
        return errors**2, errors
