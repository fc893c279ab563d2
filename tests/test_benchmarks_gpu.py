"""The benchmark for GPUs runs, with the CPU in a GPU's place, and what it prints makes sense."""

from __future__ import annotations

from benchmarks import gpu


def test_the_figures_are_printed() -> None:
    found = gpu.main(["--quick", "--device", "cpu"])
    (spread,), (rates,), (lookups,) = (found[key].values() for key in ("ratios", "samples_per_s", "lookups"))
    assert 0 < spread["min"] <= spread["median"] <= spread["max"]
    assert rates["ours"] > 0 and rates["plain"] > 0
    assert found["device"] == "cpu" and "device" not in lookups
    # Of each row ten ids, and a list of ten; some of them are the same.
    assert 15 * 256 < lookups["ids"] < 30 * 256
    assert 0 < lookups["distinct_rows"] < lookups["ids"]
    for part in ("lookup", "update"):
        assert lookups[part]["kernel_ms"] > 0 and lookups[part]["gb_per_s"] > 0
