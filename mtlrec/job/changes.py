"""What is different between two jobs, in words."""

from __future__ import annotations

from typing import Any


def changes(old: Any, new: Any, path: str = "") -> list[str]:
    """One entry for each value of plain data that differs: "model.dim was 8, is 16". path: of the whole."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        below = ((key, old.get(key), new.get(key)) for key in keys)
        return [line for key, a, b in below for line in changes(a, b, f"{path}.{key}" if path else key)]
    return [] if old == new else [f"{path} was {old!r}, is {new!r}"]
