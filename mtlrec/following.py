"""Waits, all workers together, for the next generation of a run that follows its data. docs/follow.md"""

from __future__ import annotations

import json
import time
from functools import partial
from typing import Any

import torch

from mtlrec import generations, watchdog
from mtlrec.control import Control
from mtlrec.data.shards import Dataset
from mtlrec.distributed import World, all_reduce_sum, broadcast_bytes
from mtlrec.generations import Record, Watch
from mtlrec.job.job import Job
from mtlrec.lockstep import together
from mtlrec.schema import Schema
from mtlrec.sharding import ShardedModel, local_blocks

TICK_S = 0.5
"""Seconds between two questions whether to stop, while there is nothing to train."""


class Following:
    """The generations of one run. Every rank has one and calls it alike; rank 0 alone looks and writes."""

    def __init__(self, job: Job, schema: Schema, run_url: str, world: World, control: Control) -> None:
        assert job.data.follow is not None
        self._job, self._schema, self._run_url = job, schema, run_url
        self._section, self._world, self._control = job.data.follow, world, control
        self._watch: Watch | None = None
        self._looked_at = float("-inf")
        self.stopped = False
        """The last wait was ended by a request to stop."""
        self.seen: list[dict[str, Any]] = []
        """What was trained since this start: `generation`, `rows`, `step` (before its first), `metrics`."""

    def note(self, number: int, dataset: Dataset, step: int, metrics: dict[str, Any] | None) -> None:
        """A generation begins, or goes on, behind `step` steps. metrics: of the model before; on rank 0."""
        self.seen.append({"generation": number, "rows": dataset.rows, "step": step, "metrics": metrics})
        if self._world.rank == 0 and metrics is not None:
            generations.write_metrics(self._run_url, number, step, metrics)

    def wait(self, number: int) -> Dataset | None:
        """The data of generation `number`, once they are there and written down; None where the run ends.

        It ends by a request to stop, or after `idle_s` seconds without anything new. A collective. Raises
        InputError, on every rank alike, for shards that do not fit or have changed since they were written
        down.
        """
        world, began, told = self._world, time.monotonic(), False
        while True:
            # The request first: a run that is to stop takes nothing new.
            asked = all_reduce_sum(torch.tensor([float(self._control.should_stop())]), world)
            self.stopped = bool(asked[0] > 0)
            if self.stopped:
                return None
            answer = together(world, lambda: self._look(number, began))
            found = json.loads(broadcast_bytes(answer, world))
            if found == "idle":
                return None
            if found is not None:
                return together(world, partial(self._open, found))
            if not told:
                self._say(
                    f"generation {number - 1} is done; waiting for new shards in {self._job.data.train}"
                )
                told = True
            watchdog.alive("waiting for new shards")
            time.sleep(min(TICK_S, self._section.poll_s))

    def _look(self, number: int, began: float) -> bytes:
        """Rank 0: the record, "idle", or null, as JSON."""
        if self._world.rank > 0:
            return b""
        record = generations.read_record(self._run_url, number) if self._watch is None else None
        if record is None:
            data = self._job.data
            if self._watch is None:
                self._watch = Watch(
                    data.train,
                    self._schema.columns(),
                    self._section,
                    self._run_url,
                    data.tolerance,
                    self._say,
                )
            now = time.monotonic()
            if now - self._looked_at < self._section.poll_s:
                return b"null"
            record, self._looked_at = self._watch.look(number), now
            if record is None:
                return b'"idle"' if self._is_idle(now - began) else b"null"
            generations.create_record(self._run_url, record)
        shards = record["shards"]
        names = ", ".join(shard["path"] for shard in shards[:3]) + (" ..." if len(shards) > 3 else "")
        self._say(f"generation {number}: {record['rows']:,} rows in {len(shards):,} new shards: {names}")
        return json.dumps(record).encode()

    def _is_idle(self, waited_s: float) -> bool:
        assert self._watch is not None
        idle_s = self._section.idle_s
        if idle_s is None or waited_s < idle_s or not self._watch.is_quiet:
            return False
        left = self._watch.unfinished
        rest = f"; unfinished, and not trained: {', '.join(left[:3])}" if left else ""
        self._say(f"no new shards for {waited_s:.0f} s (data.follow.idle_s){rest}")
        return True

    def _open(self, record: Record) -> Dataset:
        data = self._job.data
        return generations.open_recorded(data.train, self._schema.columns(), record, data.tolerance)

    def _say(self, text: str) -> None:
        if self._world.rank == 0:
            self._control.show({"kind": "log", "text": text})


@torch.no_grad()
def decay_state(model: ShardedModel, factor: float) -> None:
    """Multiply the state of the tables' Adagrad, on this rank, by `factor`: the past weighs less."""
    for block in local_blocks(model):
        for state in block.state.values():
            state.mul_(factor)
