from __future__ import annotations

from benchmarks.floor import main


def test_quick() -> None:
    found = main(["--quick", "--repeats", "2"])
    assert set(found["rates"]) == {"gemm", "bmm", "copy", "gather", "scatter"}
    assert all(rate["min"] > 0 for rate in found["rates"].values())
    assert set(found["floor_ms"]) == {"products", "lookup", "update"}
    assert 0 < found["step_ms"] < 60_000
    # 200 x 512 and 4 x 128 x 64, forward and backward, of 4096 rows.
    assert 3.2 < found["gflop"] < 3.6
    assert found["rows_updated"] < found["rows_looked_up"] == 4096 * 21
