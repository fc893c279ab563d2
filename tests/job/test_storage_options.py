"""How object storage is reached: what a job may say of it, and the secrets that it may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mtlrec import storage
from mtlrec.job.errors import InputError
from mtlrec.job.job import job_from_dict
from mtlrec.job.storage import StorageSection
from mtlrec.preflight import read_job
from tests.small_data import small_job

SECRET = "wJalrXUtnFEMI"


def job_with(options: Any) -> dict[str, Any]:
    return {**small_job(Path("data"), Path("runs")), "storage_options": options}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"key": SECRET}, "storage_options.key: a job never holds a secret"),
        ({"secret": SECRET}, "storage_options.secret: a job never holds a secret"),
        ({"token": SECRET}, "AWS_SECRET_ACCESS_KEY"),
        ({"password": SECRET}, "storage_options.password: a job never holds a secret"),
        ({"aws_access_key_id": SECRET}, "storage_options.aws_access_key_id: a job never holds a secret"),
        ({"AWS_SESSION_TOKEN": SECRET}, "a job never holds a secret"),
        (
            {"client_kwargs": {"aws_secret_access_key": SECRET}},
            "storage_options.client_kwargs: unknown field",
        ),
        ({"endpoint_url": f"https://me:{SECRET}@store:9000"}, "storage_options.endpoint_url: more than"),
        ({"endpoint_url": f"https://store/?token={SECRET}"}, "storage_options.endpoint_url: more than"),
        ({"endpoint_url": [SECRET]}, "storage_options.endpoint_url: expected text"),
        ({"endpoint_url": "store:9000"}, "write it as https://host:port"),
        ({"endpoint_url": "https://store:port"}, "not a URL"),
        (f"key={SECRET}", "storage_options: expected a mapping"),
        ({"retries": -1}, "storage_options.retries"),
        ({"addressing_style": "dns"}, "storage_options.addressing_style"),
        ({"region": "eu west"}, "storage_options.region"),
    ],
)
def test_refused_without_showing_it(options: Any, words: str) -> None:
    with pytest.raises(InputError) as raised:
        job_from_dict(job_with(options), "job.yaml")
    message = str(raised.value)
    assert words in message
    assert SECRET not in message and "\n" not in message


@pytest.mark.parametrize("url", [f"s3://me:{SECRET}@bucket/data", f"s3://{SECRET}@bucket"])
def test_no_secret_in_an_s3_url(url: str) -> None:
    with pytest.raises(InputError, match="credentials by the AWS environment") as raised:
        storage.make_absolute(url, "/")
    assert SECRET not in str(raised.value)


def test_they_are_not_what_a_run_is() -> None:
    plain = job_from_dict(small_job(Path("data"), Path("runs")), "job.yaml")
    other = job_from_dict(job_with({"endpoint_url": "https://store:9000", "retries": 3}), "job.yaml")
    assert plain.storage_options == StorageSection()
    assert plain.identity() == other.identity()
    assert other.to_dict()["storage_options"]["endpoint_url"] == "https://store:9000"


def test_reading_a_job_sets_them_for_the_process(tmp_path: Path) -> None:
    options = {"endpoint_url": "https://store:9000", "ca_bundle": "ca.pem"}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job_with(options)))
    try:
        job = read_job(str(tmp_path / "job.yaml"), ["storage_options.retries=4"])
        assert storage.configured() == job.storage_options
        assert job.storage_options.ca_bundle == str(tmp_path / "ca.pem")
        assert job.storage_options.retries == 4
    finally:
        storage.configure(StorageSection())
