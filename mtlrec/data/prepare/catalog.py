"""The public data sets that `mtlrec prepare` knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mtlrec.data.prepare.census import prepare_census
from mtlrec.data.prepare.epinions import prepare_epinions
from mtlrec.data.prepare.xmarket import prepare_xmarket

PREPARERS: dict[str, Callable[..., dict[str, Any]]] = {
    "census": prepare_census,
    "epinions": prepare_epinions,
    "xmarket": prepare_xmarket,
}
"""Name -> prepare(source, out, *, force, progress), which gives at least `out` (URL) and `rows` by split."""
