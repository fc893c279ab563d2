"""Runs that an older mtlrec has begun, or that are asked for something else now."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mtlrec import preflight, storage
from mtlrec.checkpoint import folder
from mtlrec.checkpoint.folder import Checkpoint
from mtlrec.feed import _groups, _wanted
from mtlrec.job.errors import InputError
from mtlrec.job.job import job_from_dict
from mtlrec.schema import build_schema
from tests.small_data import small_job

NEW_FIELDS = {
    "features": ("tables", "dim", "min_count", "reserved"),
    "tasks": ("given", "normalise", "label_smoothing", "prior", "mean", "std"),
}


def older(job: dict[str, Any]) -> dict[str, Any]:
    """The resolved job as version 0.1 wrote it before these fields were."""
    old: dict[str, Any] = json.loads(json.dumps(job))
    for part, fields in NEW_FIELDS.items():
        for section in old["schema"][part].values():
            for field in fields:
                if section["kind"] != "number":
                    section.pop(field, None)
    del old["schema"]["tables"], old["schema"]["weight"], old["data"]["negatives"]
    del old["data"]["max_bad_share"]
    del old["model"]["dropout"], old["objective"]["embedding_l2"], old["run"]["evaluate"], old["run"]["seeds"]
    return old


def test_a_run_begun_before_a_field_was_known_goes_on(tmp_path: Path) -> None:
    job = job_from_dict(small_job(tmp_path / "data", tmp_path / "runs"), "test")
    before: Any = SimpleNamespace(meta={"job": older(job.to_dict())})
    preflight._refuse_changed_job("url", job, before)
    changed = job_from_dict({**job.to_dict(), "seed": 8}, "test")
    with pytest.raises(InputError, match="seed was 7, is 8"):
        preflight._refuse_changed_job("url", changed, before)


def test_a_run_finished_before_a_field_was_known_is_finished(tmp_path: Path) -> None:
    job = job_from_dict(small_job(tmp_path / "data", tmp_path / "runs"), "test")
    newest = Checkpoint(5, 1, "there")
    result = {"checkpoint": "there", "asked": {"epochs": job.run.epochs, "max_steps": None}}
    storage.write(f"{tmp_path}/{preflight.RESULT}", json.dumps(result).encode())
    assert preflight.finished_result(str(tmp_path), job, newest) == result


def write_measured(run: Path, step: int, auc: float, logloss: float) -> str:
    url = folder.checkpoint_url(str(run), step, 1)
    metrics = {"all": {"click": {"auc": auc, "logloss": logloss}}}
    storage.write(f"{url}/{folder.MANIFEST}", json.dumps({"meta": {"metrics": metrics}}).encode())
    return url


def test_the_best_is_best_by_what_the_job_names_now(tmp_path: Path) -> None:
    """Also among checkpoints that were measured before the job named anything."""
    urls = [
        write_measured(tmp_path, step, auc, logloss)
        for step, auc, logloss in ((10, 0.7, 0.6), (20, 0.6, 0.4), (30, 0.65, 0.4), (40, 0.5, 0.5))
    ]
    by_loss, by_auc = folder.best(str(tmp_path), ["click/logloss"]), folder.best(str(tmp_path), ["click/auc"])
    assert by_loss is not None and by_loss.url == urls[1], "of two equals the earlier"
    assert by_auc is not None and by_auc.url == urls[0]
    assert folder.measured(by_loss, ["click/logloss"])[0] == -0.4
    assert folder.retain(str(tmp_path), 1, names=["click/logloss"]) == [urls[0], urls[2]]
    assert [found.url for found in folder.list_checkpoints(str(tmp_path))] == [urls[1], urls[3]]


def test_tables_that_features_look_up_together_share_one_vocabulary(tmp_path: Path) -> None:
    raw = small_job(tmp_path / "data", tmp_path / "runs")
    raw["schema"]["tables"] = {
        name: {"ids": "vocabulary", "min_count": 2} for name in ("item", "bias", "third")
    }
    raw["schema"]["features"] |= {
        "user_id": {"kind": "id", "ids": "vocabulary"},
        "item_id": {"kind": "id", "tables": ["item", "bias"]},
        "history": {"kind": "id_list", "table": "item"},
        "seen": {"kind": "id", "column": "item_id", "tables": ["bias", "third"]},
    }
    job = job_from_dict(raw, "test")
    schema = build_schema(job.schema_, job.model)
    groups = _groups(schema)
    assert [sorted(group) for group in groups] == [["user_id"], ["bias", "item", "third"]]
    user, item = _wanted(job, schema, groups)
    assert (user.columns, user.min_count) == (("user_id",), 1)
    assert (set(item.columns), item.min_count, item.reserved) == ({"item_id", "history"}, 2, 1)
