"""A real S3 protocol on loopback for tests: `pytest_plugins = ["tests.s3_server"]`, then ask for `bucket`."""

from __future__ import annotations

import os
from collections.abc import Iterator

import boto3
import pytest
from moto.server import ThreadedMotoServer

AWS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_REGION": "us-east-1",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """URL of a server of this test session's own."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_environment(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The AWS environment points at the server, for this process and those that it starts."""
    for variable in [key for key in os.environ if key.startswith("AWS_")]:
        monkeypatch.delenv(variable)
    for variable, value in AWS.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    return s3_endpoint


@pytest.fixture
def bucket(s3_environment: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """URL of an empty bucket: `s3://test-...`."""
    name = f"test-{abs(hash(request.node.nodeid)):x}"
    resource = boto3.resource("s3", endpoint_url=s3_environment)
    found = resource.Bucket(name)
    found.create()
    yield f"s3://{name}"
    found.objects.all().delete()
    found.delete()
