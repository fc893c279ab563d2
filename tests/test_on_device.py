"""The checks for GPUs run, with the CPU in a GPU's place."""

from __future__ import annotations

import pytest

from tests import on_device


@pytest.mark.distributed
def test_the_checks_run() -> None:
    checks = ["steps", "goes_on_elsewhere", "nobody_waits"]
    found = on_device.main([*checks, "--device", "cpu"])
    assert found["failed"] == []
    differences = found["largest_differences"]
    assert differences.keys() == {"steps", "there-here", "here-there", "there-there"}
    assert set(differences.values()) == {0.0}, "the same device, the same bits"
