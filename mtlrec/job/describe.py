"""Turns a validation error into one line: the field's path, its value, what is allowed."""

from __future__ import annotations

import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic_core import ErrorDetails

from mtlrec.job.section import Section


def describe(detail: ErrorDetails, raw: Any, root: type[Section]) -> str:
    """`detail` as pydantic gave it on reading `raw` into `root` -> one line for the person who wrote it."""
    location, kind, context = detail["loc"], detail["type"], detail.get("ctx", {})
    path = _field_path(location, raw, missing=kind == "missing")
    if kind == "extra_forbidden":
        fields = sorted({name for model in _models_at(location[:-1], root) for name in _fields(model)})
        return f"{path}: unknown field (value {_short(detail['input'])}); allowed here: {', '.join(fields)}"
    if kind == "missing":
        return f"{path}: this field is required"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tags = [tag for model in _models_at(location, root) for tag in _tags(model)]
        return f"{path}.kind: {context.get('tag', 'nothing')!r} is not known; allowed: {', '.join(tags)}"
    if kind == "value_error":
        message = str(context["error"])
        # A message of our own validators may begin with the field below `path` that is at fault.
        joint = "." if message.split(" ", 1)[0].endswith(":") else ": "
        return f"{path}{joint}{message}" if path else message
    return f"{path}: {detail['msg'][0].lower()}{detail['msg'][1:]} (value {_short(detail['input'])})"


def _field_path(location: tuple[int | str, ...], raw: Any, missing: bool) -> str:
    """The dotted path in the file; pydantic's steps that name a member of a union are left out."""
    path, node = "", raw
    for depth, part in enumerate(location):
        known = isinstance(node, dict) and part in node
        if known or (isinstance(node, list) and isinstance(part, int) and part < len(node)):
            node = node[part]
        elif not missing or depth + 1 < len(location):
            continue
        path += f".{part}" if path else str(part)
    return path


def _models_at(location: tuple[int | str, ...], root: type[Section]) -> list[type[Section]]:
    """The sections that may stand at `location`."""
    found: list[Any] = [root]
    for part in location:
        found = [below for kind in found for below in _below(kind, part)]
    return [kind for kind in found if isinstance(kind, type) and issubclass(kind, Section)]


def _below(kind: Any, part: int | str) -> list[Any]:
    if get_origin(kind) in (dict, list):
        return _members(get_args(kind)[-1])
    if isinstance(kind, type) and issubclass(kind, Section):
        for name, field in kind.model_fields.items():
            if part == (field.alias or name):
                return _members(field.annotation)
        return [kind] if part in _tags(kind) else []
    return []


def _members(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [member for each in get_args(annotation) for member in _members(each)]
    return [annotation]


def _fields(model: type[Section]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _tags(model: type[Section]) -> tuple[str, ...]:
    kind = model.model_fields.get("kind")
    return get_args(kind.annotation) if kind and get_origin(kind.annotation) is Literal else ()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
