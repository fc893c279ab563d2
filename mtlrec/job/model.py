"""Section `model`: one small class per backbone."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from mtlrec.job.section import Section


class SharedBottom(Section):
    """One multi-layer perceptron that every task's tower reads (Caruana 1997)."""

    kind: Literal["shared_bottom"]
    hidden: list[PositiveInt] = Field(default=[256, 128], min_length=1)
    """Width of each layer, each followed by ReLU."""


class MMoE(Section):
    """Multi-gate mixture of experts (Ma et al. 2018): each task mixes the experts by a softmax gate."""

    kind: Literal["mmoe"]
    experts: int = Field(default=4, ge=1)
    hidden: list[PositiveInt] = Field(default=[128, 64], min_length=1)
    """Width of each layer of an expert, each followed by ReLU."""
    scenario_gates: bool = False
    """Each scenario adds its own bias to every task's gate."""


BackboneSection = Annotated[SharedBottom | MMoE, Field(discriminator="kind")]


class Tower(Section):
    """One multi-layer perceptron per task, ending in one number."""

    hidden: list[PositiveInt] = Field(default=[32])
    """Width of each hidden layer; empty: a linear map."""


class ModelSection(Section):
    """Embedding tables, backbone and towers."""

    dim: int = Field(default=16, ge=4, le=4096, multiple_of=4)
    """Columns of every embedding table (fbgemm's kernels want a multiple of 4)."""
    table_init: float = Field(default=0.05, gt=0)
    """Starting weights of tables are uniform in [-table_init, table_init)."""
    backbone: BackboneSection = MMoE(kind="mmoe")
    tower: Tower = Tower()
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: automatic mixed precision of the dense part, on CUDA only."""
