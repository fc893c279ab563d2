"""Section `data.follow`: training on shards that appear while the run goes on."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from mtlrec.job.section import Section

WAITING = ("poll_s", "idle_s", "unreadable_s")
"""How long is waited, for what: it may change under a run's name."""


class FollowSection(Section):
    """Shards that appear under data.train are trained as they come (docs/follow.md); true: all defaults."""

    poll_s: float = Field(default=60.0, gt=0, le=86400)
    """Seconds between two looks at what is there. A new shard is taken once two looks in a row have seen it
    in the same size and its footer can be read."""
    idle_s: float | None = Field(default=None, ge=0)
    """End, finished, after so many seconds of waiting without a new shard; null: wait for ever."""
    unreadable_s: float = Field(default=3600.0, ge=0)
    """A new file whose footer cannot be read is taken for one that is still being written, until it has not
    changed for so many seconds; then it is bad (data.bad_rows)."""
    evaluate: bool = True
    """Measure the model on each later generation before it is trained on it."""
    state_decay: float = Field(default=1.0, gt=0, le=1)
    """Factor on the state of the tables' Adagrad at the start of each later generation; 1: it only grows."""


def switch(value: Any) -> Any:
    """true stands for the section with its defaults, false for none."""
    if isinstance(value, bool):
        return {} if value else None
    return value


def allow_switch(schema: dict[str, Any]) -> None:
    """The JSON schema of the field, with true and false."""
    schema.setdefault("anyOf", []).append({"type": "boolean"})
