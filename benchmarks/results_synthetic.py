"""How near `ple` comes to the best possible model of the synthetic data: the block of docs/results.md.

    python -m benchmarks.results_synthetic WORK

Makes 2,000,000 rows of 20,000 users, 5,000 items and 4 scenarios in WORK/data, and trains the ready job
there, the same without scenarios ("pooled"), and a model that knows dense columns and popularity alone. The
same command goes on where it was interrupted. Expected: 20 minutes on one core; `--seeds 3` trains each
with the seeds 0, 1 and 2.

Prints one block of markdown, and a line of JSON with `met`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.commands import mtlrec, table

SIZE = {"rows": 2_000_000, "users": 20_000, "items": 5_000, "scenarios": 4}
TASK = "click"
WANTED = 0.75
"""Share of the distance from 0.5 to the ideal AUC, in every scenario."""
BELOW = 0.5
"""Dense columns and popularity close less than this."""

DENSE = {
    "item_id": {"kind": "id", "ids": "identity", "rows": SIZE["items"], "dim": 4},
    "price": {"kind": "number", "transform": "log1p"},
    "recency": {"kind": "number", "transform": "standardise"},
    "age": {
        "kind": "number",
        "transform": "bucketise",
        "boundaries": [22, 26, 30, 35, 40, 45, 50, 55, 60, 65, 70],
    },
    "signals": {"kind": "vector", "size": 4},
}
"""All that the third model reads, beside the scenario. What a table of the items learns without any user is
how often each is clicked, overall and by scenario: at least as much as its popularity says."""

CHANGES: dict[str, dict[str, Any]] = {
    "ple": {},
    "pooled": {"schema.scenario.as_feature": False, "model.backbone.scenario_gates": False},
    "popularity": {
        "schema.features": DENSE,
        "schema.user": None,
        "model.backbone": {"kind": "shared_bottom", "hidden": [128, 64]},
        "run.epochs": 1,
    },
}
"""Model -> what differs from the ready job."""


@dataclass(frozen=True)
class Trained:
    """One model, with every seed."""

    run_dir: str
    """Of the first seed."""
    auc: dict[str, list[float]]
    """Scenario -> on test, by seed."""
    seconds: float
    """Of training, mean over seeds."""

    def mean(self, scenario: str) -> float:
        return statistics.fmean(self.auc[scenario])


def make(data: Path) -> dict[str, float]:
    """The data, unless they are there; returns scenario -> ideal AUC on test, "all" first."""
    if not (data / "job.yaml").exists():
        sizes = [part for name, value in SIZE.items() for part in (f"--{name}", str(value))]
        mtlrec("synth", data, *sizes)
    ideal = json.loads((data / "test" / "_ideal.json").read_text())
    return {scenario: tasks[TASK]["auc"] for scenario, tasks in ideal.items()}


def train(data: Path, name: str, seeds: int) -> Trained:
    """The ready job with the model's changes, measured on test."""
    settings = [
        part
        for path, value in {"name": name, **CHANGES[name]}.items()
        for part in ("--set", f"{path}={json.dumps(value)}")
    ]
    out = data / "runs" / f"{name}-results"
    options: list[str | Path] = [
        "--data",
        data / "test",
        "--seeds",
        str(seeds),
        "--workers",
        "0",
        "--out",
        out,
    ]
    (row,) = mtlrec("compare", data / "job.yaml", *options, *settings)["variations"]
    runs = list(row["runs"].values())
    auc = {
        scenario: [run["metrics"][scenario][TASK]["auc"] for run in runs] for scenario in runs[0]["metrics"]
    }
    return Trained(runs[0]["run_dir"], auc, row["seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description="How near ple comes to the best possible model.")
    parser.add_argument("work", type=Path, metavar="WORK", help="gets data, runs and measurements")
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0, 1, ... of each model")
    arguments = parser.parse_args()
    data = arguments.work.resolve() / "data"
    ideal = make(data)
    models = {name: train(data, name, arguments.seeds) for name in CHANGES}
    shares = {
        name: {scenario: (found.mean(scenario) - 0.5) / (best - 0.5) for scenario, best in ideal.items()}
        for name, found in models.items()
    }
    ahead = {
        scenario: tasks[TASK]["auc"]
        for scenario, tasks in mtlrec(
            "evaluate", models["ple"].run_dir, "--against", models["pooled"].run_dir, "--data", data / "test"
        )["differences"].items()
    }
    alone = [scenario for scenario in ideal if scenario != "all"]
    met = {
        "ple_closes_75_percent": all(shares["ple"][scenario] >= WANTED for scenario in alone),
        "ple_beats_pooled": all(ahead[scenario]["low"] > 0 for scenario in ideal),
        "popularity_closes_less_than_half": all(shares["popularity"][scenario] < BELOW for scenario in ideal),
    }
    rows = []
    for scenario, best in ideal.items():
        cells = [scenario, f"{best:.4f}"]
        for name, found in models.items():
            share = f"{shares[name][scenario]:.1%}"
            cells += [f"{found.mean(scenario):.4f}", f"**{share}**" if name == "ple" else share]
        each = ahead[scenario]
        cells.append(f"{each['difference']:+.4f} [{each['low']:+.4f}, {each['high']:+.4f}]")
        rows.append(cells)
    rows.append(
        ["seconds", "", *(part for found in models.values() for part in (f"{found.seconds:.0f}", "")), ""]
    )
    heads = [part for name in ("ple", "pooled", "popularity") for part in (name, "closed")]
    print(table(["click AUC on test", "ideal", *heads, "ple less pooled"], rows))
    for name, wanted in (
        ("ple_closes_75_percent", "`ple` closes at least 75 % in every scenario"),
        ("ple_beats_pooled", "`ple` beats pooled by more than its interval, over all and in every scenario"),
        ("popularity_closes_less_than_half", "dense columns and popularity alone close less than half"),
    ):
        print(f"\n{wanted}: {'met' if met[name] else 'NOT met'}.")
    print()
    print(json.dumps({"met": met, "shares": shares, "ple_less_pooled": ahead}))


if __name__ == "__main__":
    main()
