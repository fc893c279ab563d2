"""What a checkpoint holds, for people and programs. Needs no torch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from mtlrec import storage
from mtlrec.checkpoint.folder import MANIFEST
from mtlrec.checkpoint.manifest import (
    STATE,
    VERSION,
    WEIGHTS,
    FileEntry,
    Manifest,
    TableEntry,
    TensorEntry,
    VocabularyEntry,
    read_manifest,
)
from mtlrec.checkpoint.ranges import verify as verify_bytes

OPTIMIZER = "optimizer."
"""Dense tensors whose names begin so are the dense optimizer's state; the others are parameters."""
SHOW_EVERY_S = 0.5
MB = 1e6

Show = Callable[[dict[str, Any]], None]


def inspect_checkpoint(url: str, verify: bool = False, show: Show | None = None) -> dict[str, Any]:
    """Describe the checkpoint in the folder `url` as plain data.

    The sizes of all files are checked; with `verify` every byte is read and checked too, and `show` gets
    progress events, in MB. Raises InputError where there is no checkpoint, or a damaged one.
    """
    manifest = read_manifest(url)
    if verify:
        _verify(url, manifest, show)
    meta = manifest.meta
    return {
        "checkpoint": url,
        "job": meta["job"].get("name"),
        "step": meta["step"],
        "attempt": meta["attempt"],
        "position": meta["position"],
        "forked_from": meta.get("forked_from"),
        "skipped": meta.get("skipped"),
        "bad_rows": meta.get("bad_rows"),
        "saved_at": meta["saved_at"],
        "mtlrec_version": meta["mtlrec_version"],
        "format_version": VERSION,
        "schema_fingerprint": meta["schema_fingerprint"],
        "tables": [_table(name, table) for name, table in manifest.tables.items()],
        "vocabularies": [_vocabulary(name, entry) for name, entry in manifest.vocabularies.items()],
        "dense": [_dense(name, entry) for name, entry in manifest.dense.tensors.items()],
        "files": len(manifest.files()) + 1,
        "bytes": storage.size(storage.join(url, MANIFEST)) + sum(file.size for file in manifest.files()),
        "metrics": meta["metrics"],
        "verified": verify,
    }


def render(found: dict[str, Any]) -> str:
    """The description of `inspect_checkpoint` for people, several lines."""
    checked = (
        "every byte read and verified" if found["verified"] else "sizes checked (--verify reads every byte)"
    )
    lines = [
        found["checkpoint"],
        *_columns(
            [
                ["job", str(found["job"])],
                ["step", f"{found['step']:,}  ({_position(found['position'])})"],
                [
                    "saved",
                    f"{found['saved_at']}  by mtlrec {found['mtlrec_version']}, attempt {found['attempt']}",
                ],
                *_fork_line(found["forked_from"]),
                *_skipped_line(found["skipped"]),
                *_bad_line(found["bad_rows"]),
                ["on disk", f"{_size(found['bytes'])} in {found['files']:,} files, {checked}"],
            ],
            "ll",
        ),
        "",
        *_columns(
            [
                ["table", "rows", "dim", "dtype", "optimizer state", "on disk", "files"],
                *(
                    [
                        table["name"],
                        f"{table['rows']:,}",
                        str(table["dim"]),
                        table["dtype"],
                        _states(table["state"]),
                        _size(table["bytes"]),
                        str(table["files"]),
                    ]
                    for table in found["tables"]
                ),
            ],
            "lrrllrr",
        ),
        "",
        *_vocabulary_lines(found["vocabularies"]),
        *_dense_lines(found["dense"]),
        "",
        *_metric_lines(found["metrics"]),
    ]
    return "\n".join(lines)


def _verify(url: str, manifest: Manifest, show: Show | None) -> None:
    began = shown = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if show is not None and (now - shown >= SHOW_EVERY_S or done == total):
            shown, rate = now, done / max(now - began, 1e-9)
            show(
                {
                    "kind": "progress",
                    "what": "verify",
                    "unit": "MB",
                    "done": math.ceil(done / MB),
                    "total": math.ceil(total / MB),
                    "rows_per_s": rate / MB,
                    "seconds_left": (total - done) / max(rate, 1e-9),
                }
            )

    verify_bytes(url, manifest, progress)


def _table(name: str, table: TableEntry) -> dict[str, Any]:
    tensors = table.blocks[0].tensors
    return {
        "name": name,
        "rows": table.rows,
        "dim": table.dim,
        "dtype": tensors[WEIGHTS].dtype,
        "state": {
            key.removeprefix(STATE): {
                "dtype": entry.dtype,
                "shape": [table.rows, table.dim][: len(entry.shape)],
            }
            for key, entry in tensors.items()
            if key != WEIGHTS
        },
        "bytes": _bytes(table.blocks),
        "files": len(table.blocks),
    }


def _vocabulary(name: str, entry: VocabularyEntry) -> dict[str, Any]:
    return {
        "table": name,
        "kind": entry.kind,
        "ids": entry.ids,
        "reserved": entry.reserved,
        "bytes": entry.size,
    }


def _vocabulary_lines(vocabularies: list[dict[str, Any]]) -> list[str]:
    """A table of them and an empty line, or nothing."""
    if not vocabularies:
        return []
    rows = [
        [each["table"], f"{each['ids']:,}", each["kind"], f"{each['reserved']:,}", _size(each["bytes"])]
        for each in vocabularies
    ]
    return [*_columns([["vocabulary", "ids", "kind", "reserved rows", "on disk"], *rows], "lrlrr"), ""]


def _bytes(files: Sequence[FileEntry]) -> int:
    return sum(file.size for file in files)


def _dense(name: str, entry: TensorEntry) -> dict[str, Any]:
    kind = "optimizer" if name.startswith(OPTIMIZER) else "parameter"
    return {"name": name, "kind": kind, "dtype": entry.dtype, "shape": entry.shape, "bytes": entry.bytes}


def _states(states: dict[str, Any]) -> str:
    each = {1: "row", 2: "weight"}
    return ", ".join(f"{name} (1 a {each[len(state['shape'])]})" for name, state in states.items()) or "none"


def _dense_lines(dense: list[dict[str, Any]]) -> list[str]:
    parameters = [tensor for tensor in dense if tensor["kind"] == "parameter"]
    states = [tensor for tensor in dense if tensor["kind"] == "optimizer"]
    numbers = sum(math.prod(tensor["shape"]) for tensor in parameters)
    kinds = sorted({tensor["name"].rsplit(".", 1)[1] for tensor in states})
    size = sum(tensor["bytes"] for tensor in dense)
    head = f"dense: {numbers:,} numbers in {len(parameters)} parameters"
    rows = [[f"  {t['name']}", " x ".join(map(str, t["shape"])) or "1", t["dtype"]] for t in parameters]
    return [f"{head}; optimizer state: {', '.join(kinds) or 'none'}; {_size(size)}", *_columns(rows, "lrl")]


def _metric_lines(metrics: dict[str, Any] | None) -> list[str]:
    if not metrics:
        return ["metrics: none yet (measured when the run ends)"]
    measured = [
        (scenario, task, {k: v for k, v in values.items() if v is None or isinstance(v, int | float)})
        for scenario, tasks in metrics.items()
        for task, values in tasks.items()
    ]
    names = list(dict.fromkeys(name for _, _, values in measured for name in values))
    rows = [
        [scenario, task, *(_number(values.get(name)) for name in names)]
        for scenario, task, values in measured
    ]
    return _columns([["scenario", "task", *names], *rows], "ll" + "r" * len(names))


def _position(position: dict[str, Any] | None) -> str:
    if position is None:
        return "no position"
    epoch, done = position.get("epoch"), position.get("done")
    if type(epoch) is int and isinstance(done, list) and all(type(rows) is int for rows in done):
        generation = position.get("generation")
        of = f"generation {generation:,}, " if type(generation) is int and generation else ""
        return f"{of}epoch {epoch:,}, {sum(done):,} rows into it"
    return str(position)


def _fork_line(origin: Any) -> list[list[str]]:
    """Where the run, a fork, came from; nothing for other runs."""
    if not isinstance(origin, dict):
        return []
    return [["forked from", f"{origin.get('checkpoint')}  (order of rows {origin.get('order')})"]]


def _skipped_line(skipped: Any) -> list[list[str]]:
    """Steps that were not finite and passed over, where there were any."""
    steps, rows = _counts(skipped, "steps", "rows")
    return [["skipped", f"{steps:,} steps of {rows:,} rows, which were not finite"]] if steps else []


def _bad_line(bad: Any) -> list[list[str]]:
    """Rows that were left out as bad, where there were any."""
    rows, before, epoch, now = _counts(bad, "earlier_rows", "earlier_bad", "epoch", "epoch_bad")
    text = f"{now:,} bad rows so far in epoch {epoch:,}"
    if rows:
        text += f", {before:,} of {rows:,} in the generations before"
    return [["left out", text]] if before or now else []


def _counts(value: Any, *names: str) -> list[int]:
    """Numbers of a part of `meta`, which may come from anywhere; 0 for what is none."""
    found = [value.get(name) if isinstance(value, dict) else None for name in names]
    return [each if type(each) is int else 0 for each in found]


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def _size(num_bytes: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB", "TB"):
        if num_bytes < 1000 or unit == "TB":
            break
        num_bytes /= 1000
    return f"{num_bytes:,.0f} {unit}" if unit == "bytes" else f"{num_bytes:,.1f} {unit}"


def _columns(rows: list[list[str]], sides: str) -> list[str]:
    """Rows of cells, padded to columns; `sides` has an l or r for each.

    A checkpoint may come from anywhere, so nothing in it may steer the terminal.
    """
    rows = [["".join(mark if mark.isprintable() else "?" for mark in cell) for cell in row] for row in rows]
    widths = [max(len(row[index]) for row in rows) for index in range(len(sides))] if rows else []
    return [
        "  ".join(
            cell.ljust(width) if side == "l" else cell.rjust(width)
            for cell, width, side in zip(row, widths, sides, strict=True)
        ).rstrip()
        for row in rows
    ]
