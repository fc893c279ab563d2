"""The command that prints what it takes to start, and what it prints makes sense."""

from __future__ import annotations

from benchmarks import start


def test_the_figures_are_printed() -> None:
    found = start.main(["--quick"])
    assert found["ratios"]["help_s"]["median"] == found["seconds"]["help"]["median"]
    for name in ("alone", "help", "nothing"):
        assert found["cpu_s"][name]["median"] > 0, name
        assert 0 < found["seconds"][name]["min"] <= found["seconds"][name]["max"], name
