"""The one training loop. It knows no Ray: what is outside reaches it through a `Control`."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from mtlrec import heap, storage, watchdog
from mtlrec.assembly import Step, Trainer, assemble
from mtlrec.batch import Batch
from mtlrec.checkpoint import folder
from mtlrec.checkpoint.manifest import read_manifest
from mtlrec.checkpoint.save import finish
from mtlrec.checkpoint.starts import claim_start
from mtlrec.control import Control
from mtlrec.data.order import Position
from mtlrec.data.quarantine import NOTHING
from mtlrec.data.reader import Reader
from mtlrec.data.shards import Dataset
from mtlrec.distributed import World, all_ok, broadcast_bytes
from mtlrec.evaluate import Measured, evaluate
from mtlrec.feed import Feed, open_feed
from mtlrec.following import Following, decay_state
from mtlrec.job.errors import InputError
from mtlrec.job.job import job_from_dict
from mtlrec.journal import Journal
from mtlrec.judge import Judge
from mtlrec.lockstep import BrokenOff, Totals, in_step, together
from mtlrec.preflight import RESULT, Run, asked_of
from mtlrec.safety import Guard, Skipped
from mtlrec.saver import Saver


def train(run: Run, world: World, control: Control) -> dict[str, Any]:
    """Train `run` from its last complete checkpoint, or from its start, to its end or until it is stopped.

    Every worker calls it. Returns the run's result as plain data, in full on rank 0. Raises InputError, on
    every rank alike, for what the user can correct.
    """
    began = time.monotonic()
    heap.keep_freed_memory()
    checkpoint, number, forks = _agree_on_start(run, world)
    watchdog.label(f"{number:04d}")
    if number > 1 and world.rank == 0:
        control.show(
            {"kind": "log", "text": f"start {number} of this run, from {checkpoint or 'its beginning'}"}
        )
    start = together(world, lambda: read_manifest(checkpoint)) if checkpoint else None
    job = job_from_dict(run.job, run.url)
    judge = Judge(job.run.evaluate)
    position, step, skipped, bad_rows = Position.start(job.data.lanes), 0, Skipped(), None
    if start is not None:
        skipped = Skipped.from_json(start.meta.get("skipped"))
        if not forks or (run.forked_from or {})["order"] == "kept":
            position = Position.from_json(start.meta["position"], f"{checkpoint}: position")
            bad_rows = start.meta.get("bad_rows")
        step = start.meta["step"]
        # A fork is judged by what it reaches itself: its best is to be one of its own checkpoints.
        if not forks and not judge.load(start.meta.get("judge")) and job.run.evaluate is not None:
            # Told to judge by something else now: by that, the best of what is still there.
            kept = together(world, lambda: _best(run.url, judge))
            if kept is not None:
                judge.best, judge.best_step = kept["score"], kept["step"]
    feed = open_feed(run, world, control, position, checkpoint, start, bad_rows)
    job = feed.job
    with ExitStack() as stack:
        # The reader fills its first windows while the model is built.
        reader = stack.enter_context(feed.reader(position, step, world)) if feed.is_open else None
        lengths = feed.dataset.list_lengths if feed.is_open else None
        trainer = assemble(job, feed.schema, world, run.url, checkpoint, start, forks, lengths)
        parameters = _parameters(trainer)
        if world.rank == 0:
            tables, dense = trainer.model.plan_table(), parameters["dense"]
            control.show(
                {"kind": "plan", "workers": world.world_size, "tables": tables, "dense_parameters": dense}
            )
        tasks = tuple(task.name for task in feed.schema.tasks)
        journal = Journal(
            run.url,
            number,
            tasks,
            world,
            control,
            step=trainer.step,
            total_steps=trainer.step,
            every_s=job.run.report_every_s,
            record_rows=job.run.record_rows,
            skipped=skipped,
        )
        guard = Guard(job.run, feed.schema, world, control, skipped)
        saver = stack.enter_context(Saver(run, feed, judge, number, world, control, journal))
        # Another run's checkpoint is not this one's, though it stands at the same step.
        saved = None if forks else checkpoint
        session = _Session(world, control, trainer, judge, journal, guard, saver, position, saved)
        if judge.is_over:
            text = f"nothing has become better for {judge.since} measurements by step {trainer.step:,}"
            if world.rank == 0:
                control.show({"kind": "log", "text": f"{text}: a larger run.evaluate.patience goes on"})
        else:
            saver.prepare(trainer)
        following = None
        if job.data.follow is not None:
            following = Following(job, feed.schema, run.url, world, control)
            if feed.is_open:
                following.note(position.generation, feed.dataset, trainer.step, None)
        if forks:
            # It lives by a checkpoint that its source may remove until it has one of its own.
            session.save()
        if judge.owes:
            session.measure(feed)
        if reader is not None:
            if not session.stopped:
                session.train_on(feed, reader)
            reader.close()
        if following is not None:
            session.follow(following, feed)
        session.save()
    saved, measured, stopped = session.saved, session.measured, session.stopped
    assert saved is not None
    if not stopped and measured is None and job.data.eval:
        try:
            measured = _evaluate(trainer, feed, session)
        except BrokenOff:
            stopped = True
        else:
            if world.rank == 0:
                finish(saved, measured[0])
            journal.scalars(_scalars("eval", measured[0]))
    metrics, ideal, _ = measured or (None, None, None)
    result: dict[str, Any] = {
        "run_dir": run.url,
        "checkpoint": saved,
        "stopped": stopped,
        "steps": trainer.step,
        "rows": journal.rows,
        "skipped_steps": skipped.steps,
        "skipped_rows": skipped.rows,
        "bad_rows": feed.left_out() if world.rank == 0 else None,
        "samples_per_s": journal.rows / journal.seconds if journal.seconds else None,
        "seconds": time.monotonic() - began,
        "parameters": parameters,
        "metrics": metrics,
        "ideal": ideal,
        "best": _best(run.url, judge) if world.rank == 0 else None,
        "generations": following.seen if following is not None else None,
        "asked": asked_of(job),
    }
    if world.rank == 0 and not stopped:
        storage.write(storage.join(run.url, RESULT), json.dumps(result, indent=1).encode())
    journal.close()
    all_ok(None, world)
    return result


@dataclass(frozen=True)
class _Taken:
    """A step that was taken, its number from 1 on, and where the run stood before it."""

    step: int
    before: Position
    batch: Batch
    totals: Totals
    done: Step


@dataclass
class _Session:
    """One start of a run: what its passes over data share, and where it stands. Every rank has one."""

    world: World
    control: Control
    trainer: Trainer
    judge: Judge
    journal: Journal
    guard: Guard
    saver: Saver
    position: Position
    saved: str | None
    """The run's checkpoint of this very step, if there is one."""
    measured: Measured | None = None
    """Of this very step, on data.eval."""
    stopped: bool = False
    """The run ends because it was asked to."""
    untold: _Taken | None = None
    """The last step, as long as guard and journal have not heard of it."""

    def train_on(self, feed: Feed, reader: Reader) -> None:
        """Train to the end of the reader's data, or until the run is stopped or over."""
        trainer, journal, saver, judge = self.trainer, self.journal, self.saver, self.judge
        total = trainer.step + reader.steps_left(self.position)
        most = feed.job.run.max_steps
        total = min(total, most) if most else total
        journal.expect(total)
        if trainer.step >= total or judge.is_over:
            return
        saver.feed = feed
        signals = lambda: (self.control.should_stop(), journal.due(), *saver.signals())  # noqa: E731
        amounts = (len(feed.schema.tasks) + 2, trainer.objective.amounts)
        for batch, totals, upcoming in in_step(reader, self.world, signals, amounts):
            stop, report, *saving = totals.signals
            if feed.tally is not None:
                feed.tally.add(feed.dataset, self.position, batch.position, totals.rows)
            journal.start_step()
            last = stop or trainer.step + 1 == total
            done = trainer.train_step(batch, totals, None if last else upcoming)
            # Of the step before, while the device is busy with this one.
            self.tell(feed)
            self.untold = _Taken(trainer.step, self.position, batch, totals, done)
            saver.advance(*saving)
            before, self.position = self.position, batch.position
            self.saved, self.measured, ended = None, None, trainer.step == total
            is_due = judge.is_due(trainer.step, before, self.position, ended)
            if trainer.looks or is_due or report or stop or ended or saver.is_due(trainer.step):
                self.tell(feed)
            if is_due:
                journal.report()
                journal.pause()
                self.measure(feed)
                ended = ended or judge.is_over
            self.stopped = self.stopped or (stop and not ended)
            if report or self.stopped or ended:
                journal.report()
            self.save_if_due(last=self.stopped or ended)
            if self.stopped or ended:
                break
        journal.pause()

    def tell(self, feed: Feed) -> None:
        """Tell guard and journal of the step that they have not heard of, if there is one.

        On CUDA that is one step late, so that nobody waits for the device in a step; whatever reads or keeps
        what they know comes behind it.
        """
        taken, self.untold = self.untold, None
        if taken is not None:
            evidence, rows = taken.done.evidence, taken.totals.rows
            self.guard.consider(taken.step, taken.before, rows, feed.dataset, evidence)
            self.journal.end_step(taken.batch, taken.totals, taken.done.losses if evidence is None else None)

    def measure(self, feed: Feed) -> None:
        """Score data.eval, and let the judge decide. A collective.

        Where a checkpoint cannot wait until that is done, it is saved at once, as measuring changes nothing
        that is learnt, and measuring begins anew: here, or after a restart from that checkpoint. Asked to
        stop, the run ends likewise: it measures when it goes on.
        """
        judge, is_measured = self.judge, False
        judge.owes = True
        while not (is_measured or self.stopped):
            try:
                self.measured = _measure(self.trainer, feed, judge, self)
                is_measured = True
            except BrokenOff:
                self.save()
            except InputError:
                # The data to measure on are wrong, not what was learnt since the last checkpoint.
                self.save()
                raise
        if self.measured is None:
            return
        metrics, saved = self.measured.metrics, self.saved

        def complete() -> None:
            if saved is not None and self.world.rank == 0:
                finish(saved, metrics, judge.to_json())

        # A checkpoint of this very step was written before this was known.
        together(self.world, complete)
        self.journal.scalars(_scalars("eval", metrics))

    def signals(self) -> tuple[bool, ...]:
        """While measuring: to stop; to save at once, unless this step is saved; how the saving gets on."""
        called = self.saved is None and self.saver.is_called()
        return (self.control.should_stop(), called, *self.saver.progress())

    def hear(self, signals: Sequence[bool]) -> None:
        stop, called, busy, failed = signals
        self.saver.advance(called, busy, failed)
        self.stopped = stop
        if stop or called:
            raise BrokenOff

    def follow(self, following: Following, feed: Feed) -> None:
        """Train on one generation after the other, as they come, behind that of `feed`.

        Each is first measured on, then trained on. What was learnt before is saved before anything of a
        generation changes the model, so that a restart begins the generation once more, from the same state.
        """
        trainer, world, section = self.trainer, self.world, feed.job.data.follow
        assert section is not None
        most = feed.job.run.max_steps
        while not (self.stopped or self.judge.is_over or (most is not None and trainer.step >= most)):
            self.save()
            number = self.position.generation + 1
            dataset = following.wait(number)
            if dataset is None:
                self.stopped = following.stopped
                break
            feed, self.position = (
                feed.next(dataset, world, self.control),
                Position.start(feed.job.data.lanes, number),
            )
            metrics = None
            if section.evaluate:
                try:
                    metrics = _evaluate(trainer, feed, self, dataset).metrics
                except BrokenOff:
                    break  # to stop: all that was learnt is saved, and the next start measures
                self.journal.scalars(_scalars("generation", metrics))
            following.note(number, dataset, trainer.step, metrics)
            if section.state_decay < 1:
                decay_state(trainer.model, section.state_decay)
            with feed.reader(self.position, trainer.step, world) as reader:
                self.train_on(feed, reader)

    def save_if_due(self, last: bool) -> None:
        """Begin a checkpoint where this step has none yet and should. last: nothing is trained behind it."""
        if self.saved is None and self.saver.is_due(self.trainer.step):
            self.saved = self.saver.save(self.trainer, self.position, self.measured, last=last)

    def save(self) -> None:
        """See to it that there is a complete checkpoint of this very step."""
        self.saved = self.saved or self.saver.save(self.trainer, self.position, self.measured, last=True)
        self.saver.drain()


def _measure(trainer: Trainer, feed: Feed, judge: Judge, session: _Session) -> Measured:
    """Score data.eval and let the judge decide, the same on every rank. A collective."""
    measured, world = _evaluate(trainer, feed, session), session.world

    def decide() -> None:
        if world.rank == 0:
            judge.consider(measured[0], trainer.step)

    together(world, decide)
    judge.load(json.loads(broadcast_bytes(json.dumps(judge.to_json()).encode(), world)))
    if world.rank == 0:
        session.control.show({"kind": "log", "text": judge.describe(trainer.step)})
    return measured


def _evaluate(trainer: Trainer, feed: Feed, session: _Session, dataset: Dataset | None = None) -> Measured:
    """Score `dataset`, or else data.eval. A collective; raises BrokenOff as `session` does."""
    data, known = feed.job.data, feed.vocabularies
    url = data.eval if dataset is None else dataset.url
    assert url is not None
    return evaluate(
        trainer.model,
        feed.schema,
        url,
        data.batch_size,
        session.world,
        session.control,
        vocabularies=known,
        tolerance=data.tolerance,
        dataset=dataset,
        earlier=NOTHING if dataset is None else feed.earlier,
        listener=session,
    )


def _best(run_url: str, judge: Judge) -> dict[str, Any] | None:
    """The run's best checkpoint by what the judge goes by; None where it has none, or there is no judge."""
    names = judge.section.metric if judge.section is not None else ()
    found = folder.best(run_url, names) if names else None
    if found is None:
        return None
    score, metrics = folder.measured(found, names)
    return {"checkpoint": found.url, "step": found.step, "score": score, "metrics": metrics}


def _parameters(trainer: Trainer) -> dict[str, int]:
    """How many numbers are learnt, optimizer state left out."""
    return {
        "dense": sum(tensor.numel() for tensor in trainer.model.dense_parameters().values()),
        "tables": sum(table.rows * table.dim for table in trainer.model.plan.tables),
    }


def _agree_on_start(run: Run, world: World) -> tuple[str | None, int, bool]:
    """The checkpoint to go on from, the number of this start, and whether that checkpoint is another run's.

    Chosen by rank 0 for all. A fork reads its source's until it has one of its own.
    """

    def choose() -> bytes:
        if world.rank > 0:
            return b""
        newest = folder.latest(run.url)
        forks = newest is None and run.forked_from is not None
        url = newest.url if newest else (run.forked_from or {}).get("checkpoint")
        return json.dumps([url, claim_start(run.url, run.attempt), forks]).encode()

    url, number, forks = json.loads(broadcast_bytes(together(world, choose), world))
    return url, number, forks


def _scalars(kind: str, metrics: dict[str, Any]) -> dict[str, float]:
    return {
        f"{kind}/{scenario}/{task}/{name}": float(value)
        for scenario, by_task in metrics.items()
        for task, numbers in by_task.items()
        for name, value in numbers.items()
        if isinstance(value, int | float)
    }
