"""The command that prints what saving costs runs, and what it prints makes sense."""

from __future__ import annotations

from benchmarks import checkpoint


def test_the_figures_are_printed() -> None:
    found = checkpoint.main(["--quick"])
    for name in ("save", "load"):
        spread = found[name]
        assert 0 < spread["min"] <= spread["median"] <= spread["max"]
    assert found["gib_per_s"].keys() == {"save", "copy", "load", "read"}
    assert 0.5 < found["memory"] < 3, "tables of a few MiB, and a process has other needs too"
    assert found["stall"].keys() == found["stall_cpu"].keys() == {"median", "min", "max"}
    assert found["step_s"] > 0 and found["step_cpu_s"] > 0
    assert 0 < found["copy_s"]["min"] < found["write_s"]["max"]
