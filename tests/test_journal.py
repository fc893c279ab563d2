"""TensorBoard's event files: what is in them, and a disk that is full."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from mtlrec.journal import Events
from mtlrec.storage import StorageError


def events(folder: Path) -> list[tuple[int, str, float]]:
    """(step, tag, value) of every scalar in the one file there."""
    from tensorboardX.proto.event_pb2 import Event

    (file,) = folder.glob("events.out.tfevents.*")
    data, at, found = file.read_bytes(), 0, []
    while at < len(data):
        (size,) = struct.unpack_from("<Q", data, at)
        event = Event.FromString(data[at + 12 : at + 12 + size])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        at += 16 + size
    return found


def test_what_is_written_can_be_read(tmp_path: Path) -> None:
    written = Events(str(tmp_path), 3)
    written.scalar("loss/click", 0.5, 7)
    written.flush()
    folder = tmp_path / "tensorboard" / "a0003"
    assert events(folder) == [(7, "loss/click", 0.5)]
    written.scalar("loss/click", 0.25, 8)
    written.close()
    assert events(folder) == [(7, "loss/click", 0.5), (8, "loss/click", 0.25)]


def test_a_full_disk_is_said_and_nobody_waits(tmp_path: Path) -> None:
    written = Events(str(tmp_path), 1)
    # Every write to it fails with ENOSPC.
    written._writer._py_recordio_writer._writer = open("/dev/full", "wb")  # noqa: SIM115

    def fill() -> None:
        for step in range(1000):
            written.scalar("loss/click", 0.5, step)

    with pytest.raises(StorageError, match=r"tensorboard/a0001: the disk is full"):
        fill()
    with pytest.raises(StorageError, match=r"the disk is full"):
        written.flush()
