"""The benchmark of scaling runs, and what it prints makes sense."""

from __future__ import annotations

import pytest

from benchmarks import scaling


@pytest.mark.distributed
def test_the_figures_are_printed() -> None:
    found = scaling.main(["--quick"])
    for spread in (found["ratios"]["efficiency"], found["cpu"]["efficiency"]):
        assert 0 < spread["min"] <= spread["median"] <= spread["max"]
    for side in ("ours", "plain"):
        one, two = (found["samples_per_s"][f"workers_{workers}"][side] for workers in (1, 2))
        assert found["efficiency"][side] == pytest.approx(two / one / 2, rel=0.01)
