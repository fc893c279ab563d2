"""s3fs with every request tried again in one place: throttled, lost, cut short or without an answer.

s3fs and botocore each repeat some requests, and neither all of them (a body that is cut short, a refused
connection, an error inside a 200). Here both make one try, and `_call_s3`, through which all of s3fs's
requests go, makes the others. A write whose answer was lost is recognised when it is found done.
"""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Mapping
from typing import Any

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionClosedError,
    CredentialRetrievalError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    SSLError,
)
from botocore.exceptions import ConnectionError as BotoConnectionError
from botocore.parsers import ResponseParserError
from fsspec.asyn import sync_wrapper
from s3fs import S3FileSystem
from s3fs.errors import translate_boto_error

from mtlrec.patience import FULL, LIMIT, TALLY, GaveUp, Patience

CONNECTIONS = 32
"""Requests at once."""
SLOWEST = 64 * 2**10
"""Bytes a second: an upload that is slower counts as stuck."""
_BRIEF = Patience(0, 0.0)
_BRIEF_S = 5.0
"""Once the storage has been given up, a request has one try and so many seconds, until one is answered."""
_BUSY = {
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "ThrottledException",
    "RequestThrottled",
    "RequestThrottledException",
    "RequestLimitExceeded",
    "TooManyRequests",
    "TooManyRequestsException",
    "BandwidthLimitExceeded",
    "ServiceUnavailable",
}
_FAULTS = {"InternalError", "InternalFailure", "RequestTimeout", "IncompleteBody", "BadDigest"}
_LAPSED = {
    "ExpiredToken",
    "ExpiredTokenException",
    "TokenRefreshRequired",
    "InvalidToken",
    "InvalidTokenId",
    "InvalidAccessKeyId",
}
"""Of credentials that were good until now: there may be others by now, in the AWS files or from the role."""
_CONFLICTS = {"ConditionalRequestConflict", "OperationAborted"}
"""Two conditional writes have met: another try finds out who was first."""


class Shortened(BotoCoreError):
    """A body has other bytes than were asked for."""

    fmt = "{problem}"


class PatientS3(S3FileSystem):
    """s3fs whose requests are all tried again, as `retries` and `retry_s` allow, or less (`limited`)."""

    # s3fs counts tries: its own loops make one.
    # (`retries` here is s3fs's name; how often we repeat is in `_patience`.)
    retries = 1

    def __init__(self, *, max_retries: int, retry_s: float, request_s: float, **options: Any) -> None:
        """request_s: seconds that a request may take, beside those that an upload needs for its bytes."""
        super().__init__(**options)
        self._patience = Patience(max_retries, retry_s)
        self._request_s = request_s
        self._slots = asyncio.Semaphore(CONNECTIONS)
        self._away = False
        self._is_let_in, self._renewals, self._renewing = False, 0, asyncio.Lock()

    async def _call_s3(self, method: str, *akwarglist: Mapping[str, Any], **kwargs: Any) -> Any:
        """Send one request until it is answered. Raises GaveUp, or the refusal as s3fs translates it."""
        patience, request_s = LIMIT.get() or self._patience, self._request_s
        if LIMIT.get() is not None:
            request_s = min(request_s, max(patience.seconds, 1.0))
        if self._away:
            patience, request_s = _BRIEF, min(request_s, _BRIEF_S)
        began, retries, is_renewed = time.monotonic(), 0, False
        while True:
            renewals = self._renewals
            try:
                found = await self._try(method, akwarglist, kwargs, request_s)
            except Exception as caught:
                error = caught
                if self._is_let_in and (lapsed := await self._lapse(method, kwargs, caught, request_s)):
                    if is_renewed:
                        error = lapsed
                    else:
                        try:
                            await self._renew(renewals)
                        except Exception as failed:
                            # Whoever hands credentials out may be away for a moment, as the store may.
                            error = failed
                        else:
                            is_renewed = True
                            continue
                why = _why_again(error)
                if why is None:
                    self._away = False
                    if _is_gone(error) and (found := await self._found_done(method, kwargs, retries)):
                        return found
                    translated = translate_boto_error(error)
                    raise translated from (error if translated is not error else caught.__cause__)
                seconds = time.monotonic() - began
                wait = patience.wait(retries, seconds)
                if wait is None:
                    self._away = self._away or patience is self._patience
                    raise GaveUp(retries + 1, seconds, before=patience is _BRIEF) from error
                retries += 1
                TALLY.add(why)
                await asyncio.sleep(wait)
            else:
                self._away, self._is_let_in = False, True
                if method == "create_multipart_upload" and retries:
                    await self._drop_twins(kwargs["Bucket"], kwargs["Key"], found["UploadId"])
                return found

    call_s3 = sync_wrapper(_call_s3)

    async def _lapse(
        self, method: str, kwargs: Mapping[str, Any], error: Exception, request_s: float
    ) -> Exception | None:
        """The refusal of credentials that have been good before, where `error` is one; else None."""
        if _code(error) in _LAPSED:
            return error
        if method.startswith("head_") and _code(error) in ("400", "403"):
            # Unlike that of another request, the refusal of a HEAD has no body that says why.
            try:
                await self._try("list_objects_v2", (), {"Bucket": kwargs["Bucket"], "MaxKeys": 1}, request_s)
            except Exception as told:
                return told if _code(told) in _LAPSED else None
        return None

    async def _renew(self, renewals: int) -> None:
        """Read the credentials anew, by the chain that they came from, unless that was done meanwhile.

        renewals: how many there had been when the request was signed that was refused.
        """
        async with self._renewing:
            if self._renewals == renewals:
                await self.set_session(refresh=True)
                self._renewals += 1

    async def _try(
        self,
        method: str,
        akwarglist: tuple[Mapping[str, Any], ...],
        kwargs: Mapping[str, Any],
        request_s: float,
    ) -> Any:
        body = kwargs.get("Body")
        limit = request_s + (len(body) / SLOWEST if isinstance(body, bytes | bytearray | memoryview) else 0)
        # Waiting for a free connection is no fault of the storage.
        async with self._slots:
            # Nor is what a busy machine takes to set this up.
            await self.set_session()
            async with asyncio.timeout(limit):
                call = getattr(await self.get_s3(kwargs.get("Bucket")), method)
                found = await call(**self._get_s3_method_kwargs(call, *akwarglist, **kwargs))
            if method == "get_object":
                # However long it is: botocore's read_timeout holds for every piece of it.
                found["Body"] = await _whole_body(found, kwargs.get("Range"))
        if method == "delete_objects" and found.get("Errors"):
            first = found["Errors"][0]
            raise ClientError({"Error": {"Code": first["Code"], "Message": first.get("Message", "")}}, method)
        return found

    async def _found_done(self, method: str, kwargs: Mapping[str, Any], retries: int) -> Any:
        """The answer to a request about an upload that is gone, if it is gone as it should be."""
        if method == "abort_multipart_upload":
            return {"UploadId": kwargs["UploadId"]}
        if method != "complete_multipart_upload" or not retries:
            return None
        # An earlier try did it, and its answer was lost: then the object has as many parts.
        head = await self._call_s3("head_object", Bucket=kwargs["Bucket"], Key=kwargs["Key"])
        parts = len(kwargs["MultipartUpload"]["Parts"])
        return head if str(head.get("ETag", "")).strip('"').endswith(f"-{parts}") else None

    async def _drop_twins(self, bucket: str, key: str, upload_id: str) -> None:
        """Abort uploads of this key but one: they were begun by tries whose answers were lost."""
        for upload in await self._uploads(bucket, key):
            if upload["Key"] == key and upload["UploadId"] != upload_id:
                await self._abort_mpu(bucket, key, upload["UploadId"])

    async def _uploads(self, bucket: str, prefix: str) -> list[dict[str, Any]]:
        """Multipart uploads that are not complete, of keys that begin with `prefix`; [] where not allowed."""
        found: list[dict[str, Any]] = []
        marker: dict[str, str] = {}
        while True:
            try:
                page = await self._call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix, **marker)
            except (PermissionError, NotImplementedError):
                return found
            except OSError as error:
                # Not every store has this request.
                if _code(error.__cause__) in ("NotImplemented", "MethodNotAllowed", "501", "405"):
                    return found
                raise
            found += page.get("Uploads") or []
            if not page.get("IsTruncated"):
                return found
            marker = {
                "KeyMarker": page["NextKeyMarker"],
                "UploadIdMarker": page["NextUploadIdMarker"],
            }

    uploads = sync_wrapper(_uploads)

    async def _folders(self, path: str) -> list[str]:
        """Full names of the folders directly in one; [] where there is none."""
        found = await self._lsdir(path, refresh=True)
        return [each["name"] for each in found if each["type"] == "directory"]

    folders = sync_wrapper(_folders)

    async def _ranges(
        self, path: str, ranges: list[tuple[int, int | None]], version: str
    ) -> list[tuple[bytes, int]]:
        """Each range [start, end) of one object, and the object's size. version: its ETag, or ""."""
        tasks = [asyncio.ensure_future(self._range(path, start, end, version)) for start, end in ranges]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:  # where one has failed, nobody waits for the others
                task.cancel()

    ranges = sync_wrapper(_ranges)

    async def _range(self, path: str, start: int, end: int | None, version: str) -> tuple[bytes, int]:
        bucket, key, _ = self.split_path(path)
        wanted = (
            {} if not start and end is None else {"Range": f"bytes={start}-{'' if end is None else end - 1}"}
        )
        wanted |= {"IfMatch": version} if version else {}
        found = await self._call_s3("get_object", Bucket=bucket, Key=key, **wanted)
        data: bytes = found["Body"].getvalue()
        total = found.get("ContentRange", "").rpartition("/")[2]
        return data, int(total) if total.isdecimal() else start + len(data)


class _Body(io.BytesIO):
    """A body that has been read already, for s3fs, which awaits it."""

    async def read(self, size: int = -1) -> bytes:  # type: ignore[override]
        return super().read(size)


async def _whole_body(found: Mapping[str, Any], asked: str | None) -> _Body:
    """The body of a GET, checked against what its head says. Raises Shortened."""
    stream = found["Body"]
    try:
        data = await stream.read()
    finally:
        stream.close()
    expected, told = found.get("ContentLength"), found.get("ContentRange")
    if asked is not None:
        if not told:
            raise Shortened(problem=f"the storage does not serve byte ranges ({asked})")
        first, _, last = told.removeprefix("bytes").strip().partition("/")[0].partition("-")
        expected = int(last) - int(first) + 1
        if not _fits(asked, int(first), int(last), told.rpartition("/")[2]):
            raise Shortened(problem=f"asked for {asked}, was sent {told}")
    if expected is not None and len(data) != expected:
        raise Shortened(problem=f"{len(data):,} bytes came, of {expected:,}")
    return _Body(data)


def _fits(asked: str, first: int, last: int, total: str) -> bool:
    """Whether bytes first..last are those that `asked` ("bytes=5-9", "bytes=5-") names of `total` bytes."""
    start, _, end = asked.removeprefix("bytes=").partition("-")
    if not start:
        return True  # the last bytes: nobody here asks so
    wanted = int(end) if end else None
    if total.isdecimal():
        wanted = int(total) - 1 if wanted is None else min(wanted, int(total) - 1)
    return first == int(start) and (wanted is None or last == wanted)


def _why_again(error: Exception) -> str | None:
    """In a word, why a request that failed so may do better next time; None: it will not."""
    if isinstance(error, ClientError):
        code, status = _code(error), error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if code in FULL or status == 507:
            return None
        if code in _BUSY or status in (429, 503):
            return "busy"
        if code in _FAULTS or status in (500, 502, 504):
            return "server fault"
        if code in _CONFLICTS:
            return "conflict"
        # A body that was damaged on its way does not have the checksum that its head says.
        return "cut short" if "ContentSHA256Mismatch" in code else None
    if isinstance(error, SSLError):
        return None
    if isinstance(error, Shortened | FlexibleChecksumError | IncompleteReadError | ResponseParserError):
        return "cut short"
    if isinstance(error, TimeoutError) or "Timeout" in type(error).__name__:
        return "no answer"
    lost = (
        BotoConnectionError,
        ConnectionClosedError,
        HTTPClientError,
        CredentialRetrievalError,
        FlexibleChecksumError,
        ConnectionError,
    )
    if isinstance(error, lost):
        return "connection lost"
    # aiohttp's own, where aiobotocore lets them through: in the middle of a body.
    return "cut short" if type(error).__name__ in ("ClientPayloadError", "IncompleteRead") else None


def _is_gone(error: Exception) -> bool:
    return isinstance(error, ClientError) and _code(error) in ("NoSuchUpload", "404")


def _code(error: BaseException | None) -> str:
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""
