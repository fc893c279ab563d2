"""Every URL opens here: `s3://bucket/key`, `file:///path`, or a plain path.

A missing file is FileNotFoundError. What the user can put right (credentials, bucket, endpoint, permissions)
is InputError; any other fault of the storage is StorageError, worth another try. Threads may share all of it.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import unquote

import fsspec
import pyarrow as pa

from mtlrec import s3
from mtlrec.direct import DirectFile
from mtlrec.job.errors import InputError
from mtlrec.patience import TALLY
from mtlrec.patience import limited as limited
from mtlrec.s3 import StorageError as StorageError
from mtlrec.s3 import configure as configure
from mtlrec.s3 import configured as configured
from mtlrec.s3 import environment as environment
from mtlrec.s3 import plain_errors

_PART_BYTES = 16 * 2**20
"""Of an object while it is written: 10,000 parts make 160 GB."""
_UNFINISHED = ".unfinished"
"""On disk, the end of a file's name until it is whole."""
_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


@dataclass(frozen=True)
class File:
    """A file found by `list_files`."""

    path: str
    """Relative to the folder that was listed, with forward slashes."""
    url: str
    size: int
    """Bytes."""
    version: str = ""
    """On object storage: another one whenever the file is another (its ETag); "" on disk."""


# Names


def make_absolute(url: str, base: str) -> str:
    """An S3 URL as it is, without a final slash; a `file://` URL or a path as a plain absolute path.

    `base` is the folder (path or URL) that relative paths start at. Raises InputError on any other scheme.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        if not url:
            raise InputError("'': an empty path; give a folder, a file or an s3:// URL")
        if base.startswith("s3://") and not os.path.isabs(os.path.expanduser(url)):
            bucket, _, key = base.removeprefix("s3://").partition("/")
            path = os.path.normpath(os.path.join(key, url))
            if path.split("/", 1)[0] == "..":
                raise InputError(f"{url}: leads out of the bucket that it is relative to, {base}")
            return f"s3://{bucket}" if path == "." else f"s3://{bucket}/{path}"
        folder = str(local_path(base) or "/")
        return os.path.abspath(os.path.join(folder, os.path.expanduser(url)))
    if scheme == "file":
        host, slash, path = rest.partition("/")
        if host not in ("", "localhost") or not slash:
            raise InputError(f"{url}: a file URL has three slashes, as file:///data/train")
        return os.path.abspath("/" + unquote(path))
    if scheme == "s3":
        if not rest.strip("/") or rest.startswith("/"):
            raise InputError(f"{url}: this names no bucket; write s3://bucket/folder")
        if "@" in rest.partition("/")[0]:
            # Its value is not repeated: it may be a secret.
            raise InputError(
                "an s3:// URL with a name or password before its bucket is refused; write s3://bucket/folder "
                "and give credentials by the AWS environment, its files or a role"
            )
        return url.rstrip("/")
    raise InputError(f"{url}: {scheme}:// is not supported; use s3://bucket/folder, file:///folder or a path")


def join(url: str, *parts: str) -> str:
    """`url` and the parts below it, with single slashes between."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


def name(url: str) -> str:
    """The last part of a URL or path."""
    return url.rstrip("/").rsplit("/", 1)[-1]


def parent(url: str) -> str:
    """The folder that a URL or path lies in."""
    head = url.rstrip("/").rsplit("/", 1)[0]
    return head or "/"


def local_path(url: str) -> Path | None:
    """Where this lies on this machine, or None for object storage."""
    if url.startswith("s3://"):
        return None
    if "://" in url:
        return Path(make_absolute(url, "/"))
    return Path(url)


def resolve(url: str) -> tuple[Any, str]:
    """(fsspec filesystem, path in it) of a URL, for libraries that open files themselves."""
    if (path := local_path(url)) is not None:
        return fsspec.filesystem("file"), str(path)
    with plain_errors(url, "reached"):
        return s3.filesystem(url), url.removeprefix("s3://")


# Reading


def exists(url: str) -> bool:
    """Whether there is a file, or a folder with anything in it (on disk: any folder)."""
    with plain_errors(url, "looked up"):
        if (path := local_path(url)) is None:
            return bool(s3.filesystem(url).exists(url))
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True


def size(url: str) -> int:
    """Bytes of a file."""
    with plain_errors(url, "looked up"):
        if (path := local_path(url)) is None:
            return int(s3.filesystem(url).info(url)["size"])
        return path.stat().st_size


def list_files(url: str, suffix: str = "") -> list[File]:
    """Every file below a folder, sorted by relative path; [] where there is none. A file lists itself.

    Files whose names begin with a dot (our own unfinished writes among them) are left out.
    """
    with plain_errors(url, "listed"):
        if (path := local_path(url)) is None:
            root = url.removeprefix("s3://")
            found = [
                (key[len(root) + 1 :] or name(key), "s3://" + key, info["size"], info.get("ETag", ""))
                for key, info in s3.filesystem(url).find(url, detail=True).items()
                if info["type"] == "file" and not key.endswith("/")
            ]
        elif path.is_file():
            found = [(path.name, str(path), path.stat().st_size, "")]
        else:
            found = list(_walk(path))
    files = (File(*each) for each in found if not name(each[0]).startswith("."))
    return sorted((file for file in files if file.path.endswith(suffix)), key=lambda file: file.path)


def _walk(root: Path) -> Iterator[tuple[str, str, int, str]]:
    seen: set[str] = set()

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    for folder, below, files in os.walk(root, onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link that leads back up
            below.clear()
            continue
        seen.add(real)
        for file in files:
            path = os.path.join(folder, file)
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile, or a dangling link
                yield os.path.relpath(path, root), path, os.stat(path).st_size, ""


def list_folders(url: str) -> list[str]:
    """Names of the folders directly in a folder, sorted; [] where there is none."""
    with plain_errors(url, "listed"):
        if (path := local_path(url)) is None:
            return sorted(name(each) for each in s3.filesystem(url).folders(url.removeprefix("s3://")))
        try:
            return sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
        except FileNotFoundError:
            return []


def read(url: str, start: int | None = None, end: int | None = None) -> bytes:
    """Bytes [start, end) of a file, or all of it; fewer where the file ends before."""
    return read_ranges(url, [(start, end)])[0]


def read_ranges(url: str, ranges: Sequence[tuple[int | None, int | None]]) -> list[bytes]:
    """Several byte ranges [start, end) of one file, side by side where the storage is remote."""
    with plain_errors(url, "read"):
        if (path := local_path(url)) is not None:
            with open(path, "rb") as file:
                parts = []
                for start, end in ranges:
                    file.seek(start or 0)
                    parts.append(file.read() if end is None else file.read(max(end - (start or 0), 0)))
                return parts
        return s3.read_ranges(url, ranges)


def read_into(url: str, spans: Sequence[tuple[int, memoryview]]) -> list[int]:
    """Fill each buffer, of bytes, from its place in one file on; how many bytes there were for each.

    On disk without memory of its own: fresh memory may take longer than the reading.
    """
    if (path := local_path(url)) is None:
        parts = read_ranges(url, [(start, start + len(buffer)) for start, buffer in spans])
        for (_, buffer), part in zip(spans, parts, strict=True):
            buffer[: len(part)] = part
        return [len(part) for part in parts]
    counts = []
    with plain_errors(url, "read"), open(path, "rb", buffering=0) as file:
        for start, buffer in spans:
            file.seek(start)
            done = 0
            while done < len(buffer) and (count := file.readinto(buffer[done:])):
                done += count
            counts.append(done)
    return counts


def read_text(url: str) -> str:
    """A UTF-8 file."""
    try:
        return read(url).decode()
    except UnicodeDecodeError:
        raise InputError(f"{url}: not a text file in UTF-8") from None


def open_parquet_input(
    url: str, ranges: Sequence[tuple[int, int]] = (), file_size: int | None = None, version: str = ""
) -> Any:
    """A seekable Arrow file (close it, or use `with`).

    Object storage: the byte `ranges` are fetched at once, side by side, and held; anything else is a request
    each. `file_size` saves asking for it; FileNotFoundError where the object is of another size, or not of
    `version` (`File.version`), by now.
    """
    with plain_errors(url, "opened"):
        if (path := local_path(url)) is not None:
            # Not a memory map: a file that is cut short while it is read would kill the process (SIGBUS).
            return pa.OSFile(str(path), "r")
    total = size(url) if file_size is None else file_size
    with plain_errors(url, "read"):
        parts = s3.read_ranges(url, ranges, total, version) if ranges else []
    held = [(start, part) for (start, _), part in zip(ranges, parts, strict=True)]
    return pa.PythonFile(s3.RangeFile(url, total, held, version), mode="r")


# Writing


def write(url: str, data: bytes | bytearray | memoryview) -> None:
    """Write a file whole or not at all; on disk it survives a power cut. Folders are made as needed."""
    with write_stream(url) as file:
        file.write(data)


@contextlib.contextmanager
def write_stream(url: str) -> Iterator[BinaryIO]:
    """A file to write into. It appears, complete, when the block ends, and not at all if it raises."""
    if (path := local_path(url)) is None:
        with plain_errors(url, "written"):
            remote = s3.filesystem(url).open(url, "wb", block_size=_PART_BYTES)
        try:
            yield cast(BinaryIO, _Sink(url, remote))
            with plain_errors(url, "written"):
                remote.close()
        except BaseException:
            # s3fs would upload what there is when the file is closed, and its finaliser closes it.
            remote.closed = True
            with contextlib.suppress(Exception):
                remote.discard()
            raise
        return
    unfinished = _unfinished(path)
    with plain_errors(url, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        local = DirectFile(unfinished)
    try:
        yield cast(BinaryIO, _Sink(url, local))
        with plain_errors(url, "written"):
            local.flush()
            os.fsync(local.fileno())
            local.close()
            os.replace(unfinished, path)
            _sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            local.close()
        unfinished.unlink(missing_ok=True)
        raise


class _Sink(io.BufferedIOBase):
    """Passes writes on, with errors in plain words; closing it does nothing, the end of the block does."""

    def __init__(self, url: str, file: Any) -> None:
        self._url, self._file = url, file

    def write(self, data: Any) -> int:
        with plain_errors(self._url, "written"):
            return int(self._file.write(data))

    def tell(self) -> int:
        return int(self._file.tell())

    def writable(self) -> bool:
        return True


def create(url: str, data: bytes) -> bool:
    """Write a file, whole, only if there is none: True if it was this call that made it.

    Of several callers one gets True, also where answers are lost and requests repeated.
    """
    with plain_errors(url, "created"):
        if (path := local_path(url)) is None:
            return s3.create_object(url, bytes(data))
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = _unfinished(path)
        try:
            with open(unfinished, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(unfinished, path)
            except OSError as error:
                if error.errno not in _NO_HARD_LINKS:
                    raise
                with open(path, "xb") as file:  # a reader may see it half written, two creators may not
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
        except FileExistsError:
            return False
        finally:
            unfinished.unlink(missing_ok=True)
        _sync_folder(path.parent)
        return True


def remove(url: str) -> None:
    """Remove a file; it may be gone already."""
    with plain_errors(url, "removed"), contextlib.suppress(FileNotFoundError):
        if (path := local_path(url)) is None:
            s3.filesystem(url).rm_file(url)
        else:
            path.unlink()


def remove_tree(url: str) -> None:
    """Remove a folder and everything in it; it may be gone already. A bucket or / is never removed."""
    path = local_path(url)
    if "/" not in url.removeprefix("s3://").strip("/") if path is None else path == Path("/"):
        raise ValueError(f"{url}: refusing to remove a whole bucket or disk")
    with plain_errors(url, "removed"), contextlib.suppress(FileNotFoundError):
        if path is not None:
            shutil.rmtree(path)
            return
        # First, as what is being uploaded would appear behind our back.
        s3.abort_uploads(url)
        s3.filesystem(url).rm(url, recursive=True)


def list_uploads(url: str) -> list[str]:
    """Files at or below an s3:// URL whose writing began and never ended, sorted; [] on disk.

    A process that was killed leaves their parts behind, which `list_files` does not see. `remove_tree` of a
    folder removes those in it.
    """
    if local_path(url) is not None:
        return []
    with plain_errors(url, "listed"):
        return sorted(s3.list_uploads(url))


def remove_unfinished(url: str, keep: str = "") -> list[str]:
    """Remove what writers that were killed have left at or below a folder on disk; returns the paths.

    For whoever knows that nobody else writes there, but to files of the name `keep`. On object storage
    nothing is to be seen of an unfinished write but `list_uploads`.
    """
    path, removed = local_path(url), []
    if path is not None:
        with plain_errors(url, "swept"):
            for found in sorted(path.rglob(f".*{_UNFINISHED}")):
                if not (keep and found.name.startswith(f".{keep}.")):
                    found.unlink(missing_ok=True)
                    removed.append(str(found))
    return removed


def take_retries() -> dict[str, int]:
    """How often this process had to try something again since the last call, by why."""
    return TALLY.take()


def check_writable(url: str) -> None:
    """Make sure that files can be created in this folder, once each; InputError says why not."""
    probe = join(url, f".probe-{secrets.token_hex(8)}")
    try:
        first, again = create(probe, b"1"), create(probe, b"2")
        remove(probe)
    except (StorageError, FileNotFoundError) as error:
        raise InputError(f"{url}: cannot be written to: {error}") from error
    if not first or again:
        raise InputError(
            f"{url}: this storage ignores conditional writes (If-None-Match), so two runs could not be kept "
            "apart; use a storage that supports them"
        )


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name[:200]}.{secrets.token_hex(6)}{_UNFINISHED}")


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have no such thing
            raise
    finally:
        os.close(descriptor)
