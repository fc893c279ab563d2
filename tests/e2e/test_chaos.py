"""kill -9 of a whole second Ray node and of the driver: nothing is lost, nothing is left.

A worker alone is killed in test_ray.py. `make chaos` does all three, twenty times.
"""

from __future__ import annotations

from pathlib import Path

from tests.chaos import Chaos, verdict


def test_a_run_outlives_its_node_and_its_driver(tmp_path: Path) -> None:
    chaos = Chaos(tmp_path, ["node", "driver"], seed=1)
    found = verdict(chaos, chaos.disturb())
    assert found["kills"] == {"driver": 1, "node": 1}
    assert found["ended"], found
    assert found["starts"] >= 3, "each kill made the workers start again"
    assert found["ledger_exact"], "every row was trained as in a run that nobody disturbed"
    assert found["metrics_differ_by"] <= 1e-3, found
    assert found["stray"] == []
