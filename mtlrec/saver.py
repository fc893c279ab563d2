"""When a run's checkpoints are written, and which of them are kept."""

from __future__ import annotations

from mtlrec.assembly import Trainer
from mtlrec.checkpoint import folder
from mtlrec.checkpoint.save import save
from mtlrec.control import Control
from mtlrec.data.order import Position
from mtlrec.distributed import World
from mtlrec.evaluate import Measured
from mtlrec.feed import Feed
from mtlrec.journal import Journal
from mtlrec.judge import Judge
from mtlrec.preflight import Run
from mtlrec.sharding import local_blocks


class Saver:
    """Writes checkpoints of one attempt, and keeps as many as the job says."""

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
        self._run, self._feed, self._judge = run, feed, judge
        self._start, self._world, self._control, self._journal = start, world, control, journal

    def is_due(self, step: int) -> bool:
        """After so many steps, or where this step is the best so far."""
        every = self._feed.job.run.checkpoint.every_steps
        return (every is not None and step % every == 0) or self._judge.best_step == step

    def save(self, trainer: Trainer, position: Position, measured: Measured | None) -> str:
        """Write one checkpoint, all ranks together, and return its URL. measured: of this very step."""
        # What has diverged must not take the place of a good checkpoint.
        self._journal.report()
        self._journal.pause()
        self._journal.flush()
        feed = self._feed
        url = folder.checkpoint_url(self._run.url, trainer.step, self._start)
        meta = {
            "job": feed.job.to_dict(),
            "schema": feed.schema.to_dict(),
            "schema_fingerprint": feed.schema.fingerprint(),
            "data": {"fingerprint": feed.dataset.fingerprint, "index": feed.dataset.index()},
            "step": trainer.step,
            "position": position.to_json(),
            "attempt": self._start,
            "metrics": measured[0] if measured else None,
            "judge": self._judge.to_json(),
            "forked_from": self._run.forked_from,
        }
        blocks, dense = local_blocks(trainer.model), trainer.dense_tensors()
        save(url, blocks, dense, meta, self._world, vocabularies=feed.vocabularies)
        self._control.report({"step": float(trainer.step)}, url)
        if self._world.rank == 0:
            self._control.show({"kind": "saved", "step": trainer.step, "url": url})
            folder.sweep(self._run.url, self._start)
            names = self._judge.section.metric if self._judge.section is not None else ()
            folder.retain(self._run.url, feed.job.run.checkpoint.keep_last, names=names)
        return url
