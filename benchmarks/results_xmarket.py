"""What mtlrec reaches on XMarket, by docs/xmarket.md's protocol: the block of docs/results.md.

    python -m benchmarks.results_xmarket SRC WORK --seeds 3

SRC holds the published files of de, mx, uk and ca; WORK gets the prepared data, the runs and what was
measured, and the same command goes on there. Trains each market alone with every seed, by the jobs that
`mtlrec prepare xmarket` writes. `--markets uk,ca` does these alone, so that several may work side by side in
one WORK. Expected: 3 seeds of all four take 40 minutes on one core.

Prints one block of markdown, and a line of JSON with `met`. U users of a market, R rows of its test.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.commands import mtlrec, prepare, table
from mtlrec.data.ids import hash_ids
from mtlrec.metrics.ranking import Ranked, rank_groups

MARKETS = ("de", "mx", "uk", "ca")
TASK = "interaction"
WANTED = {"de": 0.370, "mx": 0.580}
"""Mean nDCG@10 of the issue."""
PUBLISHED = {
    "de": (0.3214, 0.3442),
    "mx": (0.5430, 0.5590),
    "uk": (0.4488, 0.4702),
    "ca": (0.2934, 0.3112),
}
"""nDCG@10 of the cross-market papers, by their own split: the best of GMF, MLP and NMF trained on the market
alone; the best of all, which learns from six more markets."""


@dataclass(frozen=True)
class Measured:
    """One kind of model on one market."""

    ndcg: list[float]
    """On test, by seed."""
    hit: list[float]
    valid: list[float]
    error: float
    """Standard error of the first seed's nDCG@10 over users."""
    seconds: float
    """Of training, mean over seeds."""


def per_user(candidates: pa.Table, scores: npt.NDArray[np.float32]) -> Ranked:
    """Lists of the U users, whose candidates [R] have `scores` [R]; ties as `mtlrec evaluate` breaks them."""
    return rank_groups(
        hash_ids(candidates["user_id"]),
        scores,
        candidates[TASK].to_numpy() == 1,
        hash_ids(np.arange(len(candidates))),
    )


def popularity(folder: Path, split: str) -> Ranked:
    """Candidates of a market by the number of training rows of the item."""
    counted = pq.read_table(folder / "train", columns=["item_id"])["item_id"].value_counts()
    times = dict(zip(counted.field("values").to_pylist(), counted.field("counts").to_pylist(), strict=True))
    candidates = pq.read_table(folder / split, columns=["user_id", "item_id", TASK])
    scores = [times.get(item, 0) for item in candidates["item_id"].to_pylist()]
    return per_user(candidates, np.array(scores, np.float32))


def standard_error(values: npt.NDArray[np.float64]) -> float:
    """Of the mean of `values` [U]."""
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def train(job: Path, data: Path, seeds: int, name: str) -> dict[str, Any]:
    """What `mtlrec compare` says of the job's one variation, measured on `data`."""
    out = job.parent / "runs" / f"{name}-results"
    options = ["--data", str(data), "--seeds", f"{seeds}", "--workers", "0", "--out", str(out)]
    found = mtlrec("compare", job, *options, "--set", f"name={name}")
    row: dict[str, Any] = found["variations"][0]
    return row


def runs_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    return list(row["runs"].values())


def best_of(run: dict[str, Any]) -> dict[str, Any]:
    """Metrics on valid of the checkpoint that was measured on test."""
    best: dict[str, Any] = json.loads((Path(run["run_dir"]) / "result.json").read_text())["best"]["metrics"]
    return best


def of_market(row: dict[str, Any], market: str, data: Path) -> Measured:
    """How the runs do on `data`, the market's test."""
    runs = runs_of(row)
    candidates = pq.read_table(data, columns=["user_id", TASK])
    out = Path(runs[0]["run_dir"]).parents[1] / "predictions" / f"{runs[0]['name']}-{market}"
    if not (out / "_predictions.json").exists():
        shutil.rmtree(out, ignore_errors=True)  # of a call that was cut off
        mtlrec("predict", runs[0]["run_dir"], "--data", data, "--out", out)
    by_user = per_user(candidates, pq.read_table(out, columns=[TASK])[TASK].to_numpy())
    on_test = [run["metrics"][market][TASK] for run in runs]
    if not math.isclose(by_user.ndcg.mean(), on_test[0]["ndcg@10"], abs_tol=1e-6):
        raise SystemExit(f"{out}: not the predictions of {runs[0]['name']}; remove the folder")
    return Measured(
        ndcg=[each["ndcg@10"] for each in on_test],
        hit=[each["hit@10"] for each in on_test],
        valid=[best_of(run)[market][TASK]["ndcg@10"] for run in runs],
        error=standard_error(by_user.ndcg),
        seconds=row["seconds"],
    )


def spread(values: list[float]) -> str:
    return f"± {statistics.stdev(values):.4f}" if len(values) > 1 else ""


def alone_block(work: Path, alone: dict[str, Measured]) -> str:
    rows = []
    for market, found in alone.items():
        popular = popularity(work / market, "test")
        single, best = PUBLISHED[market]
        rows.append(
            [
                market,
                f"{popular.rows.size:,}",
                f"{popular.ndcg.mean():.3f}",
                f"{single:.4f}",
                f"{best:.4f}",
                f"{statistics.fmean(found.valid):.4f}",
                f"**{statistics.fmean(found.ndcg):.4f}** {spread(found.ndcg)}".strip(),
                f"{found.error:.4f}",
                f"{statistics.fmean(found.hit):.4f}",
                f"{found.seconds:.0f}",
                f"{WANTED[market]:.3f}" if market in WANTED else "",
            ]
        )
    return table(
        [
            "alone",
            "users",
            "popularity",
            "published, alone",
            "published, best",
            "valid",
            "test nDCG@10",
            "s.e. over users",
            "HR@10",
            "seconds",
            "wanted",
        ],
        rows,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="What mtlrec reaches on XMarket.")
    parser.add_argument("source", type=Path, metavar="SRC", help="folder of the published files")
    parser.add_argument("work", type=Path, metavar="WORK", help="gets data, runs and measurements")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... of each market alone")
    parser.add_argument("--markets", default=",".join(MARKETS), help="of " + ",".join(MARKETS))
    arguments = parser.parse_args()
    work = prepare("xmarket", arguments.source, arguments.work.resolve())
    markets = [market for market in MARKETS if market in arguments.markets.split(",")]
    trained = {
        market: train(
            work / f"job_{market}.yaml", work / market / "test", arguments.seeds, f"xmarket-{market}"
        )
        for market in markets
    }
    alone = {market: of_market(row, market, work / market / "test") for market, row in trained.items()}
    blocks = [alone_block(work, alone)]
    result: dict[str, Any] = {
        "met": {
            market: statistics.fmean(alone[market].ndcg) >= wanted
            for market, wanted in WANTED.items()
            if market in alone
        },
        "alone": {market: found.__dict__ for market, found in alone.items()},
    }
    for market, met in result["met"].items():
        blocks.append(f"{market}: at least {WANTED[market]:.3f} is {'met' if met else 'NOT met'}.")
    print("\n\n".join(blocks))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
