"""Which checkpoints of a run count, which are kept, and what the sweep may touch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from mtlrec import storage
from mtlrec.checkpoint import folder
from mtlrec.checkpoint.folder import checkpoint_url
from mtlrec.job.errors import InputError
from tests.checkpoint.tables import cut, make_table, save_ranks

pytest_plugins = ["tests.s3_server"]

TABLE = make_table("user", 5, 4)


@pytest.fixture(params=["disk", "object storage"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a run's folder that does not exist yet."""
    yield (
        str(tmp_path / "run") if request.param == "disk" else f"{request.getfixturevalue('bucket')}/runs/run"
    )


def complete(run: str, step: int, attempt: int = 1, **meta: Any) -> str:
    url = checkpoint_url(run, step, attempt)
    save_ranks(url, [cut(TABLE)], [TABLE], step=step, **meta)
    return url


def unfinished(run: str, step: int, attempt: int) -> str:
    url = checkpoint_url(run, step, attempt)
    storage.write(storage.join(url, "tables/user/000000000000.safetensors"), b"half")
    return url


def auc(value: float | None) -> dict[str, Any]:
    return {"all": {"click": {"auc": value, "rows": 3}}}


def test_names() -> None:
    assert checkpoint_url("/runs/a", 123, 1) == "/runs/a/checkpoints/step-000000000123.a0001"
    assert checkpoint_url("s3://b/a", 10**13, 12345) == "s3://b/a/checkpoints/step-10000000000000.a12345"


def test_latest_is_the_last_complete_one(run: str) -> None:
    assert folder.latest(run) is None and folder.list_checkpoints(run) == []
    unfinished(run, 5, 1)
    assert folder.latest(run) is None
    first = complete(run, 9)
    again = complete(run, 9, attempt=2)
    last = complete(run, 10)
    unfinished(run, 11, 2)
    storage.write(storage.join(run, "checkpoints", "notes", "manifest.json"), b"{}")
    found = folder.latest(run)
    assert found is not None and (found.url, found.step, found.attempt) == (last, 10, 1)
    assert [each.url for each in folder.list_checkpoints(run)] == [first, again, last]
    before = folder.previous(last)
    assert before is not None and before.url == again
    assert folder.previous(first) is None and folder.previous(run) is None


def test_sweep_takes_what_earlier_attempts_left_unfinished_and_nothing_else(run: str) -> None:
    kept = [complete(run, 10, 1), unfinished(run, 20, 3), unfinished(run, 20, 4), complete(run, 20, 2)]
    swept = [unfinished(run, 10, 2), unfinished(run, 20, 1)]
    strange = storage.join(run, "checkpoints", "mine")
    storage.write(storage.join(strange, "file"), b"1")
    assert sorted(folder.sweep(run, 3)) == sorted(swept)
    assert all(storage.exists(url) for url in [*kept, strange])
    assert not any(storage.exists(url) for url in swept)
    assert folder.sweep(run, 3) == []


def test_sweep_takes_parts_of_files_that_were_never_finished(bucket: str) -> None:
    """A writer that is killed in its first large file leaves nothing else on object storage."""
    run, name = storage.join(bucket, "runs/run"), bucket.removeprefix("s3://")
    whole = complete(run, 10, 1)
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    dead, live = checkpoint_url(run, 20, 1), checkpoint_url(run, 20, 2)
    for url in (dead, live, whole):
        key = storage.join(url, "dense.safetensors").removeprefix(f"s3://{name}/")
        client.create_multipart_upload(Bucket=name, Key=key)
    assert folder.sweep(run, 2) == [dead]
    assert [storage.parent(url) for url in storage.list_uploads(run)] == [whole, live]
    assert [each.url for each in folder.list_checkpoints(run)] == [whole]


def test_retain_keeps_the_last_the_best_and_what_is_protected(run: str) -> None:
    worst = complete(run, 1, metrics=auc(0.6))
    best = complete(run, 2, metrics=auc(0.9))
    protected = complete(run, 3, metrics=auc(0.7))
    unmeasured = complete(run, 4)
    last = [complete(run, 5, metrics=auc(0.8)), complete(run, 6)]
    live = unfinished(run, 0, 1)
    assert folder.retain(run, 6) == []
    found = folder.best(run)
    assert found is not None and found.url == best
    assert folder.retain(run, 2, protect={protected}) == [worst, unmeasured]
    assert [each.url for each in folder.list_checkpoints(run)] == [best, protected, *last]
    assert storage.exists(live) and not storage.exists(worst)
    assert folder.retain(run, 1) == [protected, last[0]]
    assert [each.url for each in folder.list_checkpoints(run)] == [best, last[1]]


def test_retain_when_the_last_is_the_best(run: str) -> None:
    first, second = complete(run, 1, metrics=auc(0.5)), complete(run, 2, metrics=auc(0.5))
    found = folder.best(run)
    assert found is not None and found.url == second, "the later of two equals"
    assert folder.retain(run, 1) == [first]


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        (None, None),
        ({}, None),
        ({"all": {}}, None),
        (auc(None), None),
        (auc(0.75), 0.75),
        ({"all": {"click": {"auc": 0.5}, "buy": {"auc": 1.0}, "rating": {"rmse": 9.0}}, "de": {}}, 0.75),
        ({"all": {"click": {"auc": 0.5}, "buy": {"auc": None}}}, None),
        ({"all": {"rating": {"rmse": 2.0}, "stars": {"rmse": 3.0}}}, -2.5),
        ({"all": {"rating": {"rmse": float("inf")}}}, None),
        ({"all": [1]}, None),
        ("words", None),
    ],
)
def test_score(metrics: Any, expected: float | None) -> None:
    assert folder.score(metrics) == expected


def test_a_manifest_that_cannot_be_read_is_nobodys_best(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    good, bad = complete(run, 1, metrics=auc(0.5)), complete(run, 2, metrics=auc(0.9))
    for text in (b"{", b"[]", b'{"meta": 3}', b"\xff"):
        storage.write(storage.join(bad, "manifest.json"), text)
        found = folder.best(run)
        assert found is not None and found.url == good


def test_a_checkpoint_is_discarded_manifest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = str(tmp_path / "run")
    old, _ = complete(run, 1), complete(run, 2)

    def interrupted(url: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(storage, "remove_tree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            folder.retain(run, 1)
    assert storage.exists(old) and [each.step for each in folder.list_checkpoints(run)] == [2]
    assert folder.sweep(run, 2) == [old]


def test_find(run: str) -> None:
    first, second = complete(run, 1), complete(run, 2)
    assert folder.find(run) == second and folder.find(run + "/") == second
    assert folder.find(first) == first and folder.find(f"{first}/manifest.json") == first
    half = unfinished(run, 3, 1)

    def refusal(url: str) -> str:
        with pytest.raises(InputError) as caught:
            folder.find(url)
        return str(caught.value)

    assert refusal(half) == (
        f"{half}: not finished (manifest.json, written last, is missing); "
        f"use the checkpoint before it, {second} (a run does, once the bad folder is removed)"
    )
    absent = checkpoint_url(run, 4, 1)
    assert refusal(absent) == f"{absent}: there is no such checkpoint; the checkpoint before it is {second}"
    nowhere = storage.join(run, "nowhere")
    assert refusal(nowhere) == f"{nowhere}: there is no such checkpoint; check the path"
    storage.write(storage.join(run, "else", "file"), b"1")
    assert "else: not a checkpoint (no manifest.json in it); give a run's folder" in refusal(f"{run}/else")
    other = storage.join(storage.parent(run), "other")
    unfinished(other, 1, 1)
    assert refusal(other) == f"{other}: this run has no complete checkpoint yet; let it reach its first save"
