"""The command that prints what a checkpoint costs training, and what it prints makes sense."""

from __future__ import annotations

from benchmarks import stall


def test_the_figures_are_printed() -> None:
    found = stall.main(["--quick"])
    for each in (found["ratios"]["stall"], found["cpu"], found["but_stolen"]):
        assert 0 < each["min"] <= each["median"] <= each["max"]
    assert all(each["min"] >= 0 for each in found["stolen_s"].values())
    assert found["step_s"] > 0 and found["step_cpu_s"] > 0
    assert 0 < found["copy_s"]["min"] < found["write_s"]["max"]
