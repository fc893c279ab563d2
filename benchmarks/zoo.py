"""The sides of the vocabulary benchmark, in its worker: our training, and training as model zoos have it."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from benchmarks.measure import in_turn
from benchmarks.plain import Mmoe, first_batches
from mtlrec.batch import Batch
from mtlrec.control import Silent
from mtlrec.distributed import World
from mtlrec.job.job import Job, job_from_dict
from mtlrec.preflight import Run
from mtlrec.schema import Schema, build_schema
from mtlrec.train import train
from tests.distributed.processes import Results

WEIGHT_DECAY = 1e-5
"""torch-rechub's, unless told otherwise (MTLTrainer); DeepCTR-Torch adds a penalty of as much to the loss."""


@dataclass(frozen=True)
class Steps:
    """Of one turn of each side, and before the first turn; and how many turns."""

    repeats: int
    ours: int
    theirs: int
    warm_up: int


def rates(world: World, runs: dict[str, dict[str, Any]], steps: dict[str, int]) -> Results:
    """In the worker: samples a second and a second of processor time, of each turn of each side.

    `runs`: of ours, "small", "large" and, with other batches, "small_BATCH". Theirs are "zoo" and
    "zoo_BATCH"; without decay "zoo_BATCH_bare" and "zoo_fused".
    """
    count = Steps(**steps)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    trainings = {name: Training(Run(**run), world) for name, run in runs.items()}
    jobs = {name: job_from_dict(run["job"], "benchmark") for name, run in runs.items()}
    theirs = {name.replace("small", "zoo"): job for name, job in jobs.items() if name.startswith("small")}
    theirs |= {f"{name}_bare": job for name, job in theirs.items() if name != "zoo"}
    theirs["zoo_fused"] = theirs["zoo"]
    jobs |= theirs
    zoos = {
        name: Zoo(
            job,
            count.theirs * count.repeats + 1,
            world,
            decay=0.0 if name.endswith(("_bare", "_fused")) else WEIGHT_DECAY,
            fused=name.endswith("_fused"),
        )
        for name, job in theirs.items()
    }
    cpu: dict[str, list[float]] = {name: [] for name in (*trainings, *zoos)}

    def side(name: str, take: Callable[[int], None], turn: int) -> Callable[[], float]:
        samples = turn * jobs[name].data.batch_size

        def turn_of_it() -> float:
            began = time.perf_counter(), time.process_time()
            take(turn)
            cpu[name].append(samples / (time.process_time() - began[1]))
            return samples / (time.perf_counter() - began[0])

        return turn_of_it

    for training in trainings.values():
        training.steps(count.warm_up)
    for zoo in zoos.values():
        zoo.steps(1)
    wall = in_turn(
        {
            **{name: side(name, each.steps, count.ours) for name, each in trainings.items()},
            **{name: side(name, each.steps, count.theirs) for name, each in zoos.items()},
        },
        count.repeats,
        # Our readers fill up what a turn has taken before another side's begins.
        between=lambda: time.sleep(0.5),
    )
    for training in trainings.values():
        training.end()
    parameters = {"ours": trainings["small"].parameters, "theirs": zoos["zoo"].parameters}
    return {"wall": wall, "cpu": cpu, "parameters": parameters}


class Training:
    """A run that goes on for some steps when it is told to, in a thread of its own, and else stands still."""

    def __init__(self, run: Run, world: World) -> None:
        self.parameters = 0
        self._asked: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, args=(run, world), daemon=True)
        self._thread.start()
        self._wait()

    def steps(self, count: int) -> None:
        self._asked.put(count)
        self._wait()

    def end(self) -> None:
        self._asked.put(0)
        self._thread.join()

    def _wait(self) -> None:
        failure = self._done.get()
        if failure is not None:
            raise failure

    def _work(self, run: Run, world: World) -> None:
        try:
            train(run, world, _Gate(self))
        except _Over:
            return
        except BaseException as failure:
            self._done.put(failure)
        else:
            self._done.put(AssertionError("the data did not last"))

    def next_steps(self) -> int:
        """For the training's own thread: how many steps it may take now. Raises _Over where it is to end."""
        self._done.put(None)
        count = self._asked.get()
        if count == 0:
            raise _Over
        return count


class _Over(Exception):
    pass


class _Gate(Silent):
    """Holds a training up, where it asks once a step whether to stop, until more steps are asked for."""

    def __init__(self, training: Training) -> None:
        self._training, self._left = training, 0

    def show(self, event: dict[str, Any]) -> None:
        if event["kind"] == "plan":
            tables = sum(table["rows"] * table["dim"] for table in event["tables"])
            self._training.parameters = tables + event["dense_parameters"]

    def should_stop(self) -> bool:
        if self._left == 0:
            self._left = self._training.next_steps()
        self._left -= 1
        return False


class Zoo:
    """The model as model zoos have it, with its batches and its one optimizer for everything."""

    def __init__(self, job: Job, num_batches: int, world: World, decay: float, fused: bool) -> None:
        torch.manual_seed(1)
        self._model = ZooModel(build_schema(job.schema_, job.model))
        rate = job.optimizer.dense.lr
        parameters = list(self._model.parameters())
        self._optimizer = torch.optim.Adam(
            parameters, lr=rate, weight_decay=decay, fused=True if fused else None
        )
        self._batches, self._taken = first_batches(job, num_batches, world), 0
        self.parameters = sum(parameter.numel() for parameter in parameters)

    def steps(self, count: int) -> None:
        for _ in range(count):
            batch = self._batches[self._taken % len(self._batches)]
            self._taken += 1
            loss = functional.binary_cross_entropy_with_logits(self._model(batch), batch.labels)
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()


class ZooModel(nn.Module):
    """Batch -> logits [rows, tasks]."""

    def __init__(self, schema: Schema) -> None:
        super().__init__()
        self.tables = nn.ModuleDict(
            {table.name: nn.Embedding(table.rows, table.dim) for table in schema.tables}
        )
        self._table_of = {lookup.feature: lookup.table for lookup in schema.lookups}
        self.rest = Mmoe(schema.embedding_width + schema.dense_width, len(schema.tasks))

    def forward(self, batch: Batch) -> torch.Tensor:
        parts = []
        for feature, ids in batch.ids.to_dict().items():
            table = self.tables[self._table_of[feature]]
            assert isinstance(table, nn.Embedding)
            if len(ids.values()) == len(batch.labels):
                parts.append(table(ids.values()))
            else:
                mean = functional.embedding_bag(ids.values(), table.weight, ids.offsets()[:-1], mode="mean")
                parts.append(mean)
        logits: torch.Tensor = self.rest(torch.cat([*parts, batch.dense], dim=1))
        return logits
