"""The end-to-end benchmark runs, and what it prints makes sense: both sides train the same model."""

from __future__ import annotations

import pytest

from benchmarks import end_to_end


def test_both_sides_train_the_same_model() -> None:
    found = end_to_end.main(["--quick", "--workers", "1"])
    assert found["ratios"].keys() == found["cpu"].keys() == {"workers_1"}
    for spread in (found["ratios"]["workers_1"], found["cpu"]["workers_1"]):
        assert 0 < spread["min"] <= spread["median"] <= spread["max"]
    assert all(rate > 0 for rate in found["samples_per_s"]["workers_1"].values())
    assert found["parameters"]["ours"] == found["parameters"]["plain"]
    first, last = zip(*found["losses"]["workers_1"].values(), strict=True)
    assert first == pytest.approx([1.4, 1.4], abs=0.1), "both begin where nothing is known: 2 log 2"
    assert max(last) < min(first)
    assert found["checkpoints"]["workers_1"] >= 2
    ours, plain = found["parts_ms"]["workers_1"].values()
    assert all(milliseconds > 0 for milliseconds in (*ours.values(), *plain.values()))
    assert {"backward", "backward of tables", "optimizer", "rest"} <= ours.keys()
