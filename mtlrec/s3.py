"""What `storage` needs of S3: this process's connection, conditional create, and errors in plain words.

Set up by the usual AWS environment and files (AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL, ...) and by a
job's `storage_options`, which `configure` is given.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mtlrec.job.errors import InputError
from mtlrec.job.storage import StorageSection
from mtlrec.patience import FULL, GaveUp, limited

FIRST_CONTACT_S = 12.0
"""Seconds that a bucket has to answer its first request."""
_FIRST_RETRIES = 4
"""Of that request: a wrong endpoint should not take long to be told."""
_MARK = "mtlrec-create"
"""Metadata of an object that `create_object` made: whose it is."""
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
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
    "InvalidToken",
    "InvalidTokenId",
    "TokenRefreshRequired",
    "AuthFailure",
    "InvalidClientTokenId",
)

_WRONG_REGION = (
    "PermanentRedirect",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
)

_NO_CREDENTIALS = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "ProfileNotFound",
)

_lock = threading.Lock()
_options = StorageSection()
_proven = False
_current: tuple[tuple[int, int], Any] | None = None
_met: set[tuple[int, int, str]] = set()


class StorageError(RuntimeError):
    """The storage failed (full disk, lost connection, server fault): one line. Trying again may help."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def configure(options: StorageSection, proven: bool = False) -> None:
    """From here on this process reaches S3 by `options`; the AWS environment says what they leave open.

    proven: another process has reached it so. Then a store that does not answer is lost, and not misnamed: a
    fault, which is given as long as any other.
    """
    global _options, _proven
    with _lock:
        _options, _proven = options, proven


def configured() -> StorageSection:
    """What `configure` was last given."""
    return _options


def environment() -> dict[str, str]:
    """Variables to add for a command that is to reach S3 as this process does, before it reads a job."""
    found = {
        "AWS_ENDPOINT_URL_S3": _options.endpoint_url,
        "AWS_REGION": _options.region,
        "AWS_PROFILE": _options.profile,
        "AWS_CA_BUNDLE": _options.ca_bundle,
    }
    return {name: value for name, value in found.items() if value is not None}


def filesystem(url: str) -> Any:
    """The s3fs file system for this URL; the first time a bucket is named, makes sure that it answers.

    One for the process, its AWS environment and its options: s3fs's own cache makes one a thread, and its
    connections do not survive a fork.
    """
    global _current
    settings = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
    with _lock:
        state = (os.getpid(), hash((settings, _options)))
        if _current is None or _current[0] != state:
            _current = (state, _connect(_options))
        found = _current[1]
    bucket = url.removeprefix("s3://").split("/", 1)[0]
    if (*state, bucket) not in _met:
        _meet(found, url, bucket)
        _met.add((*state, bucket))
    return found


def _connect(options: StorageSection) -> Any:
    # Here, because it takes a second that those with local files need not wait for.
    from mtlrec.s3_client import CONNECTIONS, PatientS3

    if options.ca_bundle is not None and not Path(options.ca_bundle).is_file():
        raise InputError(f"storage_options.ca_bundle: {options.ca_bundle}: there is no such file here")
    # botocore itself knows AWS_DEFAULT_REGION alone.
    client = {"region_name": options.region or os.environ.get("AWS_REGION"), "verify": options.ca_bundle}
    return PatientS3(
        anon=options.anonymous,
        endpoint_url=options.endpoint_url,
        client_kwargs={name: value for name, value in client.items() if value is not None},
        config_kwargs={
            "connect_timeout": options.connect_timeout_s,
            "read_timeout": options.read_timeout_s,
            # Whatever is tried again, PatientS3 does it.
            "retries": {"total_max_attempts": 1, "mode": "standard"},
            "max_pool_connections": CONNECTIONS,
            "s3": {"addressing_style": options.addressing_style},
        },
        max_retries=options.retries,
        retry_s=options.retry_s,
        request_s=options.connect_timeout_s + options.read_timeout_s,
        skip_instance_cache=True,
        use_listings_cache=False,
        # Some S3-compatible servers take only parts of one size.
        fixed_upload_size=True,
        **({"profile": options.profile} if options.profile is not None else {}),
    )


def _meet(filesystem: Any, url: str, bucket: str) -> None:
    """List one key: unlike a HEAD's, the refusal has a body, which says if key, secret or bucket is wrong."""
    prefix = url.removeprefix("s3://").partition("/")[2]
    first = not _proven
    within = FIRST_CONTACT_S if first else None
    try:
        filesystem.connect()
        with limited(FIRST_CONTACT_S, _FIRST_RETRIES) if first else contextlib.nullcontext():
            filesystem.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1, timeout=within)
    except Exception as error:
        if error_code(error) == "AccessDenied":
            return  # keys that may read and write but not list: the call itself will tell
        raise _in_plain_words(url, "reached", error, first) from error


def read_ranges(
    url: str,
    ranges: Sequence[tuple[int | None, int | None]],
    total: int | None = None,
    version: str = "",
) -> list[bytes]:
    """Byte ranges [start, end) of one object, side by side; fewer bytes where the object ends before.

    total, version: bytes and ETag that the object should have, where given. Raises FileNotFoundError where it
    is another by now.
    """
    wanted = [(start or 0, end) for start, end in ranges]
    asked = [(start, end) for start, end in wanted if end is None or end > start]
    if not asked:
        return [b"" for _ in wanted]
    try:
        # A weak ETag matches nothing.
        version = "" if version.startswith("W/") else version
        found = dict(zip(asked, filesystem(url).ranges(url, asked, version), strict=True))
    except OSError as error:
        if version and error_code(error) == "PreconditionFailed":
            raise FileNotFoundError(f"{url}: it is another object by now") from None
        if error_code(error) != "InvalidRange":
            raise
        # One begins at the object's end, or behind it.
        if len(asked) == 1:
            return [b"" for _ in wanted]
        return [read_ranges(url, [each], total, version)[0] for each in wanted]
    if total is not None and any(size != total for _, size in found.values()):
        raise FileNotFoundError(f"{url}: it is another object by now, not of {total:,} bytes")
    return [found[each][0] if each in found else b"" for each in wanted]


class RangeFile:
    """Just enough of a file for Arrow, over ranged reads."""

    def __init__(self, url: str, total: int, held: list[tuple[int, bytes]], version: str = "") -> None:
        self._url, self._size, self._held, self._version = url, total, held, version
        self._at = 0
        self.closed = False

    def read(self, count: int = -1) -> bytes | memoryview:
        end = self._size if count < 0 else min(self._at + count, self._size)
        start, self._at = self._at, max(end, self._at)
        for first, part in self._held:
            if first <= start and end <= first + len(part):
                return memoryview(part)[start - first : end - first]
        with plain_errors(self._url, "read"):
            return read_ranges(self._url, [(start, end)], self._size, self._version)[0]

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
    """Put an object only if there is none (If-None-Match: *): True if it was this call that made it.

    Exact also where an answer is lost and the request repeated: the object carries a mark of its maker's.
    """
    mark, client = secrets.token_hex(16), filesystem(url)
    try:
        client.pipe_file(url, data, mode="create", Metadata={_MARK: mark})
        return True
    except OSError as error:
        if not isinstance(error, FileExistsError) and error_code(error) != "PreconditionFailed":
            raise
    bucket, _, key = url.removeprefix("s3://").partition("/")
    try:
        found = client.call_s3("head_object", Bucket=bucket, Key=key)
    except FileNotFoundError:  # removed again meanwhile
        return False
    return bool(found.get("Metadata", {}).get(_MARK) == mark)


def list_uploads(url: str) -> list[str]:
    """URLs of the files at or below `url` whose upload was begun and never finished.

    Their parts take room and are listed nowhere else. Stores that cannot list them give [].
    """
    return [found for found, _ in _uploads(url)]


def abort_uploads(url: str) -> None:
    """Give up all that `list_uploads` lists."""
    client = filesystem(url)
    for found, upload_id in _uploads(url):
        bucket, _, key = found.removeprefix("s3://").partition("/")
        client.abort_mpu(bucket, key, upload_id)


def _uploads(url: str) -> list[tuple[str, str]]:
    """(URL of the file, id) of each upload."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    found = [(each["Key"], each["UploadId"]) for each in filesystem(url).uploads(bucket, key)]
    return [(f"s3://{bucket}/{name}", id_) for name, id_ in found if f"{name}/".startswith(f"{key}/")]


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
    tried = ""
    if isinstance(error, GaveUp) and isinstance(error.__cause__, Exception):
        tried, error = f" ({error})", error.__cause__
    code, kind = error_code(error), type(error).__name__
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return StorageError(f"{url}: the disk is full ({error.strerror}); free some space or write elsewhere")
    if not url.startswith("s3://"):
        if isinstance(error, OSError) and error.errno in _USER_ERRNO:
            return InputError(
                f"{url}: cannot be {done}: {error.strerror}; check the path and its permissions"
            )
        return StorageError(f"{url}: cannot be {done}: {error}") if isinstance(error, OSError) else error
    where = _where()
    bucket = url.removeprefix("s3://").split("/", 1)[0]
    if code in FULL or _status(error) == 507:
        return StorageError(
            f"{url}: the storage at {_endpoint()} is full ({code}); free some space or write elsewhere"
        )
    if code == "NoSuchBucket":
        return InputError(
            f"{url}: bucket {bucket!r} does not exist at {_endpoint()}; create it or correct it"
        )
    if code == "InvalidBucketName" or kind == "ParamValidationError":
        return InputError(f"{url}: {bucket!r} is not a valid bucket name")
    if code in _WRONG_REGION:
        return InputError(
            f"{url}: bucket {bucket!r} is in another region than it was asked for in ({code}); "
            "set storage_options.region or AWS_REGION to the bucket's"
        )
    if kind in _NO_CREDENTIALS:
        return InputError(
            f"{url}: no usable AWS credentials ({error}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "AWS_PROFILE, or a role"
        )
    if "Expired" in code:
        return InputError(
            f"{url}: the credentials for {_endpoint()} have expired ({code}), and those that the AWS "
            "environment and files have now are no others; renew them"
        )
    if code in _BAD_CREDENTIALS:
        return InputError(
            f"{url}: {_endpoint()} refuses the credentials ({code}); check AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN"
        )
    if isinstance(error, PermissionError) or code in ("403", "AccessDenied"):
        return InputError(f"{url}: these credentials may not have it {done} ({code}); ask for the permission")
    if kind == "SSLError":
        return InputError(
            f"{url}: the certificate of {_endpoint()} cannot be checked: {error}; "
            "name its authority's in storage_options.ca_bundle or AWS_CA_BUNDLE"
        )
    if kind in ("EndpointConnectionError", "ConnectTimeoutError", "ProxyConnectionError") or (
        first
        and kind
        in (
            "FSTimeoutError",
            "TimeoutError",
            "ReadTimeoutError",
            "ConnectionClosedError",
            "HTTPClientError",
        )
    ):
        fault = InputError if first else StorageError
        return fault(
            f"{url}: cannot reach the storage at {_endpoint()} ({kind}); check {where} and the network{tried}"
        )
    if first and isinstance(error, FileNotFoundError):
        return InputError(f"{url}: {_endpoint()} does not answer as S3 storage does; check {where}")
    if kind == "ValueError" and "endpoint" in str(error).lower():
        return InputError(f"{url}: {where} is not a URL; write it as https://host:port")
    return StorageError(f"{url}: cannot be {done} at {_endpoint()}: {kind} {error}{tried}")


def _status(error: BaseException | None) -> int:
    """The HTTP status behind an exception of s3fs or botocore, or 0."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        error = error.__cause__
    return 0


def _where() -> str:
    """What says which endpoint is used."""
    return "AWS_ENDPOINT_URL" if _options.endpoint_url is None else "storage_options.endpoint_url"


def _endpoint() -> str:
    """The endpoint as a person may read it: without a user name or password."""
    endpoint = (
        _options.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    )
    if not endpoint:
        return "AWS S3"
    host = urlsplit(endpoint)
    return f"{host.scheme}://{host.hostname}" + (f":{host.port}" if host.port else "")
