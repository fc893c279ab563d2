"""A run with everything on an object store that fails: the same result, nothing left; or an end in time."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from mtlrec import storage
from mtlrec.checkpoint.folder import list_checkpoints
from mtlrec.checkpoint.manifest import read_manifest
from mtlrec.cli import main
from mtlrec.job.storage import StorageSection
from tests.distributed.processes import run_processes
from tests.distributed.test_training import call_of
from tests.faulty_proxy import faulty_proxy
from tests.s3_server import AWS
from tests.small_data import small_job, write_small_data

pytest_plugins = ["tests.s3_server"]

SLACK_S = 60.0
"""Of a busy machine, for what takes a second."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and the job of a run on disk."""
    folder = tmp_path_factory.mktemp("home")
    write_small_data(folder / "train")
    write_small_data(folder / "valid", rows=300, shards=2, seed=1)
    (folder / "job.yaml").write_text(yaml.safe_dump(the_job(str(folder), str(folder / "runs"))))
    return folder


def the_job(data: str, runs: str, **sections: Any) -> dict[str, Any]:
    job = small_job(Path("data"), Path("runs"), name="run")
    job["data"].update(train=f"{data}/train", eval=f"{data}/valid", window=200)
    job["schema"]["features"]["item_id"] = {"kind": "id", "ids": "vocabulary"}
    job["run"].update(storage=runs, report_every_s=0.5, record_rows=True)
    job["run"]["checkpoint"] = {"every_steps": 20, "keep_last": 2}
    job["run"]["evaluate"] = {"every_epochs": 1, "metric": ["click/auc"]}
    return {**job, **sections}


@pytest.fixture(scope="module")
def store(home: Path, s3_endpoint: str) -> Iterator[str]:
    """s3:// URL of a bucket with the data; the environment has credentials for it and no endpoint."""
    import boto3

    with pytest.MonkeyPatch.context() as environment:
        for variable, value in AWS.items():
            environment.setenv(variable, value)
        environment.delenv("AWS_ENDPOINT_URL", raising=False)
        client = boto3.client("s3", endpoint_url=s3_endpoint)
        client.create_bucket(Bucket="store")
        for file in sorted(home.glob("*/*.parquet")):
            client.put_object(Bucket="store", Key=f"data/{file.relative_to(home)}", Body=file.read_bytes())
        yield "s3://store"
        storage.configure(StorageSection())


@pytest.fixture(scope="module")
def on_disk(home: Path) -> dict[str, Any]:
    assert main(["train", str(home / "job.yaml"), "--quiet"]) == 0
    return json.loads((home / "runs" / "run" / "result.json").read_text())


def learnt(checkpoint: str) -> dict[str, Any]:
    """All that a checkpoint holds, by its checksums, and where it stands."""
    manifest = read_manifest(checkpoint)
    kept = {key: manifest.meta[key] for key in ("step", "position", "metrics", "judge", "schema")}
    files = {
        file.file: {name: entry.checksums for name, entry in file.tensors.items()}
        for file in manifest.files()
    }
    return {**kept, "files": files}


def names(run: str) -> list[str]:
    """Files of a run's folder, less what is named by host and time."""
    return [file.path for file in storage.list_files(run) if not file.path.startswith("tensorboard")]


def test_a_run_with_everything_on_a_failing_store_is_the_same_run(
    home: Path,
    store: str,
    s3_endpoint: str,
    on_disk: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with faulty_proxy(s3_endpoint, share=0.05, seed=3) as proxy:
        options = {"endpoint_url": proxy.endpoint}
        job = the_job(f"{store}/data", f"{store}/runs", storage_options=options)
        (home / "s3.yaml").write_text(yaml.safe_dump(job))
        capsys.readouterr()
        assert main(["train", str(home / "s3.yaml"), "--json"]) == 0
        said = capsys.readouterr()
        result = json.loads(said.out)
        assert result["run_dir"] == f"{store}/runs/run"
        assert "and was tried again: " in said.err
        spoilt, asked = proxy.spoilt(), len(proxy.seen)
        assert spoilt.total() > 0.02 * asked and len(spoilt) >= 5, f"{spoilt} of {asked} requests"
        for key in ("metrics", "ideal", "steps", "rows"):
            assert result[key] == on_disk[key], key
        assert result["best"]["score"] == on_disk["best"]["score"]
        assert learnt(result["checkpoint"]) == learnt(on_disk["checkpoint"])
        ours, theirs = (list_checkpoints(each["run_dir"]) for each in (on_disk, result))
        assert [storage.name(each.url) for each in theirs] == [storage.name(each.url) for each in ours]
        assert names(result["run_dir"]) == names(on_disk["run_dir"])
        assert storage.list_uploads(store) == []

        # What reads a checkpoint finds it by the environment.
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        storage.configure(StorageSection())
        predicted = {}
        for run, data, out in (
            (on_disk["run_dir"], f"{home}/valid", f"{home}/predictions"),
            (result["run_dir"], f"{store}/data/valid", f"{store}/predictions"),
        ):
            assert main(["inspect", run, "--verify", "--json"]) == 0
            assert main(["predict", run, "--data", data, "--out", out, "--json", "--quiet"]) == 0
            (part,) = (file.url for file in storage.list_files(out, ".parquet"))
            predicted[out] = pq.read_table(io.BytesIO(storage.read(part)))
        one, other = predicted.values()
        assert one.equals(other)


def test_two_workers_on_a_failing_store_are_the_same_run(
    home: Path, store: str, s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with faulty_proxy(s3_endpoint, share=0.05, seed=4) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        storage.configure(StorageSection())
        jobs = [the_job(str(home), str(tmp_path / "runs")), the_job(f"{store}/data", f"{store}/two")]
        for job in jobs:
            job["run"]["epochs"] = 1
        arguments = {"calls": [call_of(job) for job in jobs], "predictions": None}
        found = run_processes("tests.distributed.test_training:work", 2, tmp_path / "call", arguments)
        disk, remote = found[0]["results"]
        assert proxy.spoilt().total() > 0
        assert learnt(remote["checkpoint"]) == learnt(disk["checkpoint"])
        assert remote["metrics"] == disk["metrics"]
        assert names(remote["run_dir"]) == names(disk["run_dir"])
        assert storage.list_uploads(store) == []


@pytest.mark.parametrize("silent", [False, True])
def test_a_store_that_goes_away_for_good_ends_the_run_in_the_stated_time(
    home: Path, store: str, s3_endpoint: str, capsys: pytest.CaptureFixture[str], silent: bool
) -> None:
    # Not so short that a busy machine is taken for a lost store.
    options = {"connect_timeout_s": 4.0, "read_timeout_s": 8.0, "retry_s": 3.0}
    name = f"gone-{silent}"
    with faulty_proxy(s3_endpoint) as proxy:
        job = the_job(f"{store}/data", f"{store}/runs", name=name)
        job["storage_options"] = {"endpoint_url": proxy.endpoint, **options}
        job["run"]["epochs"] = 100_000
        (home / f"{name}.yaml").write_text(yaml.safe_dump(job))
        went: list[float] = []

        def leave() -> None:
            """As soon as the second checkpoint is complete."""
            deadline = time.monotonic() + 300
            while time.monotonic() < deadline:
                made = {each.path for each in proxy.requests("PUT") if each.path.endswith("/manifest.json")}
                if len(made) >= 2:
                    went.append(time.monotonic())
                    proxy.go_away(silent)
                    return
                time.sleep(0.02)

        thread = threading.Thread(target=leave)
        thread.start()
        capsys.readouterr()
        code = main(["train", str(home / f"{name}.yaml"), "--json", "--quiet"])
        ended = time.monotonic()
        thread.join()
        said = capsys.readouterr()
    assert went, "the run never came to its second checkpoint"
    assert code == 1, said.err
    error = json.loads(said.out)["error"] if said.out else said.err.strip().splitlines()[-1]
    # Of several threads that fail one is told: the first, or one that came after it was given up.
    assert "s3://store/" in error and "given up" in error, error
    # One line of ours; the server of the tests writes to the same stream.
    assert len([line for line in said.err.splitlines() if line.startswith("mtlrec: ")]) == 1
    # docs/storage.md: retry_s, one request more, and what is left to do afterwards.
    assert ended - went[0] < 3.0 + (4.0 + 8.0) + 30.0 + SLACK_S
    # The checkpoints of before are whole, and the run goes on from there once the store is back.
    storage.configure(StorageSection(endpoint_url=s3_endpoint))
    assert len(list_checkpoints(f"{store}/runs/{name}")) >= 1
