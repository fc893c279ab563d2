"""Which Arrow types a column may have, for each thing that the schema reads from it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as kinds

from mtlrec.job.errors import InputError
from mtlrec.schema import Column

_TEXT = (kinds.is_string, kinds.is_large_string, kinds.is_string_view)
_BINARY = (kinds.is_binary, kinds.is_large_binary, kinds.is_binary_view, kinds.is_fixed_size_binary)
_NUMBER = (kinds.is_integer, kinds.is_floating, kinds.is_boolean)
_LIST = (kinds.is_list, kinds.is_large_list)


def _is(kind: pa.DataType, tests: Sequence[Callable[[pa.DataType], bool]]) -> bool:
    return any(test(kind) for test in tests)


_ID = (kinds.is_integer, *_TEXT, *_BINARY)
_ALLOWED: dict[str, tuple[Callable[[pa.DataType], bool], str]] = {
    "id": (lambda kind: _is(kind, _ID), "integers, strings or binary"),
    "id_list": (
        lambda kind: _is(kind, _LIST) and _is(_plain(kind.value_type), _ID),
        "lists of integers, strings or binary",
    ),
    "number": (
        lambda kind: _is(kind, _NUMBER),
        "integers, floats or booleans (cast decimals and times to double)",
    ),
    "vector": (
        lambda kind: _is(kind, (*_LIST, kinds.is_fixed_size_list)) and _is(kind.value_type, _NUMBER),
        "lists (or fixed-size lists) of integers, floats or booleans",
    ),
    "label": (lambda kind: _is(kind, _NUMBER), "integers, floats or booleans"),
    "weight": (lambda kind: _is(kind, _NUMBER), "integers, floats or booleans"),
    "scenario": (lambda kind: _is(kind, (kinds.is_integer, *_TEXT)), "integers or strings"),
    "anything": (lambda kind: True, "anything"),
}


def arrow_schema(footer: pq.FileMetaData, url: str) -> pa.Schema:
    """The Arrow schema of a Parquet file, or InputError."""
    try:
        return footer.schema.to_arrow_schema()
    except pa.ArrowException as error:
        raise InputError(f"{url}: its schema cannot be read: {error}; replace the file") from error


def find(schema: pa.Schema, url: str, column: str, where: str = "asked for") -> pa.Field:
    """The field of a column; InputError where there is none, or more than one."""
    places = schema.get_all_field_indices(column)
    if not places:
        have = ", ".join(schema.names[:20]) + (", ..." if len(schema.names) > 20 else "")
        raise InputError(f"{url}: column {column!r} ({where}) is missing; columns here: {have}")
    if len(places) > 1:
        raise InputError(
            f"{url}: column {column!r} ({where}) is there {len(places)} times; rename the others"
        )
    return schema.field(places[0])


def check(schema: pa.Schema, url: str, columns: Sequence[Column]) -> None:
    """InputError, naming file and column, unless every column is there and of a type that it may have."""
    for column in columns:
        kind = _plain(find(schema, url, column.name, column.where).type)
        fits, allowed = _ALLOWED[column.holds]
        if not fits(kind):
            raise InputError(
                f"{url}: column {column.name!r} ({column.where}) has type {kind}; for kind {column.holds} "
                f"the column must hold {allowed}"
            )
        if column.identity and _family(kind) != "integers":
            raise InputError(
                f"{url}: column {column.name!r} ({column.where}) has type {kind}; with ids: identity the id "
                "is the table's row and must be an integer; use ids: hash"
            )


def check_alike(
    first: pa.Schema, first_url: str, other: pa.Schema, url: str, columns: Sequence[Column]
) -> None:
    """InputError where shards cannot be read as one: ids of two kinds hash apart."""
    for column in columns:
        if column.holds == "anything":
            one, two = (_plain(schema.field(column.name).type) for schema in (first, other))
            if one != two:
                raise InputError(
                    f"{url}: column {column.name!r} ({column.where}) has type {two}, but {one} in "
                    f"{first_url}; a column that is carried along must have one type in every file"
                )
        if column.holds in ("id", "id_list"):
            one, two = (schema.field(column.name).type for schema in (first, other))
            if _family(one) != _family(two):
                raise InputError(
                    f"{url}: column {column.name!r} ({column.where}) holds {_family(two)}, but "
                    f"{_family(one)} in {first_url}; the ids of a column must be of one kind in every file"
                )


def id_kinds(schema: pa.Schema, columns: Sequence[Column]) -> dict[str, str]:
    """What the columns of ids hold, as `check_alike` tells them apart."""
    ids = (column.name for column in columns if column.holds in ("id", "id_list"))
    return {name: _family(schema.field(name).type) for name in ids}


def list_lengths(
    footers: Iterable[pq.FileMetaData], schema: pa.Schema, columns: Sequence[Column]
) -> dict[str, float]:
    """Mean length of the columns of lists of ids, by the first of `footers` that has rows.

    A list that is empty or missing takes a place in Parquet too, and counts one.
    """
    names = {column.name for column in columns if column.holds == "id_list"}
    footer = next((each for each in footers if each.num_rows), None)
    if footer is None or not names:
        return {}
    groups = [footer.row_group(group) for group in range(footer.num_row_groups)]
    found = {}
    for leaf in leaves_of(footer, schema, names)[0]:
        column = _column_of(footer.schema.column(leaf).path, schema)
        found[column] = sum(group.column(leaf).num_values for group in groups) / footer.num_rows
    return found


def leaves_of(
    footer: pq.FileMetaData, schema: pa.Schema, columns: Collection[str]
) -> tuple[list[int], list[str]]:
    """Numbers of the leaf columns of `columns`; and the paths of those that hold strings or binary."""
    leaves, text = [], []
    for leaf in range(footer.num_columns):
        chunk = footer.schema.column(leaf)
        column = _column_of(chunk.path, schema)
        if column in columns:
            leaves.append(leaf)
            kind = _innermost(schema.field(column).type)
            if chunk.physical_type == "BYTE_ARRAY" and _is(kind, (*_TEXT, *_BINARY)):
                text.append(chunk.path)
    return leaves, text


def _column_of(path: str, schema: pa.Schema) -> str:
    """The column that a leaf's dotted path belongs to; names may have dots themselves."""
    if path in schema.names:
        return path
    return max((name for name in schema.names if path.startswith(name + ".")), key=len)


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type of the values of a dictionary; any other type as it is."""
    return kind.value_type if kinds.is_dictionary(kind) else kind


def _innermost(kind: pa.DataType) -> pa.DataType:
    kind = _plain(kind)
    return _innermost(kind.value_type) if _is(kind, (*_LIST, kinds.is_fixed_size_list)) else kind


def _family(kind: pa.DataType) -> str:
    return "integers" if kinds.is_integer(_innermost(kind)) else "strings or binary"
