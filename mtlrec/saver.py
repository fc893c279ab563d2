"""When a run's checkpoints are written, and which of them are kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

from mtlrec.assembly import Trainer
from mtlrec.checkpoint import folder
from mtlrec.checkpoint.save import Saving
from mtlrec.checkpoint.snapshot import Snapshot
from mtlrec.control import Control
from mtlrec.data.order import Position
from mtlrec.distributed import World
from mtlrec.evaluate import Measured
from mtlrec.feed import Feed
from mtlrec.job.errors import FinalFailure, InputError
from mtlrec.journal import Journal
from mtlrec.judge import Judge
from mtlrec.preflight import Run
from mtlrec.sharding import local_blocks
from mtlrec.storage import StorageError


class Saver:
    """Writes checkpoints of one attempt, one at a time, and keeps as many as the job says.

    Every rank has one and calls it at the same steps. While it is entered (`with`), a failure that all ranks
    have together still lets the checkpoint in the making be completed.
    """

    def __init__(
        self,
        run: Run,
        feed: Feed,
        judge: Judge,
        start: int,
        world: World,
        control: Control,
        journal: Journal,
    ) -> None:
        self._run, self._judge = run, judge
        self.feed = feed
        """What is trained on now."""
        self._start, self._world, self._control, self._journal = start, world, control, journal
        self._snapshot = Snapshot(world.rank)
        self._saving: Saving | None = None
        self._step = 0
        """Of the checkpoint in the making."""
        self._began = time.monotonic()
        self._is_wanted = False
        self._was_called = False
        self._left_behind: list[str] = []

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, InputError | FinalFailure):
            # Every rank raises these at the same step; of other failures the others may not know.
            with suppress(Exception):
                self.drain()

    def prepare(self, trainer: Trainer) -> None:
        """Take the memory that saving while training needs, where the job asks for that."""
        if self.feed.job.run.saves_beside:
            self._snapshot.prepare(local_blocks(trainer.model), trainer.dense_tensors())

    def signals(self) -> tuple[bool, bool, bool]:
        """What this rank tells the others at every step: a save is wanted, one is being written, failed."""
        wanted, minutes = self.is_called(), self.feed.job.run.checkpoint.every_minutes
        if minutes is not None and self._world.rank == 0 and self._saving is None:
            wanted = wanted or time.monotonic() - self._began >= 60 * minutes
        return (wanted, *self.progress())

    def is_called(self) -> bool:
        """Whether this rank has been told, since the last save, that one cannot wait (a node will go)."""
        self._was_called = self._was_called or self._control.should_save()
        return self._was_called

    def progress(self) -> tuple[bool, bool]:
        """Whether this rank is writing, and whether it has failed to."""
        if self._saving is None:
            return False, False
        # In this order: a thread that ends between the two questions is still taken for busy.
        busy = self._saving.is_busy
        return busy, not busy and self._saving.has_failed

    def advance(self, wanted: bool, busy: bool, failed: bool) -> None:
        """Go on with what is being written. `signals`, each raised by any rank at this step.

        Raises, on every rank, where one could not write.
        """
        self._is_wanted = self._is_wanted or wanted
        if self._saving is not None:
            self._go_on(lambda saving: saving.advance(busy, failed))

    def is_due(self, step: int) -> bool:
        """After so many steps or minutes, at another's wish, or where this step is the best so far."""
        every = self.feed.job.run.checkpoint.every_steps
        due = every is not None and step % every == 0
        return due or self._is_wanted or self._judge.best_step == step

    def save(
        self, trainer: Trainer, position: Position, measured: Measured | None, *, last: bool = False
    ) -> str:
        """Begin a checkpoint and return its URL. A collective; waits for the one in the making, if any.

        measured: of this very step. last: nothing is trained before `drain`, so that no copy is needed. Nor
        is one where nothing is to be written beside training: the checkpoint is then complete on return.
        """
        self.drain()
        self._is_wanted = self._was_called = False
        # The losses up to this step are told before a save that may take long.
        self._journal.report()
        self._journal.pause()
        self._began, self._step = time.monotonic(), trainer.step
        feed = self.feed
        url = folder.checkpoint_url(self._run.url, trainer.step, self._start)
        meta = {
            "job": feed.job.to_dict(),
            "schema": feed.schema.to_dict(),
            "schema_fingerprint": feed.schema.fingerprint(),
            "data": feed.about_data(),
            "step": trainer.step,
            "position": position.to_json(),
            "attempt": self._start,
            "metrics": measured[0] if measured else None,
            "judge": self._judge.to_json(),
            "skipped": self._journal.skipped.to_json(),
            "bad_rows": feed.tally.to_json() if feed.tally is not None else None,
            "forked_from": self._run.forked_from,
        }
        blocks, dense = list(local_blocks(trainer.model)), trainer.dense_tensors()
        beside = feed.job.run.saves_beside
        goes_on = beside and not last
        written, rest = self._snapshot.take(blocks, dense) if goes_on else (blocks, dense)
        self._saving = Saving(
            url,
            written,
            rest,
            meta,
            self._world,
            feed.vocabularies,
            beside=self._journal.take(),
            after=self._tidy,
            yields=goes_on,
        )
        if not beside:
            self.drain()
        return url

    def drain(self) -> None:
        """Wait until what was begun is complete. A collective; raises, on every rank, where it failed."""
        if self._saving is not None:
            self._go_on(Saving.wait)

    def _go_on(self, action: Callable[[Saving], None]) -> None:
        saving = self._saving
        assert saving is not None
        try:
            action(saving)
        except Exception:
            self._saving = None
            raise
        if not saving.is_complete:
            return
        self._saving = None
        self._control.report({"step": float(self._step)}, saving.url)
        if self._world.rank == 0:
            self._control.show({"kind": "saved", "step": self._step, "url": saving.url})
            for words in self._left_behind:
                self._control.show({"kind": "log", "text": words})
            self._left_behind = []

    def _tidy(self) -> None:
        """In rank 0's thread, once the manifest is there: retention, and the sweep."""
        section = self._judge.section
        names = section.metric if section is not None else ()
        try:
            folder.sweep(self._run.url, self._start)
            # Workers that outlived their driver may have left a later one than ours.
            ours = folder.checkpoint_url(self._run.url, self._step, self._start)
            keep_last = self.feed.job.run.checkpoint.keep_last
            folder.retain(self._run.url, keep_last, protect=(ours,), names=names)
        except (InputError, StorageError) as error:
            # The new checkpoint is complete, and the next save tries again.
            self._left_behind.append(f"old checkpoints could not be removed: {error}")
