"""Called on every rank: builds indexes of negatives, and says all that is in them."""

from __future__ import annotations

from typing import Any

import mtlrec.interactions
from mtlrec.control import Silent
from mtlrec.data.shards import Dataset
from mtlrec.distributed import World
from mtlrec.interactions import build_index
from mtlrec.job.errors import InputError
from tests.data.interactions import SCHEMA, negatives


def build(world: World, urls: list[str], bad: str) -> dict[str, Any]:
    """The index of each data set, and how the one with a bad row is refused."""
    mtlrec.interactions._PIECE_BYTES = 512  # so that every exchange takes several
    found: dict[str, Any] = {}
    for number, url in enumerate(urls):
        index = build_index(Dataset.open(url, SCHEMA.columns()), SCHEMA, negatives(), {}, world, Silent())
        arrays = {name: getattr(index, name) for name in ("users", "items", "pairs", "entries", "positives")}
        arrays |= {name: getattr(index.catalogue, name) for name in ("rows", "ids", "dense", "scenario")}
        arrays |= {name: getattr(index.catalogue.lists[0], name) for name in ("offsets", "values")}
        found |= {f"{number} {name}": value for name, value in arrays.items()}
    try:
        build_index(Dataset.open(bad, SCHEMA.columns()), SCHEMA, negatives(), {}, world, Silent())
    except InputError as error:
        found["error"] = str(error)
    return found
