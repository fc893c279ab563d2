"""Our training loop and plain TorchRec in turn: what end_to_end and scaling time.

Each of our workers has a twin, a process of the plain side: what ours sets for its process
(`mtlrec/heap.py`) is not to help the other side. The loop of `mtlrec.train` asks its `Control` once a step
whether to stop. There, every so many steps, it waits while the twins take their turn, so that both sides
meet the same noise of this machine. Ours is timed from one question to another: everything that lies
between is in it, the reader's and the checkpoint's threads too. Before the twins' turn those have come to
rest, so that they take nothing from it.

Each process has one arithmetic thread and, where the machine has as many, each worker one core, which it
shares with its twin: the threads that read and save share it with the step.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.measure import run_of
from benchmarks.sized import Size, job
from tests.distributed.processes import Results, run_processes

_PREBUILT = 64
"""Batches of the plain side."""
_REST_S, _REST_AT_MOST_S = 0.05, 20.0


@dataclass(frozen=True)
class Turns:
    """How the sides alternate. Each turn begins with `settle` steps that are not timed."""

    repeats: int
    ours: int = 160
    plain: int = 40
    settle: int = 8
    saves: bool = True
    """Each turn of ours has a checkpoint in its middle; else there is none but at the end."""

    @property
    def period(self) -> int:
        """Steps of ours from one turn to the next."""
        return self.settle + self.ours


def take_turns(folder: Path, size: Size, workers: int, turns: Turns, device: str = "cpu") -> list[Results]:
    """Train on the data in `folder`, on `workers` processes; what `work` returns, by rank."""
    run = run_of(job(folder, size, workers, turns.period if turns.saves else None, device))
    where = folder / f"{workers} of {size.batch}"
    call = {"run": run, "turns": asdict(turns), "folder": str(where)}
    return run_processes("benchmarks.turns:work", workers, where, call, timeout=1800, device=device)


def work(world: Any, run: dict[str, Any], turns: dict[str, Any], folder: str) -> Results:
    """In a worker. By side: `wall` and `cpu`, seconds of each turn of this process (the plain side has one
    more, before and behind each of ours); `parts`, milliseconds of a step; `losses`, first and last;
    `parameters`. `folder`: where the twins meet.
    """
    from mtlrec.preflight import Run
    from mtlrec.train import train

    if world.device.type == "cpu" and world.world_size <= (os.cpu_count() or 1):
        os.sched_setaffinity(0, {world.rank})
    with _Twin(folder, world.rank, world.world_size, run, Turns(**turns)) as twin:
        control = _control(world, Turns(**turns), twin)
        with _timed(control.spent):
            result = train(Run(**run), world, control)
        return control.found(result["parameters"])


class _Twin:
    """The process of the plain side beside one of our workers. A line to it is a turn, a line from it what
    came of it: `wall` and `cpu`, seconds of the timed steps; `losses`, of the first step of all and the last;
    `parts`, seconds of a step; `parameters`.
    """

    def __init__(self, folder: str, rank: int, workers: int, run: dict[str, Any], turns: Turns) -> None:
        call = {"folder": folder, "rank": rank, "workers": workers, "run": run, "turns": asdict(turns)}
        command = [sys.executable, "-m", "benchmarks.turns", json.dumps(call)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._to, self._of = self._process.stdin, self._process.stdout

    def take_turn(self) -> dict[str, Any]:
        self._to.write(b"\n")
        self._to.flush()
        said = self._of.readline()
        assert said, "the plain side has ended"
        found: dict[str, Any] = json.loads(said)
        return found

    def __enter__(self) -> _Twin:
        # Its model is there before ours starts.
        assert self._of.readline(), "the plain side has ended"
        return self

    def __exit__(self, *error: object) -> None:
        self._to.close()
        if error[0] is not None:
            self._process.kill()
        self._process.wait()


def be_twin(folder: str, rank: int, workers: int, run: dict[str, Any], turns: Turns) -> None:
    """In the process of the plain side: take a turn for each line of stdin."""
    import datetime

    import torch
    import torch.distributed as dist

    from mtlrec.distributed import backends, shut_down, this_world

    # Libraries may print.
    answers, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/twins", workers)
    limit, device = datetime.timedelta(seconds=1800), run["job"]["run"]["device"]
    dist.init_process_group(backends(device), store=store, rank=rank, world_size=workers, timeout=limit)
    plain = _plain(this_world(device), run)
    first = plain.steps(1)
    plain.steps(turns.settle)
    print("ready", file=answers, flush=True)
    while sys.stdin.readline():
        plain.steps(turns.settle)
        wall, cpu = time.perf_counter(), time.process_time()
        last = plain.steps(turns.plain)
        found = {
            "wall": time.perf_counter() - wall,
            "cpu": time.process_time() - cpu,
            "losses": [first, last],
            "parts": {part: seconds / plain.taken for part, seconds in plain.seconds.items()},
            "parameters": plain.parameters,
        }
        print(json.dumps(found), file=answers, flush=True)
    shut_down()


def _control(world: Any, turns: Turns, twin: _Twin) -> Any:
    """The control through which the sides alternate; made here, for it imports torch."""
    import torch

    from mtlrec.control import Silent
    from mtlrec.display import Display
    from mtlrec.distributed import all_ok

    display = Display() if world.rank == 0 else None
    # Checkpoints are due at multiples of a period: in the middle of each turn.
    first = turns.period // 2

    class Control(Silent):
        def __init__(self) -> None:
            self.asked = self.saved = 0
            self.ours: dict[str, list[float]] = {"wall": [], "cpu": [], "losses": []}
            self.plain: list[dict[str, Any]] = []
            self.spent: dict[str, float] = defaultdict(float)
            """By our side in each part of a step so far, in seconds; during its turns alone: `parts`."""
            self.before: dict[str, float] = {}
            self.began = (0.0, 0.0)
            self.parts: dict[str, float] = defaultdict(float)

        def show(self, event: dict[str, Any]) -> None:
            if display is not None:
                display.handle(event)
            if event["kind"] == "progress" and event["what"] == "train":
                self.ours["losses"].append(sum(event["losses"].values()))
            self.saved += event["kind"] == "saved"

        def should_stop(self) -> bool:
            number, step = divmod(self.asked - first, turns.period)
            self.asked += 1
            if number < 0:
                return False
            if world.device.type == "cuda" and step in (0, turns.settle):
                torch.cuda.synchronize()  # what the device has still to do belongs to the steps before
            if step == 0:
                if number:
                    self.ours["wall"].append(time.perf_counter() - self.began[0])
                    self.ours["cpu"].append(time.process_time() - self.began[1])
                    for part, seconds in self.spent.items():
                        self.parts[part] += seconds - self.before.get(part, 0.0)
                rest()
                all_ok(None, world)
                self.plain.append(twin.take_turn())
            elif step == turns.settle:
                self.before = dict(self.spent)
                self.began = time.perf_counter(), time.process_time()
            return number == turns.repeats

        def found(self, parameters: dict[str, int]) -> Results:
            steps = turns.repeats * turns.ours
            parts = {part: seconds / steps for part, seconds in self.parts.items()}
            parts["rest"] = sum(self.ours["wall"]) / steps - sum(parts.values())
            losses = self.ours["losses"]
            last = self.plain[-1]
            return {
                clock: {"ours": self.ours[clock], "plain": [each[clock] for each in self.plain]}
                for clock in ("wall", "cpu")
            } | {
                "parts": {
                    side: {part: round(1000 * seconds, 2) for part, seconds in each.items()}
                    for side, each in (("ours", parts), ("plain", last["parts"]))
                },
                "losses": {
                    "ours": [losses[0], losses[-1]] if losses else [],
                    "plain": last["losses"],
                },
                "parameters": {"ours": parameters, "plain": last["parameters"]},
                "saved": self.saved,
            }

    return Control()


def _plain(world: Any, run: dict[str, Any]) -> Any:
    """The plain side, on the first batches of this worker that our reader makes of the same files."""
    from benchmarks.plain import Plain, Rows, first_batches
    from mtlrec.job.job import job_from_dict
    from mtlrec.schema import build_schema

    parsed = job_from_dict(run["job"], "benchmark")
    batches = [Rows(each.ids, each.dense, each.labels) for each in first_batches(parsed, _PREBUILT, world)]
    return Plain(build_schema(parsed.schema_, parsed.model).tables, batches, world)


@contextmanager
def _timed(spent: dict[str, float]) -> Iterator[None]:
    """While it is entered, the parts of our loop add the seconds that they take to `spent`."""
    import torch

    from mtlrec import lockstep
    from mtlrec.data.reader import Reader
    from mtlrec.model.model import Recommender
    from mtlrec.objective.objective import Objective
    from mtlrec.optimizers import DenseOptimizer

    def timed(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            # Of a step's two backwards, that of the tables is handed the gradient of what they gave.
            name = "backward of tables" if part == "backward" and len(arguments) > 1 else part
            began = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                spent[name] += time.perf_counter() - began

        return call

    with ExitStack() as stack:
        for owner, name, part in (
            (Reader, "__next__", "wait for a batch"),
            (lockstep, "all_reduce_sum", "exchange of amounts"),
            (Recommender, "trunk_input", "lookup"),
            (Recommender, "dense_part", "forward"),
            (Objective, "loss", "loss"),
            (torch.Tensor, "backward", "backward"),
            (DenseOptimizer, "average", "average"),
            (DenseOptimizer, "zero_grad", "optimizer"),
            (DenseOptimizer, "step", "optimizer"),
        ):
            stack.enter_context(mock.patch.object(owner, name, timed(getattr(owner, name), part)))
        yield


def rest() -> None:
    """Wait until this process has nothing to do: batches are ahead, the checkpoint is written."""
    until = time.monotonic() + _REST_AT_MOST_S
    while time.monotonic() < until:
        before = time.process_time()
        time.sleep(_REST_S)
        if time.process_time() - before < _REST_S / 10:
            return
    raise AssertionError("the threads that read and save do not come to rest")


if __name__ == "__main__":
    told = json.loads(sys.argv[1])
    be_twin(**{**told, "turns": Turns(**told["turns"])})
