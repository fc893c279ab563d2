"""A store that refuses, delays, cuts short, loses and goes away, over the real S3 protocol."""

from __future__ import annotations

import datetime
import ipaddress
import os
import pickle
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import CredentialRetrievalError
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from mtlrec import patience, s3, storage
from mtlrec.job.errors import InputError
from mtlrec.job.storage import StorageSection
from mtlrec.patience import Patience
from mtlrec.storage import StorageError
from tests.faulty_proxy import FAULTS, FaultyProxy, faulty_proxy

pytest_plugins = ["tests.s3_server"]

KEYS = ("aws_access_key_id", "aws_secret_access_key")
SLACK_S = 60.0
"""A busy machine's own time, beside what is promised."""


@pytest.fixture
def proxy(s3_environment: str, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A proxy without faults yet that `storage_options` lead to, with short waits; `bucket` is behind it."""
    monkeypatch.setattr(patience, "FIRST_WAIT_S", 0.01)
    with faulty_proxy(s3_environment, delay_s=0.05) as proxy:
        storage.configure(StorageSection(endpoint_url=proxy.endpoint, read_timeout_s=20, retries=30))
        storage.take_retries()
        yield proxy
        storage.configure(StorageSection())


def unfinished(bucket: str) -> list[str]:
    """Keys of the uploads that were begun and never finished."""
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    found = client.list_multipart_uploads(Bucket=bucket.removeprefix("s3://"))
    return [upload["Key"] for upload in found.get("Uploads", [])]


def once(fault: str, which: Callable[[str, str, str], bool]) -> Callable[[str, str, str], str | None]:
    """A `choose` that spoils the first request that is `which`."""
    met: list[str] = []
    lock = threading.Lock()

    def choose(method: str, path: str, query: str) -> str | None:
        with lock:
            if met or not which(method, path, query):
                return None
            met.append(path)
            return fault

    return choose


def test_every_operation_survives_every_fault(proxy: FaultyProxy, bucket: str) -> None:
    folder, large = storage.join(bucket, "a folder"), os.urandom(2**20) * 17
    proxy.share = 0.3
    for number in range(12):
        url = storage.join(folder, f"{number:02d}")
        assert storage.create(url, b"first %d" % number), "its own first try, whose answer was lost"
        assert not storage.create(url, b"second"), number
        storage.write(url, bytes(range(256)))
        assert storage.exists(url) and not storage.exists(url + "-none")
        assert storage.size(url) == 256
        assert storage.read(url) == bytes(range(256))
        assert storage.read_ranges(url, [(0, 3), (250, 256), (256, 260)]) == [
            b"\0\1\2",
            bytes(range(250, 256)),
            b"",
        ]
    storage.write(storage.join(folder, "large"), large)
    assert storage.read(storage.join(folder, "large")) == large
    assert [file.path for file in storage.list_files(folder)] == [f"{n:02d}" for n in range(12)] + ["large"]
    assert storage.list_folders(bucket) == ["a folder"]
    storage.check_writable(folder)
    storage.remove(storage.join(folder, "00"))
    storage.remove_tree(folder)
    proxy.share = 0.0
    assert storage.list_files(bucket) == []
    assert unfinished(bucket) == []
    met = proxy.spoilt()
    assert set(met) == set(FAULTS), f"not every fault was met: {met}"
    # Each but a delay is tried again, and one that only cuts a body short harms nothing that has none.
    counts = storage.take_retries()
    assert counts.keys() >= {"busy", "connection lost", "server fault", "cut short"}, counts
    assert storage.take_retries() == {}


@pytest.mark.parametrize("fault", ["lost", "conflict", "error"])
def test_one_of_many_creators_wins(proxy: FaultyProxy, bucket: str, fault: str) -> None:
    lock = threading.Lock()
    met: list[str] = []

    def choose(method: str, path: str, query: str) -> str | None:
        with lock:
            if method != "PUT" or len(met) >= 6:
                return None
            met.append(path)
            return fault

    proxy.choose = choose
    barrier = threading.Barrier(4)

    def attempt(number: int) -> bool:
        barrier.wait()
        return storage.create(storage.join(bucket, "one"), b"the same of all")

    with ThreadPoolExecutor(4) as pool:
        won = list(pool.map(attempt, range(4)))
    assert won.count(True) == 1
    assert len(met) == 6


def test_an_upload_begun_twice_is_finished_once(proxy: FaultyProxy, bucket: str) -> None:
    """The answer that names the upload is lost: the next try begins another."""
    proxy.choose = once("lost", lambda method, _, query: method == "POST" and query.startswith("uploads"))
    url, data = storage.join(bucket, "large"), os.urandom(17 * 2**20)
    storage.write(url, data)
    assert proxy.spoilt() == {"lost": 1}
    assert storage.read(url) == data
    assert unfinished(bucket) == []


@pytest.mark.parametrize("fault", ["lost", "late error", "close"])
def test_an_upload_is_finished_though_its_answer_is_lost(proxy: FaultyProxy, bucket: str, fault: str) -> None:
    proxy.choose = once(fault, lambda method, _, query: method == "POST" and "uploadId" in query)
    url, data = storage.join(bucket, "large"), os.urandom(17 * 2**20)
    storage.write(url, data)
    assert proxy.spoilt() == {fault: 1}
    assert storage.read(url) == data
    assert unfinished(bucket) == []


def test_keys_that_were_not_removed_are_removed_again(proxy: FaultyProxy, bucket: str) -> None:
    for name in ("a/1", "a/2", "b"):
        storage.write(storage.join(bucket, name), b"1")
    proxy.choose = once("keys", lambda method, _, query: method == "POST" and query.startswith("delete"))
    storage.remove_tree(storage.join(bucket, "a"))
    assert proxy.spoilt() == {"keys": 1}
    assert [file.path for file in storage.list_files(bucket)] == ["b"]


def test_a_folder_goes_with_what_was_never_finished_in_it(proxy: FaultyProxy, bucket: str) -> None:
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    for key in ("a/part", "a-other/part"):  # as a killed process leaves them
        client.create_multipart_upload(Bucket=bucket.removeprefix("s3://"), Key=key)
    storage.remove_tree(storage.join(bucket, "a"))
    assert unfinished(bucket) == ["a-other/part"]
    assert storage.list_uploads(storage.join(bucket, "a-other")) == [storage.join(bucket, "a-other/part")]
    assert storage.list_uploads(storage.join(bucket, "a")) == []


def test_an_object_that_was_replaced_is_not_read_as_the_old_one(proxy: FaultyProxy, bucket: str) -> None:
    url = storage.join(bucket, "shard")
    storage.write(url, b"0123456789")
    (file,) = storage.list_files(url)
    assert file.version
    with storage.open_parquet_input(url, [(0, 2)], 10, file.version) as source:
        assert source.read(4) == b"0123"
        storage.write(url, b"9876543210")
        with pytest.raises(FileNotFoundError, match="another object"):
            source.read(4)
    with pytest.raises(FileNotFoundError, match="another object"):
        storage.open_parquet_input(url, [(0, 2)], 10, file.version)
    with storage.open_parquet_input(url, [(0, 2)], 10) as source:
        storage.write(url, b"0123456789ab")
        with pytest.raises(FileNotFoundError, match="not of 10 bytes"):
            source.read(4)


# Giving up


def failure(call: Callable[[], object]) -> tuple[str, float]:
    """What StorageError says, in one line, and after how many seconds."""
    began = time.monotonic()
    with pytest.raises(StorageError) as raised:
        call()
    message = str(raised.value)
    assert "\n" not in message
    return message, time.monotonic() - began


def calls_of(url: str) -> dict[str, Callable[[], object]]:
    return {
        "exists": lambda: storage.exists(url),
        "read": lambda: storage.read(url),
        "ranges": lambda: storage.read_ranges(url, [(0, 1), (2, 3)]),
        "list": lambda: storage.list_files(url),
        "folders": lambda: storage.list_folders(url),
        "write": lambda: storage.write(url, b"1"),
        "create": lambda: storage.create(url, b"1"),
        "remove": lambda: storage.remove(url),
        "remove_tree": lambda: storage.remove_tree(url),
    }


def test_it_gives_up_after_so_many_tries(proxy: FaultyProxy, bucket: str) -> None:
    storage.configure(StorageSection(endpoint_url=proxy.endpoint, retries=3))
    url = storage.join(bucket, "folder/file")
    storage.write(url, b"1")
    proxy.choose = lambda *_: "busy"
    before = len(proxy.seen)
    message, _ = failure(lambda: storage.read(url))
    assert "SlowDown" in message and "given up after 4 tries" in message and url in message
    assert len(proxy.seen) - before == 4
    # One that has been given up is asked once a call, and has to answer soon: what is left to do ends soon.
    for name, call in calls_of(url).items():
        before = len(proxy.seen)
        message, _ = failure(call)
        assert "had been given up before" in message, name
        assert len(proxy.seen) - before <= (2 if name == "ranges" else 1), name
    # Once it answers, it is trusted again.
    proxy.choose = None
    assert storage.read(url) == b"1"
    proxy.choose = once("busy", lambda *_: True)
    assert storage.read(url) == b"1"


def test_it_gives_up_in_the_stated_time_when_connections_are_refused(proxy: FaultyProxy, bucket: str) -> None:
    storage.configure(StorageSection(endpoint_url=proxy.endpoint, retries=100, retry_s=2))
    url = storage.join(bucket, "file")
    storage.write(url, b"1")
    proxy.go_away()
    message, seconds = failure(lambda: storage.read(url))
    assert "cannot reach the storage" in message and "storage_options.endpoint_url" in message
    assert seconds < 2 + SLACK_S
    for call in calls_of(url).values():
        assert failure(call)[1] < SLACK_S


def test_where_another_process_has_reached_it_it_is_lost_and_not_misnamed(
    proxy: FaultyProxy, bucket: str
) -> None:
    options = StorageSection(endpoint_url=proxy.endpoint, retries=6)
    proxy.choose = lambda *_: "close"
    storage.configure(options)
    with pytest.raises(InputError, match=r"check storage_options\.endpoint_url"):
        storage.exists(storage.join(bucket, "file"))
    storage.configure(options.model_copy(update={"region": "eu-west-3"}), proven=True)
    assert "given up after 7 tries" in failure(lambda: storage.exists(storage.join(bucket, "file")))[0]


def test_it_gives_up_in_the_stated_time_when_nothing_answers(proxy: FaultyProxy, bucket: str) -> None:
    options: dict[str, Any] = {"connect_timeout_s": 2, "read_timeout_s": 3, "retry_s": 1.5}
    storage.configure(StorageSection(endpoint_url=proxy.endpoint, **options))
    url = storage.join(bucket, "file")
    storage.write(url, b"1")
    proxy.go_away(silent=True)
    message, seconds = failure(lambda: storage.write(url, b"2"))
    assert "given up" in message
    # retry_s, and one request more that began just before.
    assert 1 < seconds < 1.5 + 2 + 3 + SLACK_S


def test_a_thread_may_have_less_patience(proxy: FaultyProxy, bucket: str) -> None:
    url = storage.join(bucket, "file")
    storage.write(url, b"1")
    proxy.choose = lambda *_: "error"
    with storage.limited(30, retries=2):
        assert "given up after 3 tries" in failure(lambda: storage.read(url))[0]
    with storage.limited(0):
        assert "given up after 1 try" in failure(lambda: storage.read(url))[0]
    # What one thread had no time for is not given up for the others.
    proxy.choose = once("error", lambda *_: True)
    assert storage.read(url) == b"1"


def test_waits_grow_and_end() -> None:
    found = [Patience(8, 1000.0).wait(number, 0.0) for number in range(9)]
    assert found[8] is None
    for number, wait in enumerate(found[:8]):
        most = min(patience.FIRST_WAIT_S * 2**number, patience.LONGEST_WAIT_S)
        assert wait is not None and most / 2 <= wait <= most
    assert Patience(8, 5.0).wait(0, 5.0) is None
    assert Patience(10**6, 1e9).wait(10**5, 0.0) is not None


@pytest.mark.parametrize("name", ["write", "create", "large"])
def test_a_full_store_is_told_at_once(proxy: FaultyProxy, bucket: str, name: str) -> None:
    url = storage.join(bucket, "file")
    storage.write(url, b"before")
    proxy.choose = lambda method, *_: "full" if method in ("PUT", "POST") else None
    calls = {**calls_of(url), "large": lambda: storage.write(url, bytes(17 * 2**20))}
    before = len(proxy.requests("PUT") + proxy.requests("POST"))
    message, _ = failure(calls[name])
    assert "is full (InsufficientStorage)" in message and url in message
    assert len(proxy.requests("PUT") + proxy.requests("POST")) - before == 1
    assert storage.read(url) == b"before"
    with pytest.raises(InputError, match="is full"):
        storage.check_writable(bucket)


def test_a_wrong_region_is_told(proxy: FaultyProxy, bucket: str) -> None:
    proxy.choose = lambda *_: "region"
    with pytest.raises(InputError, match=r"set storage_options\.region or AWS_REGION"):
        storage.read(storage.join(bucket, "file"))


# Options


def certificate(folder: Path) -> Path:
    """Key and self-signed certificate of 127.0.0.1, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    path = folder / "certificate.pem"
    path.write_bytes(secret + made.public_bytes(serialization.Encoding.PEM))
    return path


def test_a_certificate_is_checked_by_the_bundle(s3_environment: str, bucket: str, tmp_path: Path) -> None:
    path = certificate(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(path)
    url = storage.join(bucket, "file")
    try:
        with faulty_proxy(s3_environment, tls=tls) as proxy:
            storage.configure(StorageSection(endpoint_url=proxy.endpoint))
            with pytest.raises(InputError, match=r"certificate of https://127.*ca_bundle"):
                storage.write(url, b"1")
            assert proxy.seen == []
            storage.configure(StorageSection(endpoint_url=proxy.endpoint, ca_bundle=str(path)))
            proxy.share = 0.2
            for data in (b"1", os.urandom(17 * 2**20)):
                storage.write(url, data)
                assert storage.read(url) == data
    finally:
        storage.configure(StorageSection())


def test_another_process_is_given_the_same_patience(proxy: FaultyProxy, bucket: str) -> None:
    """Ray hands the file system of a run to its own processes, and unpickles it there."""
    url = storage.join(bucket, "file")
    filesystem, path = storage.resolve(url)
    other = pickle.loads(pickle.dumps(filesystem))
    assert other is not filesystem
    proxy.choose = once("reset", lambda method, *_: method == "PUT")
    other.pipe_file(path, b"1")
    assert proxy.spoilt() == {"reset": 1}
    assert storage.read(url) == b"1"


def test_options_go_before_the_environment(
    proxy: FaultyProxy, bucket: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    (tmp_path / "config").write_text(
        "[profile ours]\naws_access_key_id = from-the-profile\naws_secret_access_key = test\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    common: dict[str, Any] = {"endpoint_url": proxy.endpoint, "region": "eu-west-3"}
    common["addressing_style"] = "path"
    storage.configure(StorageSection(profile="ours", **common))
    storage.write(storage.join(bucket, "file"), b"1")
    assert proxy.requests("PUT", f"/{bucket.removeprefix('s3://')}/file")
    storage.configure(StorageSection(anonymous=True, **common))
    with pytest.raises(InputError, match="may not have it read"):
        storage.read(storage.join(bucket, "file"))
    client = boto3.client("s3", endpoint_url=s3_endpoint, **dict.fromkeys(KEYS, "test"))
    client.put_object_acl(Bucket=bucket.removeprefix("s3://"), Key="file", ACL="public-read")
    assert storage.read(storage.join(bucket, "file")) == b"1"
    storage.configure(StorageSection(profile="ours", **common))
    with pytest.MonkeyPatch.context() as another:
        for name, value in storage.environment().items():
            another.setenv(name, value)
        storage.configure(StorageSection())
        assert storage.read(storage.join(bucket, "file")) == b"1"
        assert storage.environment() == {}
    storage.configure(StorageSection(profile="nobody", **common))
    with pytest.raises(InputError, match="nobody"):
        storage.read(storage.join(bucket, "file"))
    storage.configure(StorageSection(ca_bundle=str(tmp_path / "none.pem"), **common))
    with pytest.raises(InputError, match=r"storage_options\.ca_bundle"):
        storage.read(storage.join(bucket, "file"))


def write_credentials(home: Path, key: str) -> None:
    (home / "credentials").write_text(
        f"[default]\naws_access_key_id = {key}\naws_secret_access_key = secret\naws_session_token = token\n"
    )


def test_credentials_that_expire_are_read_anew(
    proxy: FaultyProxy, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where something beside the run renews the file. Many requests at once read it once."""
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(variable)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    write_credentials(tmp_path, "FIRST")
    urls = [storage.join(bucket, f"{number}") for number in range(16)]
    for number, url in enumerate(urls):
        storage.write(url, b"%d" % number)
    client = s3.filesystem(bucket)
    connected: list[None] = []
    connect = client.set_session

    failures: list[Exception] = []

    async def set_session(refresh: bool = False) -> Any:
        if refresh and failures:
            raise failures.pop()
        connected.extend([None] * refresh)
        return await connect(refresh=refresh)

    monkeypatch.setattr(client, "set_session", set_session)
    proxy.expired.add("FIRST")
    write_credentials(tmp_path, "SECOND")
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(storage.read, urls)) == [b"%d" % number for number in range(16)]
    assert len(connected) == 1
    # The refusal of a HEAD does not say why.
    proxy.expired.add("SECOND")
    write_credentials(tmp_path, "THIRD")
    assert storage.size(urls[0]) == 1 and len(connected) == 2
    assert {each.key for each in proxy.seen} == {"FIRST", "SECOND", "THIRD"}
    assert storage.take_retries() == {}
    # Who hands them out is away for a moment.
    proxy.expired.add("THIRD")
    write_credentials(tmp_path, "FOURTH")
    failures.append(CredentialRetrievalError(provider="custom-process", error_msg="away"))
    assert storage.read(urls[1]) == b"1" and len(connected) == 3 and not failures
    assert sum(storage.take_retries().values()) == 1


def test_credentials_that_expire_and_are_not_renewed_are_an_error(
    proxy: FaultyProxy, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write(storage.join(bucket, "file"), b"1")
    proxy.expired.add("test")
    for call in (storage.read, storage.size, storage.list_files):
        with pytest.raises(InputError, match=r"have expired \(ExpiredToken\).*no others; renew them$"):
            call(storage.join(bucket, "file"))
    refused = [each for each in proxy.seen if each.fault == "expired"]
    assert len(refused) <= 3 * 4, "twice each, and as often to be told why"
