"""Numbers every start of a group of workers at a run, by conditional create alone.

A driver's attempt may start its workers several times (Ray restarts them after a failure). Each start writes
only into folders that carry its number, so that it never meets what a killed one left half-written.
"""

from __future__ import annotations

import json
from pathlib import Path

from mtlrec import storage


def claim_start(run_url: str, attempt: int) -> int:
    """The next number, from 1 on, for this start alone; `attempt` is noted beside it. One rank calls."""
    folder = storage.join(run_url, "starts")
    names = [Path(file.path).stem for file in storage.list_files(folder, ".json")]
    number = max((int(name) for name in names if name.isdecimal()), default=0) + 1
    while not storage.create(
        storage.join(folder, f"{number}.json"), json.dumps({"attempt": attempt}).encode()
    ):
        number += 1
    return number
