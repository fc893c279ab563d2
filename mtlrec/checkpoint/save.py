"""Saves a checkpoint: every rank its own rows, in a thread of its own, and the manifest last.

No collective runs in a thread. Where the ranks stand is told by whoever calls: at every step (`advance`), or
all at once (`wait`).
"""

from __future__ import annotations

import contextlib
import datetime
import threading
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError
from typing import Any

import torch

import mtlrec
from mtlrec import storage
from mtlrec.checkpoint import parts
from mtlrec.checkpoint.folder import MANIFEST, discard
from mtlrec.checkpoint.manifest import Manifest, encode, read_manifest
from mtlrec.checkpoint.tensors import TableBlock
from mtlrec.data.vocabulary import Vocabulary
from mtlrec.distributed import World, all_ok
from mtlrec.job.errors import InputError
from mtlrec.priority import CHECKPOINTS, step_back
from mtlrec.storage import StorageError

_FEW_THREADS = 2
"""Files that a worker writes side by side while it trains: more would take the cores from training."""
_INPUT, _FAULT = "input:", "fault:"
"""How a failure is marked on its way to the other ranks."""


class Saving:
    """One checkpoint in the making, as one rank sees it. Every rank makes one at the same step.

    First each rank writes its rows; when all have, rank 0 writes the manifest, and then it is complete. What
    it is given must not change until the first is done: hand it copies, or wait.
    """

    def __init__(
        self,
        url: str,
        blocks: Iterable[TableBlock],
        dense: Mapping[str, torch.Tensor],
        meta: Mapping[str, Any],
        world: World,
        vocabularies: Mapping[str, Vocabulary] | None = None,
        *,
        beside: Callable[[], None] | None = None,
        after: Callable[[], None] | None = None,
        yields: bool = False,
    ) -> None:
        """Start to write the folder `url`, which must be new. Returns at once.

        blocks: what this rank holds of the tables; replicated ones are written by rank 0. dense: every other
        tensor, parameters and optimizer state, the same on all ranks. meta: as `Manifest.meta`; `saved_at`
        and `mtlrec_version` are set here. vocabularies: those of tables, by name, the same on all ranks.
        beside: what this rank must have written before there is a manifest. after: what rank 0 does once it
        is there. Both run in the thread. yields: training goes on meanwhile, and comes first.
        """
        self.url = url
        self.manifest: Manifest | None = None
        """On rank 0, once complete."""
        self.is_complete = False
        self._world, self._after, self._yields = world, after, yields
        self._meta = parts.plain({**meta, "saved_at": _now(), "mtlrec_version": _version()})
        self._blocks = list(blocks)
        self._dense = dense if world.rank == 0 else None
        self._vocabularies = vocabularies if world.rank == 0 else None
        self._beside = beside
        self._is_written = False
        self._is_ours = False
        """The folder is of this attempt, and to be removed where it fails."""
        self._failure: Exception | None = None
        self._thread: threading.Thread | None = None
        self._start(self._write)

    @property
    def is_busy(self) -> bool:
        """This rank's thread is at work."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def has_failed(self) -> bool:
        """This rank's thread has ended with a failure."""
        return not self.is_busy and self._failure is not None

    def advance(self, busy: bool, failed: bool) -> None:
        """Go on where that is possible without waiting; sets `is_complete`.

        busy, failed: whether any rank was busy, or had failed, when all were asked, at one and the same step.
        Where any rank failed, and none is at work any more, every rank raises and what was written is
        removed: InputError for what the user can put right, else StorageError, or the rank's own exception.
        """
        if not busy:
            if failed:
                self._settle()
            self._go_on()

    def wait(self) -> None:
        """Stay until it is complete. A collective; raises as `advance` does."""
        while not self.is_complete:
            if self._thread is not None:
                self._thread.join()
            self._settle()
            self._go_on()

    def _go_on(self) -> None:
        """Every rank is done with its part of what was to be done."""
        if self._is_written:
            self.is_complete = True
            return
        self._is_written = True
        # The rows that it was given may change from here on.
        self._blocks, self._dense, self._thread = [], None, None
        if self._world.rank == 0:
            self._start(self._merge)

    def _settle(self) -> None:
        """Raise, on every rank, where any has failed. A collective."""
        failure = _shared(self._failure, self._world)
        if failure is None:
            return
        # Every rank has come to the same end, so nobody writes here any more: make room at once.
        if self._world.rank == 0 and self._is_ours:
            with contextlib.suppress(InputError, StorageError):
                discard(self.url)
        raise failure

    def _start(self, work: Callable[[], None]) -> None:
        def run() -> None:
            if self._yields:
                step_back(CHECKPOINTS)
            try:
                work()
            except Exception as error:  # raised where all ranks know of it
                self._failure = error

        # A process that has to end does not wait for it: what is left is no checkpoint, and is swept.
        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def _write(self) -> None:
        _check_new(self.url, self._world.rank)
        self._is_ours = True
        if self._beside is not None:
            self._beside()
        threads = _FEW_THREADS if self._yields else parts.THREADS
        parts.write_part(self.url, self._blocks, self._dense, self._world.rank, self._vocabularies, threads)

    def _merge(self) -> None:
        self.manifest = parts.merge(self.url, self._meta, self._world.world_size)
        self._is_ours = False  # complete, whatever comes after
        if self._after is not None:
            self._after()


def save(
    url: str,
    blocks: Iterable[TableBlock],
    dense: Mapping[str, torch.Tensor],
    meta: Mapping[str, Any],
    world: World,
    vocabularies: Mapping[str, Vocabulary] | None = None,
) -> Manifest | None:
    """Write a checkpoint and wait for it. A collective; returns the manifest on rank 0.

    As `Saving` and `Saving.wait` have it.
    """
    saving = Saving(url, blocks, dense, meta, world, vocabularies)
    saving.wait()
    return saving.manifest


def finish(url: str, metrics: Mapping[str, Any], judge: Mapping[str, Any] | None = None) -> Manifest:
    """Put what was measured into the manifest of a complete checkpoint, all at once. One rank calls.

    judge: what follows from it for the run, if anything does.
    """
    manifest = read_manifest(url)
    found = {"metrics": metrics} if judge is None else {"metrics": metrics, "judge": judge}
    manifest = manifest.model_copy(update={"meta": parts.plain({**manifest.meta, **found})})
    storage.write(storage.join(url, MANIFEST), encode(manifest))
    return manifest


def _check_new(url: str, rank: int) -> None:
    """What another attempt left under these names could be taken for ours."""
    found = {file.path for file in storage.list_files(url)}
    if found & {MANIFEST, parts.part_name(rank)}:
        raise StorageError(f"{url}: not an empty folder; every attempt at a run writes to folders of its own")


def _shared(failure: Exception | None, world: World) -> Exception | None:
    """What this rank raises when any rank has failed, an InputError before any other; None where none has."""
    failures = all_ok(_in_words(failure), world)
    for words in failures:
        if words.startswith(_INPUT):
            error = InputError(words.removeprefix(_INPUT))
            error.__cause__ = failure
            return error
    if failures and failure is None:
        return StorageError(failures[0].removeprefix(_FAULT))
    return failure


def _in_words(failure: Exception | None) -> str | None:
    if isinstance(failure, InputError):
        return f"{_INPUT}{failure}"
    if failure is None or isinstance(failure, StorageError):
        return f"{_FAULT}{failure}" if failure is not None else None
    return f"{_FAULT}{type(failure).__name__}: {failure}"


def _version() -> str:
    try:
        return mtlrec.__version__
    except PackageNotFoundError:
        return "unknown"  # run from its source folder, not installed


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
