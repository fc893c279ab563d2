"""A copy, in host memory, of what a rank writes, so that training goes on while it is written.

The memory is kept from one checkpoint to the next: on many machines the first touch of fresh memory takes ten
times as long as a copy into memory that is there.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch

from mtlrec.checkpoint.manifest import STATE, WEIGHTS
from mtlrec.checkpoint.tensors import TableBlock
from mtlrec.direct import ALIGNMENT

_Key = tuple[str, int, int, str]
"""Table, first row, first column, name of the tensor; "", 0, 0, name of what is no table's."""


class Snapshot:
    """Room for one copy of what a rank writes: as much host memory as those tensors take.

    Replicated tables and what is no table's are written by rank 0 for all, and copied by rank 0 alone.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._memory: dict[_Key, torch.Tensor] = {}
        self._preparing: threading.Thread | None = None

    def prepare(self, blocks: Iterable[TableBlock], dense: Mapping[str, torch.Tensor]) -> None:
        """Take the memory for copies of these in a thread, so that the first `take` has it at hand."""
        wanted = list(self._written(list(blocks), dense))

        def touch() -> None:
            for key, tensor in wanted:
                self._room(key, tensor).zero_()

        self._preparing = threading.Thread(target=touch, name="snapshot", daemon=True)
        self._preparing.start()

    def take(
        self, blocks: Iterable[TableBlock], dense: Mapping[str, torch.Tensor]
    ) -> tuple[list[TableBlock], dict[str, torch.Tensor]]:
        """Copies, contiguous and on the CPU, of what this rank writes. They last until the next call."""
        if self._preparing is not None:
            self._preparing.join()
            self._preparing = None
        given = list(blocks)
        held, devices = {}, set()
        for key, tensor in self._written(given, dense):
            held[key] = self._room(key, tensor)
            held[key].copy_(tensor.detach(), non_blocking=True)
            devices |= {tensor.device} if tensor.is_cuda else set()
        for device in devices:
            torch.cuda.synchronize(device)
        copies = []
        for block in given:
            place = (block.table, block.row, block.column)
            if (*place, WEIGHTS) not in held:
                continue
            weights = held[*place, WEIGHTS]
            state = {name: held[*place, STATE + name] for name in block.state}
            copies.append(replace(block, weights=weights, state=state))
        return copies, {name: value for (table, _, _, name), value in held.items() if not table}

    def _written(
        self, blocks: list[TableBlock], dense: Mapping[str, torch.Tensor]
    ) -> Iterator[tuple[_Key, torch.Tensor]]:
        for block in blocks:
            if self._rank == 0 or not block.replicated:
                place = (block.table, block.row, block.column)
                yield (*place, WEIGHTS), block.weights
                for name, value in block.state.items():
                    yield (*place, STATE + name), value
        if self._rank == 0:
            for name, value in dense.items():
                yield ("", 0, 0, name), value

    def _room(self, key: _Key, tensor: torch.Tensor) -> torch.Tensor:
        room = self._memory.get(key)
        if room is None or room.shape != tensor.shape or room.dtype != tensor.dtype:
            if tensor.is_cuda:
                room = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            else:
                room = _aligned(tensor.numel() * tensor.element_size())
                room = room.view(tensor.dtype).reshape(tensor.shape)
            self._memory[key] = room
        return room


def _aligned(size: int) -> torch.Tensor:
    """Memory of `size` bytes, uint8, that can be written straight to a disk."""
    # numpy asks for huge pages, which are there after fewer faults; torch does not.
    flat = np.empty(size + ALIGNMENT, np.uint8)
    skip = -flat.ctypes.data % ALIGNMENT
    return torch.from_numpy(flat[skip : skip + size])
