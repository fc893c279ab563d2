"""The command that compares the reader with a plain scan runs, and what it prints makes sense."""

from __future__ import annotations

from benchmarks import reader


def test_the_figures_are_printed() -> None:
    found = reader.main(["--quick"])
    assert found["ratios"].keys() == {"cpu", "clock"}
    for ratio in found["ratios"].values():
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"] and ratio["must"] < ratio["aim"]
    # Each side has asserted that it saw every row.
    assert (found["rows"], found["row_groups"], found["columns"]) == (50_000, reader.GROUPS, 18)
    for rates in (found["rows_per_cpu_s"], found["rows_per_s"]):
        assert rates.keys() == {"ours", "theirs", "ours_all_cores", "theirs_all_cores"}
        assert all(rate["min"] > 0 for rate in rates.values())
    assert 0 < found["first_batch_s"]["median"] < 60
    assert found["peak_bytes"] > 0 and found["file_bytes"] > 0
