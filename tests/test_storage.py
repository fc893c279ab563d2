"""Paths and URLs; reading and writing on disk and over the S3 protocol; faults of the storage in one line."""

from __future__ import annotations

import errno
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtlrec import s3, storage
from mtlrec.job.errors import InputError
from mtlrec.storage import StorageError

pytest_plugins = ["tests.s3_server"]


@pytest.fixture(params=["disk", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder that does not exist yet, on disk and in a bucket."""
    base = str(tmp_path) if request.param == "disk" else request.getfixturevalue("bucket")
    return f"{base}/a folder/run"


# Names


@pytest.mark.parametrize(
    ("url", "base", "expected"),
    [
        ("s3://bucket/data/", "/jobs", "s3://bucket/data"),
        ("s3://bucket", "/jobs", "s3://bucket"),
        ("/data/train/", "/jobs", "/data/train"),
        ("data", "/jobs", "/jobs/data"),
        ("../data", "/jobs/one", "/jobs/data"),
        ("data", "file:///jobs", "/jobs/data"),
        ("data/./train", "s3://bucket/jobs/", "s3://bucket/jobs/data/train"),
        (".", "s3://bucket/jobs", "s3://bucket/jobs"),
        ("../data", "s3://bucket/jobs", "s3://bucket/data"),
        ("/data", "s3://bucket/jobs", "/data"),
        ("file:///data/a%20b", "/jobs", "/data/a b"),
        ("file://localhost/data", "/jobs", "/data"),
        ("~/data", "/jobs", os.path.expanduser("~/data")),
    ],
)
def test_make_absolute(url: str, base: str, expected: str) -> None:
    assert storage.make_absolute(url, base) == expected


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("", "/jobs"),
        ("s3://", "/jobs"),
        ("s3:///key", "/jobs"),
        ("gs://bucket/data", "/jobs"),
        ("file://host/data", "/jobs"),
        ("../../data", "s3://bucket/jobs"),
    ],
)
def test_make_absolute_refuses(url: str, base: str) -> None:
    with pytest.raises(InputError):
        storage.make_absolute(url, base)


plain_name = st.text("abcdefgh.-_ é", min_size=1, max_size=8).filter(lambda text: text.strip(". ") == text)


@given(st.sampled_from(["s3://bucket", "/data", "/"]), st.lists(plain_name, min_size=1, max_size=4))
def test_names_fit_together(root: str, parts: list[str]) -> None:
    url = storage.join(root, *parts)
    assert storage.name(url) == parts[-1]
    assert storage.parent(url) == (storage.join(root, *parts[:-1]) if len(parts) > 1 else root)
    assert storage.make_absolute(url, "/elsewhere") == url
    assert (storage.local_path(url) is None) == url.startswith("s3://")


# Reading and writing


def test_write_and_read(folder: str) -> None:
    url = storage.join(folder, "tables", "user id", "0.bin")
    assert not storage.exists(url)
    assert not storage.exists(folder)
    storage.write(url, b"0123456789")
    assert storage.exists(url)
    assert storage.exists(folder)
    assert not storage.exists(url[:-1])
    assert not storage.exists(folder[:-1])
    assert storage.size(url) == 10
    assert storage.read(url) == b"0123456789"
    storage.write(url, memoryview(b"abc"))
    assert storage.read_text(url) == "abc"
    storage.remove(url)
    storage.remove(url)
    assert not storage.exists(url)


def test_ranges(folder: str) -> None:
    url = storage.join(folder, "file")
    data = bytes(range(256))
    storage.write(url, data)
    for start, end in [(0, 10), (10, 256), (250, 300), (256, 260), (300, 310), (5, 5), (None, 7), (7, None)]:
        assert storage.read(url, start, end) == data[start:end], (start, end)
    assert storage.read_ranges(url, [(0, 3), (250, 256), (3, 5)]) == [data[:3], data[250:], data[3:5]]


def test_missing_file(folder: str) -> None:
    url = storage.join(folder, "none")
    for call in (storage.read, storage.size, storage.open_parquet_input):
        with pytest.raises(FileNotFoundError):
            call(url)
    assert storage.list_files(folder) == []
    assert storage.list_folders(folder) == []
    storage.remove_tree(folder)


def test_lists(folder: str) -> None:
    for path in ["b.bin", "a/z.bin", "a/deep/y.json", "a.bin", "B/x.bin", ".hidden"]:
        storage.write(storage.join(folder, path), path.encode())
    storage.write(storage.join(folder + "-other", "c.bin"), b"")
    files = storage.list_files(folder)
    paths = ["B/x.bin", "a.bin", "a/deep/y.json", "a/z.bin", "b.bin"]
    assert [file.path for file in files] == paths
    assert [storage.read(file.url) for file in files] == [path.encode() for path in paths]
    assert [file.size for file in files] == [len(path) for path in paths]
    assert [file.path for file in storage.list_files(folder, ".json")] == ["a/deep/y.json"]
    assert [file.path for file in storage.list_files(storage.join(folder, "b.bin"))] == ["b.bin"]
    assert storage.list_folders(folder) == ["B", "a"]
    storage.remove_tree(storage.join(folder, "a"))
    assert [file.path for file in storage.list_files(folder)] == ["B/x.bin", "a.bin", "b.bin"]
    storage.remove_tree(folder)
    assert storage.list_files(folder) == []
    assert [file.path for file in storage.list_files(folder + "-other")] == ["c.bin"]


def test_whole_buckets_and_disks_are_never_removed(tmp_path: Path) -> None:
    for url in ("s3://bucket", "s3://bucket/", "/"):
        with pytest.raises(ValueError, match="refusing"):
            storage.remove_tree(url)


def test_links_that_lead_back_end(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "one").write_bytes(b"1")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "dangling").symlink_to(tmp_path / "none")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "two").write_bytes(b"2")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    assert [file.path for file in storage.list_files(str(tmp_path / "data"))] == ["linked/two", "one"]


def test_stream_appears_whole_or_not_at_all(folder: str) -> None:
    url = storage.join(folder, "file")
    with storage.write_stream(url) as file:
        file.write(b"first ")
        assert not storage.exists(url)
        file.write(b"second")
        assert file.tell() == 12
    assert storage.read(url) == b"first second"
    with pytest.raises(KeyError), storage.write_stream(url) as file:
        file.write(b"x" * 100)
        raise KeyError("the writer's own error")
    del file
    assert storage.read(url) == b"first second"
    with storage.write_stream(url):
        pass
    assert storage.read(url) == b""
    assert [found.path for found in storage.list_files(folder)] == ["file"]


def test_stream_of_many_parts(bucket: str) -> None:
    url = storage.join(bucket, "large")
    block = os.urandom(2**20)
    with storage.write_stream(url) as file:
        for _ in range(37):
            file.write(block)
    assert storage.size(url) == 37 * 2**20
    assert storage.read(url, 36 * 2**20, 37 * 2**20) == block
    with pytest.raises(KeyError), storage.write_stream(storage.join(bucket, "broken")) as file:
        for _ in range(37):
            file.write(block)
        raise KeyError("the writer's own error")
    assert [found.path for found in storage.list_files(bucket)] == ["large"]
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    uploads = client.list_multipart_uploads(Bucket=bucket.removeprefix("s3://"))
    assert "Uploads" not in uploads, "the parts of the broken file were left behind"


def test_parquet_through_streams(folder: str) -> None:
    table = pa.table({"a": range(1000), "b": [str(value) for value in range(1000)]})
    url = storage.join(folder, "table.parquet")
    with storage.write_stream(url) as file:
        pq.write_table(table, file, row_group_size=100)
    with storage.open_parquet_input(url) as source:
        assert pq.ParquetFile(source).read().equals(table)
    with storage.open_parquet_input(url, [(4, 500), (500, 700)], storage.size(url)) as source:
        assert source.size() == storage.size(url)
        assert pq.ParquetFile(source).read_row_group(3).equals(table.slice(300, 100))


def test_resolve(folder: str) -> None:
    url = storage.join(folder, "file")
    storage.write(url, b"abc")
    filesystem, path = storage.resolve(url)
    assert filesystem.cat_file(path) == b"abc"


def test_create_is_exclusive(folder: str) -> None:
    url = storage.join(folder, "attempts", "1.json")
    assert storage.create(url, b"first")
    assert not storage.create(url, b"second")
    assert storage.read(url) == b"first"
    assert [file.path for file in storage.list_files(folder)] == ["attempts/1.json"]


@pytest.mark.parametrize("hard_links", [True, False])
def test_one_of_many_creators_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hard_links: bool) -> None:
    if not hard_links:

        def refuse(*_: object) -> None:
            raise OSError(errno.EPERM, "no hard links here")

        monkeypatch.setattr(os, "link", refuse)
    barrier = threading.Barrier(8)

    def attempt(number: int) -> bool:
        barrier.wait()
        return storage.create(str(tmp_path / "one"), str(number).encode())

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(attempt, range(8)))
    assert won.count(True) == 1
    assert storage.read(str(tmp_path / "one")) == str(won.index(True)).encode()
    assert os.listdir(tmp_path) == ["one"]


def test_check_writable_leaves_nothing(folder: str) -> None:
    storage.check_writable(folder)
    assert storage.list_files(folder) == []


def test_a_store_without_conditional_writes_is_refused(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    filesystem = s3.filesystem(bucket)
    genuine = filesystem.pipe_file
    monkeypatch.setattr(filesystem, "pipe_file", lambda url, data, mode, Metadata: genuine(url, data))
    with pytest.raises(InputError, match="conditional writes"):
        storage.check_writable(bucket)
    assert s3.filesystem(bucket).find(bucket) == []


def test_threads_share_one_connection(bucket: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        assert len({id(found) for found in pool.map(s3.filesystem, [bucket] * 16)}) == 1


# Faults


def assert_one_line(
    call: Callable[[], object], kind: type[Exception], *words: str, within: float = 60
) -> str:
    started = time.monotonic()
    with pytest.raises(kind) as raised:
        call()
    assert time.monotonic() - started < within
    message = str(raised.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


def calls_of(url: str) -> Iterator[Callable[[], object]]:
    yield lambda: storage.exists(url)
    yield lambda: storage.read(url)
    yield lambda: storage.list_files(url)
    yield lambda: storage.write(url, b"1")
    yield lambda: storage.create(url, b"1")
    yield lambda: storage.check_writable(url)


def test_no_such_bucket(s3_environment: str) -> None:
    for call in calls_of("s3://not-a-bucket/data"):
        assert_one_line(call, InputError, "s3://not-a-bucket/data", "'not-a-bucket' does not exist")


def test_unreachable_endpoint(s3_environment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://name:password@127.0.0.1:{port}")
    message = assert_one_line(
        lambda: storage.exists("s3://bucket/data"), InputError, f"http://127.0.0.1:{port}", "AWS_ENDPOINT_URL"
    )
    assert "password" not in message


def test_endpoint_that_never_answers(s3_environment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "FIRST_CONTACT_S", 2.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert_one_line(lambda: storage.exists("s3://bucket/data"), InputError, "cannot reach", within=30)


def test_endpoint_that_is_another_server(s3_environment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404)
            self.end_headers()
            self.wfile.write(b"<html><p>Welcome")

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        try:
            assert_one_line(lambda: storage.read("s3://bucket/data"), InputError, "does not answer as S3")
        finally:
            server.shutdown()
            thread.join()


def test_endpoint_that_is_no_url(s3_environment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    assert_one_line(lambda: storage.exists("s3://bucket/data"), InputError, "AWS_ENDPOINT_URL")


def test_no_credentials(s3_environment: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    assert_one_line(
        lambda: storage.exists("s3://bucket/data"), InputError, "AWS_ACCESS_KEY_ID", "credentials"
    )
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert_one_line(lambda: storage.exists("s3://bucket/data"), InputError, "nobody")


def test_refused_credentials(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from moto.core import set_initial_no_auth_action_count

    @set_initial_no_auth_action_count(0)
    def refused() -> None:
        for call in calls_of(bucket + "/data"):
            # Other settings, another connection: the bucket is met anew.
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", f"wrong-{time.monotonic()}")
            assert_one_line(call, InputError, "refuses the credentials (InvalidAccessKeyId)")

    refused()


def test_disk_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A root user may do everything, so the refusal is put in the system's mouth.
    def refuse(*arguments: object, **_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", arguments[0])

    monkeypatch.setattr(Path, "mkdir", refuse)
    for call in (
        lambda: storage.write(str(tmp_path / "a" / "b"), b"1"),
        lambda: storage.check_writable(str(tmp_path / "a")),
    ):
        assert_one_line(call, InputError, str(tmp_path), "Permission denied")


def test_folder_where_a_file_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    assert_one_line(lambda: storage.read(str(tmp_path)), InputError, str(tmp_path), "directory")
    assert_one_line(lambda: storage.write(str(tmp_path / "file" / "below"), b"1"), InputError, "file/below")
    assert_one_line(lambda: storage.check_writable(str(tmp_path / "file")), InputError, "file")
    assert not storage.exists(str(tmp_path / "file" / "below"))


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    url = str(tmp_path / "file")
    storage.write(url, b"before")
    monkeypatch.setattr(os, "fsync", full)
    assert_one_line(lambda: storage.write(url, b"after"), StorageError, url, "disk is full")
    assert_one_line(lambda: storage.create(url + "2", b"after"), StorageError, "disk is full")
    assert_one_line(lambda: storage.check_writable(str(tmp_path)), InputError, "disk is full")
    assert os.listdir(tmp_path) == ["file"]
    assert storage.read(url) == b"before"


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    """The kernel refuses the write half-way, as it does on a full disk."""
    url = str(tmp_path / "file")
    storage.write(url, b"before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        assert_one_line(lambda: storage.write(url, bytes(2**20)), StorageError, url, "disk is full")
        assert_one_line(lambda: storage.create(url + "2", bytes(2**20)), StorageError, "disk is full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["file"]
    assert storage.read(url) == b"before"


def test_not_text(tmp_path: Path) -> None:
    storage.write(str(tmp_path / "file"), b"\xff\xfe")
    with pytest.raises(InputError, match="UTF-8"):
        storage.read_text(str(tmp_path / "file"))


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    script = """
import os, sys
from mtlrec import storage
with storage.write_stream(sys.argv[1]) as file:
    file.write(b"half")
    os._exit(9)
"""
    for name in ("rows/one.npy", "attempts/2.json"):
        subprocess.run([sys.executable, "-c", script, str(tmp_path / name)], check=False, timeout=60)
    storage.write(str(tmp_path / "rows" / "whole.npy"), b"whole")
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(left) == 3, left
    removed = storage.remove_unfinished(str(tmp_path), keep="2.json")
    assert [Path(path).name.split(".")[1] for path in removed] == ["one"]
    assert len(storage.remove_unfinished(str(tmp_path))) == 1
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["whole.npy"]
