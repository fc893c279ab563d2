"""Which of a run's measurements is the best, when the next is due, and when it is time to stop. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mtlrec.data.order import Position
from mtlrec.job.errors import InputError
from mtlrec.job.metric import SMALLER_IS_BETTER, score, split
from mtlrec.job.run import EvaluateSection


@dataclass
class Judge:
    """Follows `run.evaluate`; its state travels in every checkpoint, so that a resume decides alike."""

    section: EvaluateSection | None
    best: float | None = None
    """The best score so far: greater is better."""
    best_step: int | None = None
    since: int = 0
    """Measurements since then."""
    last: float | None = None
    """The score of the last measurement."""
    owes: bool = False
    """A measurement was due at this step and has not been made: it was broken off."""

    def is_due(self, step: int, before: Position, after: Position, ends: bool) -> bool:
        """Whether to measure after the step that led from position `before` to `after`.

        step: how many were taken, this one included. ends: it is the run's last, which is always measured.
        """
        if self.section is None or ends:
            return self.section is not None
        if self.section.every_steps is not None:
            return step % self.section.every_steps == 0
        every = self.section.every_epochs or 1
        return after.epoch > before.epoch and after.epoch % every == 0

    def consider(self, metrics: dict[str, Any], step: int) -> None:
        """Take note of a measurement.

        Raises InputError where the metric is undefined on data.eval, which no further step changes.
        """
        assert self.section is not None
        value = score(metrics, self.section.metric)
        if value is None:
            names = ", ".join(self.section.metric)
            raise InputError(
                f"run.evaluate.metric: {names} is undefined on data.eval at step {step:,} (`mtlrec evaluate "
                "--json` says why): measure on data with both labels, or name another metric"
            )
        if self.best is None or value > self.best:
            self.best, self.best_step, self.since = value, step, 0
        else:
            self.since += 1
        self.last, self.owes = value, False

    def describe(self, step: int) -> str:
        """The last measurement in words."""
        assert self.section is not None and self.last is not None and self.best is not None
        sign = -1 if split(self.section.metric[0])[2] in SMALLER_IS_BETTER else 1
        text = f"step {step:,}: {', '.join(self.section.metric)} {sign * self.last:.5f}"
        if self.best_step == step:
            return f"{text}, the best so far"
        text += f" (best {sign * self.best:.5f} at step {self.best_step:,})"
        return f"{text}; no better for {self.since} measurements: done" if self.is_over else text

    @property
    def is_over(self) -> bool:
        """Nothing has become better for as long as the job bears."""
        return (
            self.section is not None
            and self.section.patience is not None
            and (self.since >= self.section.patience)
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "metric": self.section.metric if self.section is not None else None,
            "best": self.best,
            "best_step": self.best_step,
            "since": self.since,
            "last": self.last,
            "owes": self.owes,
        }

    def load(self, state: dict[str, Any] | None) -> bool:
        """Take over what `to_json` gave; False, and nothing taken, where it judged by other metrics."""
        if self.section is None or not state or state["metric"] != self.section.metric:
            return False
        self.best, self.best_step = state["best"], state["best_step"]
        self.since, self.last = state["since"], state["last"]
        self.owes = state.get("owes", False)  # older versions broke none off
        return True
