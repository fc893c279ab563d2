"""The torch side of the format: blocks of tables, and tensors to bytes and back."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mtlrec.checkpoint.manifest import STATE, WEIGHTS

_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.int64: "I64",
    torch.float64: "F64",
}
_TYPES = {name: dtype for dtype, name in _NAMES.items()}
_NUMPY_NAMES = {np.dtype(np.uint8): "U8", np.dtype(np.int64): "I64"}

Values = torch.Tensor | npt.NDArray[Any]
"""What is written: tensors, and the arrays of vocabularies."""

assert sys.byteorder == "little", "the format is little-endian, and bytes are taken as they lie in memory"


@dataclass(frozen=True)
class TableBlock:
    """A rectangle of one table: a view of what this rank owns, or holds a copy of, or a snapshot of that.

    Of views, writing here is loading. Defined here, so that checkpoints do not cost the import of TorchRec.
    """

    table: str
    row: int
    """First row, in the whole table."""
    rows: int
    column: int
    """First column, in the whole table."""
    columns: int
    weights: torch.Tensor
    """float32 [rows, columns]."""
    state: dict[str, torch.Tensor]
    """The table optimizer's: [rows] where it keeps one number a row, [rows, columns] where one a weight."""
    replicated: bool
    """Every rank has this block; they are equal."""


def tensors_of(block: TableBlock) -> dict[str, torch.Tensor]:
    """The block's tensors by their names in a checkpoint."""
    return {WEIGHTS: block.weights, **{STATE + name: value for name, value in block.state.items()}}


def dtype_name(values: Values) -> str:
    return _NUMPY_NAMES[values.dtype] if isinstance(values, np.ndarray) else _NAMES[values.dtype]


def to_bytes(values: Values) -> memoryview:
    """The elements, row-major: of what is contiguous and on the CPU its own memory, else a copy of it."""
    if isinstance(values, np.ndarray):
        return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
    flat = values.detach().cpu().contiguous().reshape(-1)
    # Not every element type of torch is one of numpy, but bytes are.
    return flat.view(torch.uint8).numpy().data


def from_bytes(data: bytearray, dtype: str, shape: Sequence[int]) -> torch.Tensor:
    """A tensor over the memory of `data`: torch has none that may not be written to."""
    if not data:
        return torch.empty(tuple(shape), dtype=_TYPES[dtype])
    return torch.frombuffer(data, dtype=_TYPES[dtype]).reshape(tuple(shape))
