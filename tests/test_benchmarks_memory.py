"""The command that measures a worker's memory runs, and what it prints makes sense."""

from __future__ import annotations

from benchmarks import memory


def test_the_figures_are_printed() -> None:
    found = memory.main(["--quick"])
    assert found["ratios"].keys() == {"workers_1"}
    values, rest = found["ratios"]["workers_1"], found["workers_1"]
    # Tables of 128 MiB, beside which a process's other needs show.
    assert 0.8 < values["min"] <= values["median"] <= values["max"] < 2
    assert 1.5 < rest["with_copy"] < 3
    assert 0.5 < rest["resumed"] < 2
    assert all(0.1 < gib < 3 for gib in rest["constant_gib"])
    assert rest["first_step_s"] > 0
    assert rest["ranks"] == {"user_id": 1, "item_id": 1}
