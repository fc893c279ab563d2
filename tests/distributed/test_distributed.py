from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from mtlrec.distributed import all_gather_bytes, all_ok, broadcast_bytes, gather_bytes
from tests.distributed.processes import ProcessFailure, run_processes
from tests.model.example import World, single_world

pytestmark = pytest.mark.distributed
world = pytest.fixture(scope="module")(single_world)


def test_exchanges_between_three(tmp_path: Path) -> None:
    ranks = run_processes("tests.distributed.exchanges:exchange", 3, tmp_path / "run")
    words = [[*range(7 * rank), 0] for rank in range(3)]
    for rank, found in enumerate(ranks):
        assert found["world"] == [rank, 3, rank, 3]
        assert found["sum"].tolist() == [3.0, 30.0]
        assert found["untouched"].tolist() == [rank, 10.0 * rank]
        assert found["count"].tolist() == [3 * (2**53 + 1)]
        assert found["gathered"] == (words if rank == 0 else None)
        assert found["combined"] == ([each for word in words for each in word] if rank == 0 else None)
        assert found["combined nothing"] is (rank == 0)
        assert found["everywhere"] == words
        assert found["nothing"] == [[], [], []]
        assert bytes(found["broadcast"]) == b"from 0"
        assert found["broadcast nothing"] == []
        assert found["errors"] == {"none": [], "one": ["größer als erlaubt"], "empty": [""]}
        np.testing.assert_array_equal(found["array"], [0, 1, 2])
        one, two, three = ((10 * n + rank, 30 * n + 3) for n in (1, 2, 3))
        assert found["steps"]["to the end"] == {
            "steps": [[*one, two[0]], [*two, three[0]], [*three, None]],
            "error": None,
        }
        # Nobody is given a next batch that another lacks, and the one before it is whole.
        assert found["steps"]["until one fails"] == {
            "steps": [[*one, two[0]], [*two, None]],
            "error": "the third is wrong",
        }


def test_a_rank_that_fails_is_told_with_its_words(tmp_path: Path) -> None:
    with pytest.raises(ProcessFailure, match="this rank is broken") as caught:
        run_processes("tests.distributed.exchanges:fail_on_one", 2, tmp_path / "run")
    assert caught.value.returncodes[1] == 1


def test_ranks_that_hang_are_stopped(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(ProcessFailure, match="still running") as caught:
        run_processes("tests.distributed.exchanges:hang", 1, tmp_path / "run", timeout=1.0)
    assert caught.value.returncodes == [None]
    assert time.monotonic() - began < 30


def test_a_world_of_one_needs_nobody(world: World) -> None:
    assert (world.rank, world.world_size, world.local_world_size) == (0, 1, 1)
    assert gather_bytes(b"x", world) == all_gather_bytes(b"x", world) == [b"x"]
    assert broadcast_bytes(b"x", world) == b"x"
    assert all_ok(None, world) == [] and all_ok("wrong", world) == ["wrong"]
