"""Section `optimizer`: one for the tables (fused into their backward), one for everything dense."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mtlrec.job.section import Section

Beta = Annotated[float, Field(ge=0, lt=1)]


class TablesOptimizer(Section):
    """Fused into the backward of the tables: only the rows that a batch touched are updated."""

    kind: Literal["rowwise_adagrad", "adagrad", "sgd", "adam", "partial_rowwise_adam", "lamb"] = (
        "rowwise_adagrad"
    )
    """adam, partial_rowwise_adam and lamb run on CUDA only."""
    lr: float = Field(default=0.05, gt=0)
    eps: float = Field(default=1e-8, gt=0)
    """Adagrad and Adam families: added to the root of the second moment."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Adam family only."""


class Schedule(Section):
    """Factor of the dense learning rate at a step. Tables keep theirs."""

    warmup_steps: int = Field(default=0, ge=0)
    """Linear from 0 to 1 over so many steps."""
    decay: Literal["none", "linear", "cosine"] = "none"
    """After the warm-up, from 1 to `floor` over `decay_steps`, then constant."""
    decay_steps: int | None = Field(default=None, ge=1)
    floor: float = Field(default=0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _decay_has_an_end(self) -> Schedule:
        if self.decay != "none" and self.decay_steps is None:
            raise ValueError(f"decay_steps: required by decay {self.decay}")
        return self


class DenseOptimizer(Section):
    """Everything that is not a table."""

    kind: Literal["adam", "adamw", "sgd"] = "adam"
    lr: float = Field(default=1e-3, gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Adam and AdamW."""
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW: decoupled; Adam and SGD: added to the gradient."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """SGD only."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Scale the dense gradient down to this global L2 norm; null: never."""
    schedule: Schedule = Schedule()


class OptimizerSection(Section):
    tables: TablesOptimizer = TablesOptimizer()
    dense: DenseOptimizer = DenseOptimizer()
