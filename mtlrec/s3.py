"""What `storage` needs of S3: this process's connection, conditional create, and errors in plain words.

Set up by the usual AWS environment (AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_REGION, AWS_ENDPOINT_URL, ...).
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

from mtlrec.job.errors import InputError

FIRST_CONTACT_S = 12.0
"""Seconds that a bucket has to answer its first request."""
_CONFIG = {
    "connect_timeout": 3,
    "read_timeout": 30,
    "retries": {"max_attempts": 3, "mode": "standard"},
    "max_pool_connections": 32,
}
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_USER_ERRNO = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)
_BAD_CREDENTIALS = (
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "AuthFailure",
    "InvalidClientTokenId",
)

_NO_CREDENTIALS = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "ProfileNotFound",
)

_lock = threading.Lock()
_current: tuple[tuple[int, int], Any] | None = None
_met: set[tuple[int, int, str]] = set()


class StorageError(RuntimeError):
    """The storage failed (full disk, lost connection, server fault): one line. Trying again may help."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def filesystem(url: str) -> Any:
    """The s3fs file system for this URL; the first time a bucket is named, makes sure that it answers.

    One for the process and its AWS environment: s3fs's own cache makes one a thread, and its connections do
    not survive a fork.
    """
    global _current
    settings = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
    state = (os.getpid(), hash(settings))
    with _lock:
        if _current is None or _current[0] != state:
            # Here, because it takes a second that those with local files need not wait for.
            import s3fs

            _current = (
                state,
                s3fs.S3FileSystem(
                    skip_instance_cache=True,
                    use_listings_cache=False,
                    config_kwargs=dict(_CONFIG),
                    # Some S3-compatible servers take only parts of one size.
                    fixed_upload_size=True,
                ),
            )
            # botocore has tried four times by then, a few seconds apart.
            _current[1].retries = 2
        found = _current[1]
    bucket = url.removeprefix("s3://").split("/", 1)[0]
    if (*state, bucket) not in _met:
        _meet(found, url, bucket)
        _met.add((*state, bucket))
    return found


def _meet(filesystem: Any, url: str, bucket: str) -> None:
    """List one key: unlike a HEAD's, the refusal has a body, which says if key, secret or bucket is wrong."""
    prefix = url.removeprefix("s3://").partition("/")[2]
    try:
        filesystem.call_s3(
            "list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1, timeout=FIRST_CONTACT_S
        )
    except Exception as error:
        if error_code(error) == "AccessDenied":
            return  # keys that may read and write but not list: the call itself will tell
        raise _in_plain_words(url, "reached", error, first=True) from error


def read_ranges(url: str, ranges: Sequence[tuple[int | None, int | None]]) -> list[bytes]:
    """Byte ranges [start, end) of one object, side by side; fewer bytes where the object ends before."""
    if len(ranges) > 1:
        starts, ends = [start or 0 for start, _ in ranges], [end for _, end in ranges]
        found: list[bytes] = filesystem(url).cat_ranges([url] * len(ranges), starts, ends, on_error="raise")
        return found
    start, end = ranges[0]
    if end is not None and end <= (start or 0):
        return [b""]
    try:
        return [filesystem(url).cat_file(url, start=start or (None if end is None else 0), end=end)]
    except OSError as error:
        if error_code(error) == "InvalidRange":  # begins at the object's end, or behind it
            return [b""]
        raise


class RangeFile:
    """Just enough of a file for Arrow, over ranged reads."""

    def __init__(self, url: str, total: int, held: list[tuple[int, bytes]]) -> None:
        self._url, self._size, self._held = url, total, held
        self._at = 0
        self.closed = False

    def read(self, count: int = -1) -> bytes | memoryview:
        end = self._size if count < 0 else min(self._at + count, self._size)
        start, self._at = self._at, max(end, self._at)
        for first, part in self._held:
            if first <= start and end <= first + len(part):
                return memoryview(part)[start - first : end - first]
        with plain_errors(self._url, "read"):
            return read_ranges(self._url, [(start, end)])[0]

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def close(self) -> None:
        self._held, self.closed = [], True

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False


def create_object(url: str, data: bytes) -> bool:
    """Put an object only if there is none (If-None-Match: *): True if it was this call that made it."""
    for last in (False, False, False, True):
        try:
            filesystem(url).pipe_file(url, data, mode="create")
            return True
        except FileExistsError:
            return False
        except OSError as error:
            if error_code(error) == "PreconditionFailed":
                return False
            # Two creators met; S3 asks for another try, which finds out who was first.
            if error_code(error) != "ConditionalRequestConflict" or last:
                raise
    raise AssertionError("the last try returns or raises")


@contextlib.contextmanager
def plain_errors(url: str, done: str) -> Iterator[None]:
    """Turn whatever the storage raises while `url` is `done` (read, listed, ...) into one line.

    FileNotFoundError stays what it is. Raises InputError or StorageError.
    """
    try:
        yield
    except (InputError, StorageError, FileNotFoundError):
        raise
    except Exception as error:
        raise _in_plain_words(url, done, error) from error


def error_code(error: BaseException | None) -> str:
    """The S3 error code behind an exception of s3fs or botocore, or ''."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        error = error.__cause__
    return ""


def _in_plain_words(url: str, done: str, error: Exception, first: bool = False) -> Exception:
    """`first`: on first contact an endpoint that cannot be reached is a wrong endpoint, later a lost one."""
    code, kind = error_code(error), type(error).__name__
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return StorageError(f"{url}: the disk is full ({error.strerror}); free some space or write elsewhere")
    if not url.startswith("s3://"):
        if isinstance(error, OSError) and error.errno in _USER_ERRNO:
            return InputError(
                f"{url}: cannot be {done}: {error.strerror}; check the path and its permissions"
            )
        return StorageError(f"{url}: cannot be {done}: {error}") if isinstance(error, OSError) else error
    bucket = url.removeprefix("s3://").split("/", 1)[0]
    if code == "NoSuchBucket":
        return InputError(
            f"{url}: bucket {bucket!r} does not exist at {_endpoint()}; create it or correct it"
        )
    if code == "InvalidBucketName" or kind == "ParamValidationError":
        return InputError(f"{url}: {bucket!r} is not a valid bucket name")
    if kind in _NO_CREDENTIALS:
        return InputError(
            f"{url}: no usable AWS credentials ({error}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "AWS_PROFILE, or a role"
        )
    if code in _BAD_CREDENTIALS:
        return InputError(
            f"{url}: {_endpoint()} refuses the credentials ({code}); check AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN"
        )
    if isinstance(error, PermissionError) or code in ("403", "AccessDenied"):
        return InputError(f"{url}: these credentials may not have it {done} ({code}); ask for the permission")
    if kind in ("EndpointConnectionError", "ConnectTimeoutError", "SSLError", "ProxyConnectionError") or (
        first and kind in ("FSTimeoutError", "ReadTimeoutError", "ConnectionClosedError", "HTTPClientError")
    ):
        fault = InputError if first else StorageError
        return fault(
            f"{url}: cannot reach the storage at {_endpoint()} ({kind}); "
            "check AWS_ENDPOINT_URL and the network"
        )
    if first and isinstance(error, FileNotFoundError):
        return InputError(f"{url}: {_endpoint()} does not answer as S3 storage does; check AWS_ENDPOINT_URL")
    if kind == "ValueError" and "endpoint" in str(error).lower():
        return InputError(f"{url}: AWS_ENDPOINT_URL is not a URL; write it as https://host:port")
    return StorageError(f"{url}: cannot be {done} at {_endpoint()}: {kind} {error}")


def _endpoint() -> str:
    """The endpoint as a person may read it: without a user name or password."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not endpoint:
        return "AWS S3"
    host = urlsplit(endpoint)
    return f"{host.scheme}://{host.hostname}" + (f":{host.port}" if host.port else "")
