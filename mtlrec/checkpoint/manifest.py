"""The checkpoint format: what a manifest says, how it is written, read and checked (docs/checkpoints.md).

A manifest may come from anywhere: whatever it says is checked against itself, and against the sizes of the
files, before anyone reads a tensor or takes memory for one.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NoReturn

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mtlrec import storage
from mtlrec.checkpoint.folder import MANIFEST, advice, no_checkpoint
from mtlrec.checkpoint.layout import ITEM_BYTES, MAX_HEADER_BYTES, num_bytes
from mtlrec.data.vocabulary import Kind
from mtlrec.job.errors import InputError
from mtlrec.schema import Table

FORMAT = "mtlrec checkpoint"
VERSION = 1
CHUNK_ROWS: Final = 4096
"""Rows of a tensor that share a checksum, from the tensor's own first row on: the least that can be read."""
WEIGHTS = "weights"
STATE = "state."
"""A table's optimizer state `sum` is the tensor `state.sum` beside its weights."""
DENSE_FILE = "dense.safetensors"
MAX_MANIFEST_BYTES = 256 * 2**20

_FIRST_LINE = re.compile(rb'\{"format": "mtlrec checkpoint", "version": 1, "checksum": "([0-9a-f]{16})",\n')
# No part begins with a dot or a slash, so that no file name leads out of the folder.
_PART = "[A-Za-z0-9_][A-Za-z0-9_.-]*"
_FILE = re.compile(rf"{_PART}(/{_PART})*\.safetensors")

Count = Annotated[int, Field(ge=0, le=2**53)]
Checksum = Annotated[str, Field(pattern="^[0-9a-f]{16}$")]


class _Section(BaseModel):
    """Keys that this version does not know are passed over; whatever changes a meaning has a new version."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


class TensorEntry(_Section):
    """Where one tensor lies in its file."""

    dtype: Literal["BOOL", "U8", "I8", "I16", "F16", "BF16", "I32", "F32", "I64", "F64"]
    shape: list[Count] = Field(max_length=16)
    offset: Count
    """From the start of the file, in bytes."""
    bytes: Count
    checksums: list[Checksum]
    """xxh3_64 of each CHUNK_ROWS rows (of the first dimension), in hexadecimal."""

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return self.bytes // self.rows if self.rows else 0


class FileEntry(_Section):
    """One safetensors file."""

    file: str = Field(max_length=512)
    """Relative to the checkpoint's folder."""
    size: Count
    """Bytes of the whole file."""
    header_checksum: Checksum
    """Of all that comes before the first tensor."""
    tensors: dict[str, TensorEntry]

    @property
    def header_bytes(self) -> int:
        return min((entry.offset for entry in self.tensors.values()), default=self.size)


class Block(FileEntry):
    """Rows [row, row + rows) x columns [column, column + columns) of a table: weights and optimizer state."""

    row: Count
    rows: Count
    column: Count
    columns: Count


class TableEntry(_Section):
    rows: Count
    dim: Count
    blocks: list[Block]
    """Sorted by first row, then by first column."""


class VocabularyEntry(FileEntry):
    """Which ids the rows of a table are: the file has the arrays of `mtlrec.data.vocabulary.Vocabulary`."""

    kind: Kind
    ids: Count
    """Ids with a row of their own, behind the reserved rows."""
    reserved: Count
    """Rows for unknown ids."""


class _MetaTable(_Section):
    name: str
    rows: Count
    dim: Count


class _MetaSchema(_Section):
    tables: list[_MetaTable]


class _Meta(_Section):
    """What a checkpoint's `meta` holds at least."""

    job: dict[str, Any]
    schema_: _MetaSchema = Field(alias="schema")
    schema_fingerprint: str
    data: dict[str, Any]
    step: Count
    position: dict[str, Any] | None
    metrics: dict[str, dict[str, dict[str, Any]]] | None
    attempt: Count
    saved_at: str
    mtlrec_version: str


class Manifest(_Section):
    chunk_rows: Literal[4096]
    meta: dict[str, Any]
    """job, schema, schema_fingerprint, data, step, position, metrics, attempt, saved_at, mtlrec_version."""
    tables: dict[str, TableEntry]
    dense: FileEntry
    vocabularies: dict[str, VocabularyEntry] = Field(default_factory=dict)
    """By table; those of other tables are no vocabularies."""

    def files(self) -> list[FileEntry]:
        """Every file beside the manifest."""
        blocks = (block for table in self.tables.values() for block in table.blocks)
        return [self.dense, *self.vocabularies.values(), *blocks]


def checksum(data: bytes | memoryview) -> str:
    return xxhash.xxh3_64_hexdigest(data)


def num_chunks(rows: int) -> int:
    return -(-rows // CHUNK_ROWS)


def encode(manifest: Manifest) -> bytes:
    """The bytes of manifest.json: a first line with the version and the checksum of all that follows it."""
    body = manifest.model_dump(mode="json", by_alias=True)
    rest = "".join(f'"{key}": {json.dumps(value, allow_nan=False)},\n' for key, value in body.items())
    text = rest.removesuffix(",\n").encode() + b"\n}\n"
    first = f'{{"format": "{FORMAT}", "version": {VERSION}, "checksum": "{checksum(text)}",\n'
    return first.encode() + text


def read_manifest(url: str) -> Manifest:
    """The manifest of the checkpoint in the folder `url`, after checking it and the sizes of all its files.

    Raises InputError where there is no complete checkpoint, where it is of a newer format, and where anything
    that the manifest says cannot be true.
    """
    path = storage.join(url, MANIFEST)
    try:
        size = storage.size(path)
        if size > MAX_MANIFEST_BYTES:
            raise broken(url, MANIFEST, f"{size:,} bytes; no manifest has more than {MAX_MANIFEST_BYTES:,}")
        text = storage.read(path)
    except FileNotFoundError:
        raise no_checkpoint(url) from None
    manifest = _decode(url, text)
    _check_files(url, manifest)
    return manifest


def broken(url: str, file: str, problem: str) -> InputError:
    """The error for `file` of the checkpoint in `url`, with what to do about it."""
    return InputError(f"{storage.join(url, file)}: {problem}; {advice(url)}")


def check_tables(url: str, manifest: Manifest, tables: Iterable[Table]) -> None:
    """InputError unless the checkpoint in `url` holds just these tables, with their rows and dims."""
    wanted = {table.name: (table.rows, table.dim) for table in tables}
    if difference := _difference(manifest.tables, wanted):
        raise InputError(f"{url}: does not fit this model: {difference}; use the job that it was trained by")


def find_problem(manifest: Manifest) -> str | None:
    """Where the manifest contradicts itself, and how; None where it does not."""
    try:
        _check_meta(manifest)
        _check_entry("dense", manifest.dense)
        for name, table in manifest.tables.items():
            _check_table(f"tables.{name}", table)
        for name, vocabulary in manifest.vocabularies.items():
            _check_vocabulary(f"vocabularies.{name}", vocabulary, manifest.tables.get(name))
        names = Counter(entry.file for entry in manifest.files())
        twice = next((file for file, count in names.items() if count > 1), None)
        if twice is not None:
            _fail("tables", f"the file {twice!r} stands twice")
    except _Contradiction as error:
        return str(error)
    return None


def find_missing(url: str, files: Iterable[FileEntry]) -> tuple[str, str] | None:
    """The first of `files` that is not in the folder `url` in its full size, and the problem; or None."""
    sizes = {found.path: found.size for found in storage.list_files(url)}
    for entry in files:
        size = sizes.get(entry.file)
        if size is None:
            return entry.file, "the file is missing"
        if size < entry.size:
            return entry.file, f"truncated: {size:,} bytes of {entry.size:,}"
        if size > entry.size:
            return entry.file, f"{size:,} bytes where {entry.size:,} were written"
    return None


class _Contradiction(Exception):
    pass


def _fail(where: str, problem: str) -> NoReturn:
    raise _Contradiction(f"{where}: {problem}")


def _decode(url: str, text: bytes) -> Manifest:
    try:
        body = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        kind = "not valid JSON" if text.strip() else "empty"
        raise broken(url, MANIFEST, f"{kind} ({error})" if text.strip() else kind) from None
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise InputError(f"{storage.join(url, MANIFEST)}: not the manifest of an mtlrec checkpoint")
    version = body.get("version")
    if type(version) is not int or version < 1:
        raise broken(url, MANIFEST, f"version: {version!r} is not a format version")
    if version > VERSION:
        meta = body.get("meta")
        writer = meta.get("mtlrec_version") if isinstance(meta, dict) else None
        by = f" (written by mtlrec {writer})" if isinstance(writer, str) else ""
        raise InputError(
            f"{storage.join(url, MANIFEST)}: format version {version}{by}, and this mtlrec reads none above "
            f"{VERSION}; install a newer one"
        )
    first = _FIRST_LINE.match(text)
    if first is None or first[1].decode() != checksum(memoryview(text)[first.end() :]):
        raise broken(url, MANIFEST, "does not match its own checksum: it was damaged or edited")
    try:
        manifest = Manifest.model_validate(body)
    except ValidationError as error:
        raise broken(url, MANIFEST, _first_problem(error)) from None
    if problem := find_problem(manifest):
        raise broken(url, MANIFEST, problem)
    return manifest


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _first_problem(error: ValidationError) -> str:
    detail = error.errors(include_url=False)[0]
    path = ".".join(str(part) for part in detail["loc"])
    shown = "" if detail["type"] == "missing" else f" (value {repr(detail['input'])[:60]})"
    return f"{path}: {detail['msg'][0].lower()}{detail['msg'][1:]}{shown}"


def _check_meta(manifest: Manifest) -> None:
    try:
        meta = _Meta.model_validate(manifest.meta)
    except ValidationError as error:
        _fail("meta", _first_problem(error))
    wanted = {table.name: (table.rows, table.dim) for table in meta.schema_.tables}
    if difference := _difference(manifest.tables, wanted):
        _fail("tables", f"they differ from meta.schema: {difference}")


def _difference(tables: Mapping[str, TableEntry], wanted: Mapping[str, tuple[int, int]]) -> str | None:
    """How `tables` differ from the names and (rows, dim) that are `wanted`."""
    for name, (rows, dim) in wanted.items():
        if name not in tables:
            return f"table {name!r} is not in the checkpoint"
        if (tables[name].rows, tables[name].dim) != (rows, dim):
            held = f"{tables[name].rows:,} x {tables[name].dim}"
            return f"table {name!r} is {held} (rows x dim) in the checkpoint, not {rows:,} x {dim}"
    extra = next((name for name in tables if name not in wanted), None)
    return None if extra is None else f"the checkpoint's table {extra!r} is in no feature"


def _check_table(where: str, table: TableEntry) -> None:
    kinds: dict[str, tuple[str, bool]] | None = None
    strips: dict[tuple[int, int], list[Block]] = {}
    for number, block in enumerate(table.blocks):
        at = f"{where}.blocks.{number}"
        _check_entry(at, block)
        found: dict[str, tuple[str, bool]] = {
            name: (entry.dtype, _is_row_state(at, block, name)) for name, entry in block.tensors.items()
        }
        kinds = found if kinds is None else kinds
        if WEIGHTS not in found:
            _fail(at, "it has no weights")
        if found != kinds:
            _fail(at, "its tensors differ from those of the table's other blocks")
        strips.setdefault((block.column, block.columns), []).append(block)
    column = 0
    for (start, columns), blocks in sorted(strips.items()):
        row, at = 0, f"{where}, columns {start} to {start + columns}"
        for block in sorted(blocks, key=lambda block: block.row):
            if block.rows < 1 or block.row != row:
                _fail(at, f"row {min(row, block.row):,} is not there just once")
            row += block.rows
        if row != table.rows:
            _fail(at, f"{row:,} rows of {table.rows:,}")
        if columns < 1 or start != column:
            _fail(where, f"column {min(start, column)} is not there just once")
        column += columns
    if column != table.dim or not strips:
        _fail(where, f"{column} columns of {table.dim}")
    assert kinds is not None
    if len(strips) > 1 and any(by_row for _, by_row in kinds.values()):
        _fail(where, "one optimizer state a row, and yet several blocks of columns with a state each")


def _is_row_state(where: str, block: Block, name: str) -> bool:
    """Whether the block's tensor has one element a row, not one for each weight."""
    shape = block.tensors[name].shape
    if name != WEIGHTS and not (name.startswith(STATE) and len(name) > len(STATE)):
        _fail(f"{where}.tensors", f"{name!r} is neither {WEIGHTS!r} nor {STATE + '<name>'!r}")
    if shape == [block.rows, block.columns]:
        return False
    if shape == [block.rows] and name != WEIGHTS:
        return True
    size = f"{block.rows:,} rows and {block.columns} columns"
    _fail(f"{where}.tensors.{name}", f"shape {shape} in a block of {size}")


def _check_vocabulary(where: str, entry: VocabularyEntry, table: TableEntry | None) -> None:
    _check_entry(where, entry)
    if table is None:
        _fail(where, "there is no such table")
    if entry.reserved < 1 or entry.reserved + entry.ids > table.rows:
        _fail(
            where, f"{entry.reserved:,} reserved rows and {entry.ids:,} ids in a table of {table.rows:,} rows"
        )
    found = {name: (tensor.dtype, tensor.shape) for name, tensor in entry.tensors.items()}
    wanted = {name: ("I64", [entry.ids]) for name in ("hashes", "counts", "ids")}
    if entry.kind in ("string", "binary"):
        texts = entry.tensors.get("ids")
        wanted["ids"] = ("U8", texts.shape[:1] if texts is not None else [])
        wanted["offsets"] = ("I64", [entry.ids + 1])
    if found != wanted:
        _fail(f"{where}.tensors", f"they are not those of {entry.ids:,} ids of kind {entry.kind}")


def _check_entry(where: str, entry: FileEntry) -> None:
    if not _FILE.fullmatch(entry.file):
        _fail(f"{where}.file", f"{entry.file!r} is not the name of a .safetensors file inside the checkpoint")
    at = entry.header_bytes
    if not 10 <= at <= min(MAX_HEADER_BYTES + 8, entry.size):
        _fail(where, f"a header of {at:,} bytes in a file of {entry.size:,}")
    for name, tensor in sorted(entry.tensors.items(), key=lambda item: (item[1].offset, item[1].bytes)):
        if tensor.bytes != num_bytes(tensor.dtype, tensor.shape):
            elements = f"shape {tensor.shape} of {ITEM_BYTES[tensor.dtype]}-byte elements"
            _fail(f"{where}.tensors.{name}", f"{tensor.bytes:,} bytes for {elements}")
        if tensor.offset != at:
            _fail(f"{where}.tensors.{name}", f"it begins at byte {tensor.offset:,}, not {at:,}")
        if len(tensor.checksums) != num_chunks(tensor.rows):
            _fail(f"{where}.tensors.{name}", f"{len(tensor.checksums)} checksums for {tensor.rows:,} rows")
        at += tensor.bytes
    if at != entry.size:
        _fail(where, f"its tensors end at byte {at:,} of {entry.size:,}")


def _check_files(url: str, manifest: Manifest) -> None:
    if missing := find_missing(url, manifest.files()):
        raise broken(url, *missing)
    if (root := storage.local_path(url)) is not None:
        _refuse_links(url, root, manifest)


def _refuse_links(url: str, root: Path, manifest: Manifest) -> None:
    """A link inside the folder could lead out of it; the folder itself may be one."""
    parts = {part for entry in manifest.files() for part in (Path(entry.file), *Path(entry.file).parents)}
    for part in sorted(parts - {Path(".")}):
        if os.path.islink(root / part):
            raise broken(url, str(part), "a symbolic link, which could lead out of the checkpoint")
