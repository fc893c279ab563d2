"""One rank that hangs makes all of them wait: each writes its stacks and ends, long before a timeout."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.processes import ProcessFailure, run_processes


def test_every_rank_writes_its_stacks_when_one_hangs(tmp_path: Path) -> None:
    stacks = tmp_path / "stacks"
    with pytest.raises(ProcessFailure) as failure:
        run_processes("tests.distributed.hanging:hang", 2, tmp_path / "call", {"folder": str(stacks)})
    assert failure.value.returncodes == [1, 1], failure.value
    waiting, hanging = (
        (stacks / f"0001-r{rank:05d}.txt").read_text().split("MainThread", 1)[1] for rank in (0, 1)
    )
    assert "stands_still" in hanging
    assert "all_gather" in waiting and "stands_still" not in waiting
