"""Measuring a model, and one against another, by one worker and by several; the model is a stand-in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from mtlrec.job.errors import InputError
from mtlrec.job.job import job_from_dict
from mtlrec.metrics.bootstrap import LabelledRows, paired_bootstrap
from mtlrec.schema import Schema, build_schema
from tests.distributed.processes import Results, run_processes
from tests.evaluating import model_of, outputs_of, table_of
from tests.small_data import SCENARIOS, small_job, write_small_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "test"
    write_small_data(folder)
    return folder


@pytest.fixture(scope="module")
def world() -> Iterator[Any]:
    from mtlrec.distributed import init_single_process, shut_down

    yield init_single_process(60.0)
    shut_down()


def jobs(data: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A job with scenarios; one without, with the tasks the other way round and another besides."""
    first = small_job(data, data.parent / "runs")
    second = small_job(data, data.parent / "runs")
    del second["schema"]["scenario"]
    second["schema"]["tasks"] = {
        "late": {"kind": "binary", "label": "click"},
        "rating": {"kind": "regression"},
        "click": {"kind": "binary"},
    }
    return first, second


def schema_of(job: dict[str, Any]) -> Schema:
    parsed = job_from_dict(job, "test")
    return build_schema(parsed.schema_, parsed.model)


def payload_of(data: Path) -> dict[str, Any]:
    first, second = jobs(data)
    about = {"data": str(data), "batch_size": 90, "replicates": 30, "seed": 4}
    other = {"job": second, "checkpoint": "second"}
    return {"job": first, "checkpoint": "first", "against": other, **about}


def perform(action: str, payload: dict[str, Any], world: Any) -> dict[str, Any]:
    """The action on the stand-ins, in place of what checkpoints hold."""
    from mtlrec import actions
    from mtlrec.control import Silent

    def restore(side: dict[str, Any], world: Any) -> tuple[Any, Schema, dict[str, Any]]:
        del world
        schema = schema_of(side["job"])
        return model_of(schema, 0 if side["checkpoint"] == "first" else 1), schema, {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(actions, "_restore", restore)
        return actions.perform(action, payload, world, Silent())


def work(world: Any, payload: dict[str, Any]) -> Results:
    """In a worker."""
    return {action: perform(action, payload, world) for action in ("evaluate", "against")}


def test_ranking_is_measured_within_the_raw_users_of_each_scenario(data: Path, world: Any) -> None:
    metrics = perform("evaluate", payload_of(data), world)["metrics"]
    table = table_of(data)
    outputs = outputs_of(np.arange(1500), 2, 0)[:, 0]
    # 80 users on 200 hashed rows: some share a row of the table, but none their list.
    user = np.array([np.nan if value is None else value for value in table["user_id"]])
    label = np.array(table["click"])
    for scenario in SCENARIOS:
        here = np.array(table["country"]) == scenario
        click = metrics[scenario]["click"]
        assert click["auc"] == pytest.approx(roc_auc_score(label[here], outputs[here]))
        areas, weights, groups = [], [], 0
        for each in np.unique(user[here & ~np.isnan(user)]):
            mine = here & (user == each)
            groups += label[mine].any()
            if 0 < label[mine].sum() < mine.sum():
                areas.append(roc_auc_score(label[mine], outputs[mine]))
                weights.append(mine.sum())
        assert click["gauc"] == pytest.approx(np.average(areas, weights=weights))
        assert click["groups"] == groups
        assert 0 < click["ndcg@10"] < 1 and 0 < click["mrr"] < 1


def test_regressions_are_measured_in_the_unit_of_their_label(data: Path, world: Any) -> None:
    from mtlrec.control import Silent
    from mtlrec.evaluate import evaluate

    plain = schema_of(jobs(data)[0])
    click, rating = plain.tasks
    schema = replace(plain, tasks=(click, replace(rating, mean=3.0, std=2.0)))
    metrics, ideal, _ = evaluate(model_of(schema, 0), schema, str(data), 90, world, Silent())
    assert ideal is None
    label = np.array(table_of(data)["rating"], dtype=np.float64)
    errors = (2 * outputs_of(np.arange(1500), 2, 0)[:, 1] + 3 - label)[~np.isnan(label)]
    assert metrics["all"]["rating"]["rmse"] == pytest.approx(np.sqrt((errors**2).mean()))
    assert metrics["all"]["rating"]["mae"] == pytest.approx(np.abs(errors).mean())
    assert metrics["all"]["click"] == perform("evaluate", payload_of(data), world)["metrics"]["all"]["click"]


def test_without_a_user_there_is_nothing_of_ranking(data: Path, world: Any) -> None:
    payload = payload_of(data)
    payload["job"]["schema"]["user"] = None
    click = perform("evaluate", payload, world)["metrics"]["all"]["click"]
    assert set(click) == {"auc", "logloss", "calibration", "rows", "positives"}


def test_one_checkpoint_against_another(data: Path, world: Any) -> None:
    payload = payload_of(data)
    result = perform("against", payload, world)
    json.dumps(result, allow_nan=False)
    assert result["metrics"] == perform("evaluate", payload, world)["metrics"]
    other = {**payload, **payload["against"]}
    assert result["against_metrics"] == perform("evaluate", other, world)["metrics"]
    assert list(result["against_metrics"]) == ["all"]
    found = result["differences"]
    assert list(found) == ["all", *SCENARIOS]
    assert [list(tasks) for tasks in found.values()] == [["click", "rating"]] * 4
    for task, side, metric in (("click", "a", "auc"), ("rating", "b", "rmse"), ("click", "b", "logloss")):
        measured = result["metrics" if side == "a" else "against_metrics"]["all"][task][metric]
        assert found["all"][task][metric][side] == pytest.approx(measured)
    assert found["de"]["click"]["mrr"]["a"] == pytest.approx(result["metrics"]["de"]["click"]["mrr"])
    # A regression again from the files: rows without a user are drawn by themselves.
    table = table_of(data)
    label = np.array(table["rating"], dtype=np.float32)
    here = ~np.isnan(label)
    user = np.array([-1 if value is None else value for value in table["user_id"]])[here]
    rows = LabelledRows(
        (user + 1).astype(np.uint64),
        np.zeros(here.sum(), np.uint64),
        (10**6 + np.flatnonzero(here)).astype(np.uint64),
        label[here],
    )
    outputs = outputs_of(np.arange(1500), 2, 0)[here, 1], outputs_of(np.arange(1500), 3, 1)[here, 1]
    units = len(np.unique(user[user >= 0])) + np.count_nonzero(user < 0)
    expected = paired_bootstrap(rows, *outputs, ["rmse"], replicates=2000)["rmse"]
    rmse = found["all"]["rating"]["rmse"]
    assert (rmse["users"], rmse["replicates"]) == (units, 30) == (expected["users"], 30)
    assert rmse["difference"] == pytest.approx(expected["difference"])
    width = expected["high"] - expected["low"]
    assert rmse["high"] - rmse["low"] == pytest.approx(width, rel=0.5)


def test_checkpoints_without_a_common_task_are_refused(data: Path, world: Any) -> None:
    payload = payload_of(data)
    payload["against"]["job"]["schema"]["tasks"] = {"click": {"kind": "binary", "label": "hour"}}
    with pytest.raises(InputError, match=r"second: has no task in common with first.*click against click"):
        perform("against", payload, world)


@pytest.mark.parametrize("world_size", [3])
def test_several_workers_find_what_one_finds(data: Path, world: Any, tmp_path: Path, world_size: int) -> None:
    payload = payload_of(data)
    results = run_processes(f"{__name__}:work", world_size, tmp_path / "run", {"payload": payload})
    assert [rank["evaluate"]["metrics"] for rank in results[1:]] == [{}] * (world_size - 1)
    assert [rank["against"]["differences"] for rank in results[1:]] == [None] * (world_size - 1)
    for action in ("evaluate", "against"):
        _same(results[0][action], perform(action, payload, world))


def _same(found: Any, expected: Any) -> None:
    """Equal, sums of losses up to their last bits."""
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            _same(found[key], value)
    else:
        assert found == (pytest.approx(expected, rel=1e-9) if isinstance(expected, float) else expected)
