"""The benchmark of evaluation runs, and all sides did the same rows."""

from __future__ import annotations

from benchmarks import evaluate
from benchmarks.sized import QUICK


def test_the_figures_are_printed() -> None:
    found = evaluate.main(["--quick"])
    assert found["rows"] == QUICK.rows
    for ratios in (found["ratios"], found["cpu"]):
        assert list(ratios) == list(evaluate.SIDES)
        for each in ratios.values():
            assert 0 < each["min"] <= each["median"] <= each["max"]
    assert set(found["samples_per_s"]) == set(found["cpu_ns_per_row"]) == {"ours", *evaluate.SIDES}
    assert min(found["cpu_ns_per_row"].values()) > 0
    for metrics in found["metrics"].values():
        assert metrics["rows"] == QUICK.rows and 0 < metrics["positives"] < metrics["rows"]
        assert 0 < metrics["auc"] < 1 and 0 < metrics["gauc"] < 1 and metrics["logloss"] > 0
