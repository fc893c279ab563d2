"""Section `run`: where and how, nothing of what is learnt; all of it may change when a run resumes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from mtlrec.job.section import Section

ShardingKind = Literal["auto", "row_wise", "table_wise", "column_wise", "data_parallel"]

MAX_WORKERS = 4096
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class CheckpointSection(Section):
    every_steps: int | None = Field(default=None, ge=1)
    """Save every so many steps. The end always saves, and so does a measurement that is the best so far."""
    every_minutes: float | None = Field(default=None, gt=0)
    """Save once so many minutes have passed since the last save began. Null for both: at the end alone."""
    mode: Literal["async", "sync"] = "async"
    """async: training waits only for a copy of each worker's rows in host memory, and goes on while it is
    written; the plan leaves room for that copy. sync: training waits until the checkpoint is complete. So it
    does at a notice that a node will go, where no checkpoint but the last was asked for."""
    keep_last: int = Field(default=2, ge=1)
    """Complete checkpoints that are kept, beside the best."""


class EvaluateSection(Section):
    """Measure on data.eval while training, keep the best checkpoint, and stop when nothing gets better."""

    every_steps: int | None = Field(default=None, ge=1)
    every_epochs: int | None = Field(default=None, ge=1)
    """Null for both: every epoch."""
    metric: list[str] = Field(min_length=1)
    """What decides which checkpoint is best: task/metric or scenario/task/metric; of several, the mean."""
    patience: int | None = Field(default=None, ge=1)
    """Stop after so many measurements without a better one; null: train to the end."""

    @model_validator(mode="after")
    def _one_interval(self) -> EvaluateSection:
        if self.every_steps is not None and self.every_epochs is not None:
            raise ValueError("give every_steps or every_epochs, not both")
        return self


class WorkersSection(Section):
    """As many workers as there is room for, within bounds; training goes on where their number changes."""

    min: int = Field(ge=1, le=MAX_WORKERS)
    """Where the cluster has room for fewer, the command is refused; a run that has begun waits for them."""
    max: int = Field(ge=1, le=MAX_WORKERS)

    @model_validator(mode="after")
    def _in_order(self) -> WorkersSection:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is more than max {self.max}")
        return self


Workers = Annotated[
    Annotated[int, Field(ge=0, le=MAX_WORKERS), Tag("number")] | Annotated[WorkersSection, Tag("elastic")],
    # A mistake is told of what was meant, not of both.
    Discriminator(lambda value: "elastic" if isinstance(value, dict | WorkersSection) else "number"),
]


class RunSection(Section):
    storage: str = "runs"
    """Folder of run folders, a path or a URL. The run's own folder in it has the job's name."""
    workers: Workers = 2
    """Ray Train workers; 0: one plain process, without Ray; {min, max}: as many as there is room for."""
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = Field(default=1, ge=1)
    """Arithmetic threads of each worker on CPU."""
    epochs: int = Field(default=1, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after so many steps in all, though epochs remain; null: after `epochs`."""
    checkpoint: CheckpointSection = CheckpointSection()
    evaluate: EvaluateSection | None = None
    """Null: the finished model is measured, once."""
    seeds: list[Seed] | None = Field(default=None, min_length=1)
    """Train once with each, as runs NAME-seedS, and report mean and deviation; null: with `seed` alone."""
    max_failures: int | None = Field(default=3, ge=0)
    """Worker failures that Ray Train repairs by going on from the last checkpoint; null: always repaired."""
    max_preemptions: int | None = Field(default=None, ge=0)
    """As often workers may be lost with a node that said before that it would go; null: always repaired."""
    non_finite: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradients are not finite: end the run, or apply nothing of it, count it, go on."""
    max_skipped: int = Field(default=100, ge=1)
    """Steps that may be skipped one after another; one more ends the run."""
    sharding: ShardingKind | dict[str, ShardingKind] = "auto"
    """How tables are spread over workers: for all, or by table name; auto: TorchRec's planner decides."""
    report_every_s: float = Field(default=2.0, gt=0)
    """Seconds between progress reports."""
    record_rows: bool = False
    """Write the number of every trained row beside the run, in `rows/`: proof of what was trained."""
    step_timeout_s: float = Field(default=600.0, gt=0, le=86400)
    """A worker that makes no progress for so long writes where its threads stand, and ends; so do the others.

    Progress is a step, an exchange between workers, a piece of a save or a load. Ray Train restarts workers
    that ended so, as after any failure.
    """

    @property
    def saves_beside(self) -> bool:
        """Checkpoints are due while training goes on, and written from a copy of each worker's rows."""
        section = self.checkpoint
        asked = section.every_steps or section.every_minutes or self.evaluate
        return section.mode == "async" and bool(asked)

    @property
    def fewest_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers.min

    @property
    def most_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers.max
