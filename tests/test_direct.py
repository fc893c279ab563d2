"""What goes past the page cache arrives as what goes through it does, on any file system."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtlrec.direct import ALIGNMENT, LEAST_BYTES, DirectFile

SIZE = 3 * LEAST_BYTES


def memory(size: int, skip: int = 0) -> memoryview:
    """Random bytes that begin `skip` bytes behind a multiple of ALIGNMENT."""
    flat = np.empty(size + 2 * ALIGNMENT, np.uint8)
    start = -flat.ctypes.data % ALIGNMENT + skip
    flat[:] = np.random.default_rng(size).integers(0, 256, len(flat), np.uint8)
    return flat[start : start + size].data


def written(path: Path, pieces: list[memoryview]) -> bytes:
    file = DirectFile(path)
    for number, piece in enumerate(pieces):
        assert file.write(piece) == len(piece)
        assert file.tell() == sum(len(each) for each in pieces[: number + 1])
    file.flush()
    os.fsync(file.fileno())
    file.close()
    return path.read_bytes()


PIECES = {
    "aligned": [memory(SIZE)],
    "a head before it": [memory(ALIGNMENT), memory(SIZE), memory(17)],
    "a crooked head before it": [memory(100), memory(SIZE)],
    "crooked memory": [memory(SIZE, 16)],
    "a crooked end, and more": [memory(SIZE + 1234), memory(SIZE), memory(5)],
    "two": [memory(SIZE), memory(2 * SIZE)],
    "small": [memory(10), memory(0), memory(LEAST_BYTES - 1)],
}


@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
def test_bytes_arrive(tmp_path: Path, pieces: list[memoryview]) -> None:
    assert written(tmp_path / "file", pieces) == b"".join(pieces)


def test_a_file_is_never_taken_over(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"before")
    with pytest.raises(FileExistsError):
        DirectFile(tmp_path / "file")


def test_a_file_system_that_cannot_is_written_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = fcntl.fcntl

    def refuse(descriptor: int, command: int, flags: int = 0) -> Any:
        if command == fcntl.F_SETFL and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return original(descriptor, command, flags)

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    assert written(tmp_path / "file", PIECES["a head before it"]) == b"".join(PIECES["a head before it"])


@pytest.mark.parametrize("taken", [0, ALIGNMENT, 1000])
def test_a_disk_that_takes_a_part_gets_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: int
) -> None:
    """First so many bytes of what it is given, then (0 at once) it will have nothing more past the cache."""
    original, left = os.pwrite, [taken]

    def partly(descriptor: int, data: memoryview, at: int) -> int:
        if not left[0]:
            raise OSError(errno.EINVAL, "Invalid argument")
        count = left.pop()
        left.append(0)
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        return original(descriptor, data[:count], at)

    monkeypatch.setattr(os, "pwrite", partly)
    assert written(tmp_path / "file", PIECES["aligned"]) == b"".join(PIECES["aligned"])


def test_other_errors_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: memoryview, at: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    file = DirectFile(tmp_path / "file")
    with pytest.raises(OSError, match="No space left"):
        file.write(memory(SIZE))
    assert not fcntl.fcntl(file.fileno(), fcntl.F_GETFL) & os.O_DIRECT
    file.close()
