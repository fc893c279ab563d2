"""The record of a running loop: losses and rate to the screen and to TensorBoard, and trained rows."""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from mtlrec import storage
from mtlrec.batch import Batch
from mtlrec.control import Control
from mtlrec.distributed import World, all_reduce_sum
from mtlrec.lockstep import Totals
from mtlrec.s3 import plain_errors
from mtlrec.safety import Skipped


class Journal:
    """Counts what was trained since the last report. Every rank keeps one; rank 0's is shown and written."""

    def __init__(
        self,
        run_url: str,
        start: int,
        tasks: tuple[str, ...],
        world: World,
        control: Control,
        *,
        step: int,
        total_steps: int,
        every_s: float,
        record_rows: bool,
        skipped: Skipped,
    ) -> None:
        self.skipped = skipped
        """Batches that the run has passed over."""
        self.rows = 0
        """Rows trained since this start, over all workers."""
        self.seconds = 0.0
        """Seconds from the first batch in hand to the last step's end, saving and evaluation left out."""
        self._run_url, self._start, self._tasks = run_url, start, tasks
        self._world, self._control = world, control
        self._step, self._total, self._every_s = step, total_steps, every_s
        self._loss = torch.zeros(len(tasks), dtype=torch.float64, device=world.device)
        self._valid = torch.zeros(len(tasks), dtype=torch.float64)
        self._clock: float | None = None
        self._reported = (time.monotonic(), 0.0, 0)
        self._first_step = step
        self._recorded: list[np.ndarray] | None = [] if record_rows else None
        self._events = Events(run_url, start) if world.rank == 0 else None

    def expect(self, total_steps: int) -> None:
        """Of the run, as far as is known: what progress is shown against."""
        self._total = total_steps

    def due(self) -> bool:
        """Rank 0 asks for a report once enough time has passed."""
        return self._world.rank == 0 and time.monotonic() - self._reported[0] >= self._every_s

    def start_step(self) -> None:
        """The step's batch is in hand: its time counts from here."""
        if self._clock is None:
            self._clock = time.monotonic()

    def end_step(self, batch: Batch, totals: Totals, losses: torch.Tensor | None) -> None:
        """`losses` [T]: this rank's weighted sums of losses, still on the device, not waited for; None where
        the batch was passed over.

        The first T of the totals' amounts are what they are divided by.
        """
        self._step += 1
        if self._recorded is not None:
            # Rows that were not trained are recorded like padding.
            rows = batch.rows if losses is not None else torch.full_like(batch.rows, -1)
            self._recorded.append(rows.numpy().copy())
        if losses is not None:
            self.rows += totals.rows
            self._loss += losses
            self._valid += totals.amounts[: len(self._valid)]

    def pause(self) -> None:
        """Stop the clock: what follows is not training."""
        if self._clock is not None:
            self.seconds += time.monotonic() - self._clock
            self._clock = None

    def report(self) -> dict[str, float]:
        """Mean loss per task since the last report, over all workers; shown and written by rank 0.

        A collective.
        """
        loss = all_reduce_sum(self._loss.cpu(), self._world)
        means = {
            task: float(loss[index] / self._valid[index])
            for index, task in enumerate(self._tasks)
            if self._valid[index] > 0
        }
        self._loss.zero_()
        self._valid.zero_()
        if self._events is None or self.rows == self._reported[2]:
            return means
        now = time.monotonic()
        seconds = self.seconds + (now - self._clock if self._clock is not None else 0.0)
        _, seconds_before, rows_before = self._reported
        rate = (self.rows - rows_before) / max(seconds - seconds_before, 1e-9)
        self._reported = (now, seconds, self.rows)
        trained = max(self._step - self._first_step, 1)
        self._control.show(
            {
                "kind": "progress",
                "what": "train",
                "done": self._step,
                "total": self._total,
                "rows_per_s": rate,
                "losses": means,
                "seconds_left": (self._total - self._step) * seconds / trained,
            }
        )
        for task, mean in means.items():
            self._events.scalar(f"loss/{task}", mean, self._step)
        self._events.scalar("samples_per_s", rate, self._step)
        if self.skipped.steps:
            self._events.scalar("skipped_steps", self.skipped.steps, self._step)
        return means

    def scalars(self, values: dict[str, float]) -> None:
        """Write numbers of this step to TensorBoard."""
        if self._events is not None:
            for name, value in values.items():
                self._events.scalar(name, value, self._step)

    def take(self) -> Callable[[], None]:
        """What is held back, to be written by calling the result, in any thread, once.

        So that it is there beside a checkpoint of this step.
        """
        recorded, end = self._recorded, self._step
        if recorded is not None:
            self._recorded = []

        def write() -> None:
            if recorded:
                file = io.BytesIO()
                np.save(file, np.stack(recorded), allow_pickle=False)
                name = f"a{self._start:04d}-{end - len(recorded):012d}-r{self._world.rank:05d}.npy"
                storage.write(storage.join(self._run_url, "rows", name), file.getvalue())
            if self._events is not None:
                self._events.flush()

        return write

    def close(self) -> None:
        """Write what is held back, and end."""
        self.take()()
        if self._events is not None:
            self._events.close()


class Events:
    """TensorBoard event files of one start in the run's folder; on object storage, sent at each flush."""

    def __init__(self, run_url: str, start: int) -> None:
        # Not its SummaryWriter: once the thread of that has met a full disk, whoever adds to its queue waits
        # for ever.
        from tensorboardX.event_file_writer import EventsWriter

        self._target = storage.join(run_url, "tensorboard", f"a{start:04d}")
        local = storage.local_path(self._target)
        self._scratch = None if local else tempfile.TemporaryDirectory(prefix="mtlrec-events-")
        self._folder = local or Path(self._scratch.name if self._scratch else "")
        with plain_errors(str(self._folder), "written"):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._writer = EventsWriter(str(self._folder / "events"))

    def scalar(self, name: str, value: float, step: int) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        event = Event(wall_time=time.time(), step=step, summary=scalar(name, value))
        with plain_errors(str(self._folder), "written"):
            self._writer.write_event(event)

    def flush(self) -> None:
        with plain_errors(str(self._folder), "written"):
            self._writer.flush()
        self._upload()

    def close(self) -> None:
        with plain_errors(str(self._folder), "written"):
            self._writer.close()
        self._upload()
        if self._scratch is not None:
            self._scratch.cleanup()

    def _upload(self) -> None:
        if self._scratch is not None:
            for file in self._folder.iterdir():
                storage.write(storage.join(self._target, file.name), file.read_bytes())
