"""The strict base of every section of a job."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Refuses unknown fields and silent conversions (a quoted number is not a number); never changes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())
