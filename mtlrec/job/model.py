"""Section `model`: one small class per backbone."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt

from mtlrec.job.schema import Name
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


class PLE(Section):
    """Progressive layered extraction (Tang et al. 2020): experts of each task beside shared ones, in levels.

    One level is customised gate control, CGC.
    """

    kind: Literal["ple"]
    levels: int = Field(default=1, ge=1, le=16)
    shared_experts: int = Field(default=2, ge=1)
    task_experts: int = Field(default=2, ge=1)
    """Of each task."""
    hidden: list[PositiveInt] = Field(default=[128, 64], min_length=1)
    """Width of each layer of an expert, each followed by ReLU; the same at every level."""
    scenario_gates: bool = False
    """Each scenario adds its own bias to every task's last gate."""


class Factorization(Section):
    """User x item: the dot product of two embeddings, with biases; beside an MLP: NeuMF (He et al. 2017).

    Its output is the score itself: `model.tower` is not used.
    """

    kind: Literal["factorization"]
    factors: list[Name] = Field(min_length=2, max_length=2)
    """The two tables whose rows are multiplied; both of one dim, each looked up by one feature."""
    biases: list[Name] = Field(default=[])
    """Tables of biases, such as the item's. With several scenarios each has a column of it: scenario s adds
    column s, so a table's dim is at least the number of scenarios."""
    hidden: list[PositiveInt] = Field(default=[])
    """Layers of the MLP over all other tables and the dense numbers; empty: no MLP."""


def _kind_alone(value: Any) -> Any:
    """A bare name stands for that backbone with its defaults."""
    return {"kind": value} if isinstance(value, str) else value


BackboneSection = Annotated[
    SharedBottom | MMoE | PLE | Factorization, Field(discriminator="kind"), BeforeValidator(_kind_alone)
]


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
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the outputs of every hidden layer that training sets to zero (Srivastava et al. 2014)."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: automatic mixed precision of the dense part, on CUDA only."""
