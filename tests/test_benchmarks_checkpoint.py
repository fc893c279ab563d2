"""The command that prints what saving and loading cost, and what it prints makes sense."""

from __future__ import annotations

from benchmarks import checkpoint


def test_the_figures_are_printed() -> None:
    found = checkpoint.main(["--quick"])
    for name in ("save", "load"):
        for each in (found["ratios"][name], found["cpu"][name]):
            assert 0 < each["min"] <= each["median"] <= each["max"]
    assert found["gib_per_s"].keys() == found["cpu_s_per_gib"].keys() == {"save", "copy", "load", "read"}
    assert 0.5 < found["memory"] < 3, "tables of a few MiB, and a process has other needs too"
    assert 0 < found["gib"] < 1 / 32
