"""The tables of metrics that a person sees."""

from __future__ import annotations

from typing import Any

import pytest

from mtlrec.display import PLAIN_WIDTH, Display

RANKING = {"gauc": 0.61, "ndcg@10": 0.41, "recall@10": 0.52, "hit@10": 0.63, "mrr": 0.34, "groups": 12_345}
BINARY = {"auc": 0.7, "logloss": 0.4, "calibration": 1.02, "rows": 1_000_000, "positives": 123_456}
METRICS: dict[str, Any] = {
    "all": {
        "click": {**BINARY, **RANKING},
        "choice": {"auc": 0.8, "rows": 99, "positives": 9, **RANKING, "sampled": True},
        "stars": {"rmse": 1.5, "mae": 1.25, "rows": 77, "positives": None},
    }
}


def drawn(capsys: pytest.CaptureFixture[str], draw: str, *arguments: Any) -> str:
    getattr(Display(), draw)(*arguments)
    text = capsys.readouterr().err
    assert max(len(line.rstrip()) for line in text.splitlines()) <= PLAIN_WIDTH
    return text


def row(text: str, *words: str) -> str:
    """The cells of the one line that begins with `words`, spaces squeezed."""
    lines = [" ".join(line.split()) for line in text.splitlines()]
    (found,) = [line for line in lines if line.startswith(" ".join(words))]
    return found


def test_ranking_metrics_have_a_table_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    ideal = {"all": {"click": {"auc": 0.75, "logloss": 0.3}}}
    text = drawn(capsys, "metrics", METRICS, ideal, "on test")
    classes, ranks, values = text.split("on test")[1:]
    cells = "all click 1,000,000 123,456 0.7000 0.6100 0.4000 1.0200 -0.0500 +0.1000"
    assert row(classes, "all", "click") == cells
    assert row(classes, "all", "choice") == "all choice 99 9 0.8000 0.6100 - - - -"
    assert row(ranks, "scenario") == "scenario task groups ndcg@10 recall@10 hit@10 mrr"
    assert row(ranks, "all", "click") == "all click 12,345 0.4100 0.5200 0.6300 0.3400"
    assert row(ranks, "all", "choice").startswith("all choice ~ 12,345") and "sample of the users" in text
    assert row(values, "all", "stars") == "all stars 77 1.5000 1.2500 -"


def test_without_users_there_is_nothing_of_ranking(capsys: pytest.CaptureFixture[str]) -> None:
    text = drawn(capsys, "metrics", {"all": {"click": BINARY}}, None, "on test")
    assert text.count("on test") == 1 and "gauc" not in text and "sample" not in text
    assert row(text, "all", "click") == "all click 1,000,000 123,456 0.7000 0.4000 1.0200"


def test_differences_that_exclude_chance_are_starred(capsys: pytest.CaptureFixture[str]) -> None:
    def found(low: float | None, high: float | None) -> dict[str, Any]:
        known = low is not None
        numbers = {"a": 0.5, "b": 0.25, "difference": 0.25 if known else None, "low": low, "high": high}
        return {**numbers, "replicates": 1000, "users": 4321}

    metrics = {"auc": found(0.1, 0.3), "logloss": found(-0.1, 0.3), "mrr": found(None, None)}
    result = {"checkpoint": "/a", "against": "/b", "data": "/data", "differences": {"all": {"like": metrics}}}
    text = drawn(capsys, "differences", result)
    assert row(text, "all", "like", "auc") == "all like auc 0.5000 0.2500 +0.2500 * +0.1000 .. +0.3000 4,321"
    assert row(text, "all", "like", "logloss").count("*") == 0
    assert row(text, "all", "like", "mrr") == "all like mrr 0.5000 0.2500 - - 4,321"
    assert "A /a" in text and "B /b" in text and "A against B on /data" in text
