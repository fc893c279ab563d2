"""A run's folder of checkpoints: their names, which are complete, which are kept. Reads no tensor.

    RUN/checkpoints/step-000000000123.a0001/manifest.json

A folder is named by the step and the attempt that wrote it, so that no two attempts share one. It is complete
once its manifest is there; until then nobody but the sweep looks at it.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from mtlrec import storage
from mtlrec.job import metric
from mtlrec.job.errors import InputError

CHECKPOINTS = "checkpoints"
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-([0-9]{12,})\.a([0-9]{4,})")


@dataclass(frozen=True, order=True)
class Checkpoint:
    """One checkpoint folder. Later ones compare greater: by step, then by attempt."""

    step: int
    attempt: int
    url: str


def checkpoint_url(run_url: str, step: int, attempt: int) -> str:
    """Where attempt `attempt` at the run writes what it has after `step` steps."""
    assert step >= 0 and attempt >= 0, (step, attempt)
    return storage.join(run_url, CHECKPOINTS, f"step-{step:012d}.a{attempt:04d}")


def list_checkpoints(run_url: str) -> list[Checkpoint]:
    """The run's complete checkpoints, oldest first."""
    return [found for found in _folders(run_url) if _is_complete(found)]


def latest(run_url: str) -> Checkpoint | None:
    """The complete checkpoint that the run goes on from."""
    return next((found for found in reversed(_folders(run_url)) if _is_complete(found)), None)


def previous(url: str) -> Checkpoint | None:
    """The last complete checkpoint of the same run that is older than the one in the folder `url`."""
    this = _named(storage.parent(url), storage.name(url))
    if this is None or storage.name(storage.parent(url)) != CHECKPOINTS:
        return None
    siblings = _folders(storage.parent(storage.parent(url)))
    return next((found for found in reversed(siblings) if found < this and _is_complete(found)), None)


def find(url: str) -> str:
    """The checkpoint folder that a user's `url` means: that folder, its manifest, or a run (its latest).

    Raises InputError where there is no complete checkpoint.
    """
    url = storage.make_absolute(url, ".")
    if storage.name(url) == MANIFEST:
        url = storage.parent(url)
    if storage.exists(storage.join(url, MANIFEST)):
        return url
    if (newest := latest(url)) is not None:
        return newest.url
    raise no_checkpoint(url)


def no_checkpoint(url: str) -> InputError:
    """Why there is nothing to read in `url`, which has no manifest, and what to use instead."""
    if _NAME.fullmatch(storage.name(url)) and storage.exists(url):
        return InputError(f"{url}: not finished ({MANIFEST}, written last, is missing); {advice(url)}")
    if _folders(url):
        return InputError(f"{url}: this run has no complete checkpoint yet; let it reach its first save")
    if storage.exists(url):
        return InputError(
            f"{url}: not a checkpoint (no {MANIFEST} in it); "
            f"give a run's folder, or one of those in its {CHECKPOINTS}/"
        )
    before = previous(url)
    hint = f"the checkpoint before it is {before.url}" if before else "check the path"
    return InputError(f"{url}: there is no such checkpoint; {hint}")


def advice(url: str) -> str:
    """What to do about the checkpoint in `url`, which cannot be read."""
    if _NAME.fullmatch(storage.name(url)) is None:
        return "copy the checkpoint again from where it was made"
    before = previous(url)
    if before is None:
        return "no complete checkpoint comes before it: copy it again, or remove the folder to train anew"
    return f"use the checkpoint before it, {before.url} (a run does, once the bad folder is removed)"


def score(metrics: Any) -> float | None:
    """How good a checkpoint is, from the metrics in its manifest; greater is better, None cannot be compared.

    Over all scenarios, the mean of the binary tasks' AUC; without a binary task, minus the mean RMSE.
    """
    tasks = metrics.get("all") if isinstance(metrics, dict) else None
    if not isinstance(tasks, dict):
        return None
    for key, sign in (("auc", 1.0), ("rmse", -1.0)):
        values = [numbers[key] for numbers in tasks.values() if isinstance(numbers, dict) and key in numbers]
        if values:
            known = all(isinstance(value, int | float) and math.isfinite(value) for value in values)
            return sign * sum(values) / len(values) if known else None
    return None


def best(run_url: str, names: Sequence[str] = ()) -> Checkpoint | None:
    """The complete checkpoint with the highest `score`, the later of two equals; None where none has one."""
    return _best(list_checkpoints(run_url), names)


def measured(found: Checkpoint, names: Sequence[str] = ()) -> tuple[float | None, dict[str, Any] | None]:
    """(score, metrics) of a checkpoint by its manifest, None where it was not measured.

    The score is that of the metrics `names` (`run.evaluate.metric`); without names, `score`. A manifest that
    cannot be read gives (None, None): a broken checkpoint is nobody's best.
    """
    with contextlib.suppress(FileNotFoundError):
        text = storage.read(storage.join(found.url, MANIFEST))
        with contextlib.suppress(ValueError, RecursionError, TypeError, KeyError, AttributeError):
            metrics = json.loads(text)["meta"]["metrics"]
            if metrics is not None:
                return (metric.score(metrics, names) if names else score(metrics)), metrics
    return None, None


def retain(
    run_url: str, keep_last: int, protect: Collection[str] = (), names: Sequence[str] = ()
) -> list[str]:
    """Remove complete checkpoints but the last `keep_last`, the best by `names`, and the URLs in `protect`.

    Returns the URLs that were removed. For the holder of the run's lease alone.
    """
    assert keep_last >= 1, keep_last
    complete = list_checkpoints(run_url)
    if len(complete) <= keep_last:
        return []
    kept = {found.url for found in complete[-keep_last:]} | set(protect)
    if (highest := _best(complete, names)) is not None:
        kept.add(highest.url)
    removed = [found.url for found in complete if found.url not in kept]
    for url in removed:
        discard(url)
    return removed


def sweep(run_url: str, attempt: int) -> list[str]:
    """Remove what attempts before `attempt` left unfinished; returns the URLs that were removed.

    A folder of the same or a later attempt may be one that is being written, and stays.
    """
    # Of a writer that was killed on object storage there may be parts alone, which no folder shows.
    parent = storage.join(run_url, CHECKPOINTS)
    names = {url.removeprefix(f"{parent}/").split("/", 1)[0] for url in storage.list_uploads(parent)}
    found = {*_folders(run_url), *(each for name in names if (each := _named(parent, name)))}
    left = [each.url for each in sorted(found) if each.attempt < attempt and not _is_complete(each)]
    for url in left:
        discard(url)
    return left


def discard(url: str) -> None:
    """Remove a checkpoint, its manifest first: cut off half-way, what is left is no checkpoint."""
    storage.remove(storage.join(url, MANIFEST))
    storage.remove_tree(url)


def _folders(run_url: str) -> list[Checkpoint]:
    parent = storage.join(run_url, CHECKPOINTS)
    return sorted(found for name in storage.list_folders(parent) if (found := _named(parent, name)))


def _named(parent: str, name: str) -> Checkpoint | None:
    match = _NAME.fullmatch(name)
    return Checkpoint(int(match[1]), int(match[2]), storage.join(parent, name)) if match else None


def _is_complete(found: Checkpoint) -> bool:
    return storage.exists(storage.join(found.url, MANIFEST))


def _best(complete: list[Checkpoint], names: Sequence[str]) -> Checkpoint | None:
    scored = [(value, found) for found in complete if (value := measured(found, names)[0]) is not None]
    if not scored:
        return None
    if not names:
        return max(scored)[1]
    # Of two equals the earlier step, as whoever counts measurements without a better one has it.
    return max(scored, key=lambda each: (each[0], -each[1].step, each[1].attempt))[1]
