"""The safetensors file layout, as any reader of that format knows it.

8 bytes, little-endian: the length N of the header; N bytes of JSON, padded with spaces; the tensors' bytes,
row-major, little-endian, without a gap. The header maps a name to `dtype`, `shape` and `data_offsets`
(counted from the end of the header), and `__metadata__` to a map of strings.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "F16": 2, "BF16": 2, "I32": 4, "F32": 4, "I64": 8, "F64": 8,
}  # fmt: skip
"""Element types that a checkpoint may hold, by their names in safetensors, and the bytes of one element."""

METADATA = "__metadata__"
_LENGTH_BYTES = 8
_HEAD_BYTES = 4096
"""A header is padded to a multiple of so many: then the tensors' bytes can go straight to a disk."""
MAX_HEADER_BYTES = 100_000_000
"""What other readers of the format accept."""


class Slot(NamedTuple):
    """Where one tensor lies in a file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    """From the start of the file, in bytes."""

    @property
    def num_bytes(self) -> int:
        return num_bytes(self.dtype, self.shape)


def num_bytes(dtype: str, shape: Sequence[int]) -> int:
    return math.prod(shape) * ITEM_BYTES[dtype]


def arrange(
    tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, Slot]]:
    """The first bytes of a file that holds `tensors` (name -> dtype, shape), and where each goes.

    Wider elements come first, so that each tensor is aligned to its own. The slots are in file order.
    """
    order = sorted(tensors, key=lambda name: -ITEM_BYTES[tensors[name][0]])
    entries: dict[str, object] = {METADATA: dict(metadata)}
    starts, at = {}, 0
    for name in order:
        dtype, shape = tensors[name]
        starts[name] = start = at
        at += num_bytes(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, at]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH_BYTES + len(text)) % _HEAD_BYTES)
    head = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    slots = {
        name: Slot(dtype, tuple(shape), len(head) + starts[name]) for name, (dtype, shape) in tensors.items()
    }
    return head, {name: slots[name] for name in order}


def parse(head: bytes) -> dict[str, Slot]:
    """The slots that the first bytes of a file, at least its whole header, tell of; else ValueError."""
    length = int.from_bytes(head[:_LENGTH_BYTES], "little")
    text = head[_LENGTH_BYTES : _LENGTH_BYTES + length]
    if len(head) < _LENGTH_BYTES or length > MAX_HEADER_BYTES or len(text) < length:
        raise ValueError("its first bytes are no safetensors header")
    found = {}
    try:
        for name, entry in json.loads(text).items():
            if name != METADATA:
                start, end = entry["data_offsets"]
                slot = Slot(entry["dtype"], tuple(entry["shape"]), _LENGTH_BYTES + length + start)
                if slot.num_bytes != end - start:
                    raise ValueError
                found[name] = slot
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError("its safetensors header is damaged") from None
    return found
