"""Kills workers, drivers and whole nodes of a run at random moments, and looks what is left of it.

    python -m tests.chaos [--kills 20] [--seed 0] [--kinds worker,driver,node]

prints one JSON object: each kill with its moment and what it cost, and what holds of the run in the end.
The run is that of small data on two Ray nodes of one CPU each, `run.workers: {min: 1, max: 2}`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.e2e.cluster import Cluster, Node
from tests.e2e.driven import Command, checkpoints, trained_rows, wait_until_gone
from tests.small_data import small_job, write_small_data

KINDS = ("worker", "driver", "node")
HANG = "hang"
"""Not killed but stopped, which the watchdogs of the others notice. Takes STEP_TIMEOUT_S each."""
STEP_TIMEOUT_S = 30.0
EVERY = 25
"""Steps between checkpoints."""
APART = 100
"""Steps between kills, at least: a second or two."""
NAME, PLAIN = "chaos", "plain"
TIMEOUT_S = 240.0
"""In which training has to have gone on after a kill."""


@dataclass
class Kill:
    """One kill, and what was seen of it."""

    kind: str
    moment: str
    """"writing": a checkpoint was unfinished; "any"."""
    workers: int
    """That were alive."""
    step: int
    """Of the latest complete checkpoint then."""
    writing: bool
    """A checkpoint was being written."""
    seconds: float = 0.0
    """Until the next complete checkpoint of a later start."""


class Chaos:
    """A run that is trained while it is disturbed. `kinds`: what to kill, one after another."""

    def __init__(self, home: Path, kinds: list[str], seed: int) -> None:
        self.home, self.kinds = home, kinds
        self.run = home / "runs" / NAME
        self.kills: list[Kill] = []
        self._left = list(kinds)
        self._random = random.Random(seed)
        steps = (len(kinds) + 1) * APART + EVERY
        write_small_data(home / "train")
        job = small_job(Path("train"), Path("runs"), NAME, run__epochs=10_000, run__report_every_s=0.5)
        job["run"] |= {
            "workers": {"min": 1, "max": 2},
            "max_steps": steps,
            "max_failures": 2 * len(kinds),
            "record_rows": True,
            "checkpoint": {"every_steps": EVERY},
        }
        if HANG in kinds:
            job["run"]["step_timeout_s"] = STEP_TIMEOUT_S
        # See tests/e2e/test_ray.py: Adagrad would let rounding decide about rows of a vanishing gradient.
        job["optimizer"]["tables"] = {"kind": "sgd", "lr": 0.5}
        (home / "job.yaml").write_text(yaml.safe_dump(job, sort_keys=False))
        self.steps = steps

    def disturb(self) -> dict[str, Any]:
        """Train to the end through every kill; returns the run's result."""
        with Cluster(1) as cluster:
            self._cluster, self._second = cluster, cluster.add(1)
            cluster.ids(2)
            command = self._start()
            for number in range(1, len(self.kinds) + 1):
                self._wait(command, step=number * APART)
                kill = self._wait_for_moment()
                before, began = self._latest_start(), time.monotonic()
                command = self._kill(kill.kind, command)
                self.kills.append(kill)
                self._wait(command, start=before + 1)
                kill.seconds = round(time.monotonic() - began, 1)
            return command.result(timeout=TIMEOUT_S)

    def _wait(self, command: Command, step: int = 0, start: int = 0) -> None:
        """Until a checkpoint of so many steps is complete, by this start of the workers or a later one."""

        def is_there() -> bool:
            latest = self._latest()
            return latest[0] >= step and latest[1] >= start

        command.wait_for(is_there, TIMEOUT_S)

    def _next_kind(self) -> str:
        """The next to be killed. A node without a worker would not be missed, nor a worker that nobody waits
        for be taken for hung: their turn comes later."""
        missed = {"node": bool(self._workers(self._second)), HANG: len(self._workers()) > 1}
        for place, kind in enumerate(self._left):
            if missed.get(kind, True):
                return self._left.pop(place)
        self._left.pop()
        return "worker"

    def _start(self) -> Command:
        train = ("train", "job.yaml", "--address", self._cluster.address)
        return Command(self.home, *train, environment=self._cluster.environment)

    def _wait_for_moment(self) -> Kill:
        kind = self._next_kind()
        moment = self._random.choice(("writing", "any"))
        if moment == "any":
            time.sleep(self._random.uniform(0, 0.5))
        deadline = time.monotonic() + 5
        while moment == "writing" and not self._unfinished() and time.monotonic() < deadline:
            time.sleep(0.002)
        return Kill(kind, moment, len(self._workers()), self._latest()[0], bool(self._unfinished()))

    def _kill(self, kind: str, command: Command) -> Command:
        """Kill one thing; returns the command that trains from here on."""
        if kind == "worker":
            self._random.choice(self._workers()).kill()
        elif kind == HANG:
            self._random.choice(self._workers()).suspend()
        elif kind == "node":
            self._second.kill()
            self._second = self._cluster.add(1)
        else:
            orphans = self._workers()
            command.process.kill()
            command.process.wait()
            # Ray ends the workers of a driver that is gone: none writes beside those of the next.
            wait_until_gone(orphans)
            return self._start()
        return command

    def _workers(self, *nodes: Node) -> list[psutil.Process]:
        found = []
        for node in nodes or self._cluster.nodes:
            for process in node.processes():
                with contextlib.suppress(psutil.NoSuchProcess):
                    if "RayTrainWorker" in " ".join(process.cmdline()):
                        found.append(process)
        return found

    def _latest(self) -> tuple[int, int]:
        """Step and start of the latest complete checkpoint."""
        found = checkpoints(self.home, NAME)
        return max((_step_and_start(name) for name in found), default=(0, 0))

    def _latest_start(self) -> int:
        return max((int(file.stem) for file in (self.run / "starts").glob("*.json")), default=0)

    def _unfinished(self) -> list[str]:
        complete = set(checkpoints(self.home, NAME))
        with contextlib.suppress(FileNotFoundError):
            return [name for name in os.listdir(self.run / "checkpoints") if name not in complete]
        return []


def _step_and_start(name: str) -> tuple[int, int]:
    step, start = name.removeprefix("step-").split(".a")
    return int(step), int(start)


def verdict(chaos: Chaos, result: dict[str, Any], workers: int = 0) -> dict[str, Any]:
    """What holds of a run that came through, against the same job undisturbed on so many workers.

    Over hundreds of steps Adam can make much of a rounding (docs/architecture.md), and one plain process ends
    elsewhere than two workers; a killed run on two workers ends as an undisturbed one on two, to the bit.
    """
    home = chaos.home
    undisturbed = ("train", "job.yaml", "--name", PLAIN, "--workers", str(workers))
    plain = Command(home, *undisturbed).result(timeout=3 * TIMEOUT_S)
    difference, metric = max(
        (abs(result["metrics"]["all"][task][name] - value) / max(abs(value), 1e-12), f"{task}/{name}")
        for task, numbers in plain["metrics"]["all"].items()
        for name, value in numbers.items()
        if isinstance(value, float)
    )
    complete = set(checkpoints(home, NAME))
    stray = [name for name in os.listdir(chaos.run / "checkpoints") if name not in complete]
    stray += [str(path) for path in chaos.run.glob("checkpoints/*/parts")]
    # The marker is Ray's, in every run: it tries the storage with it.
    hidden = (path for path in chaos.run.rglob(".*") if path.name != ".validate_storage_marker")
    stray += [str(path) for path in hidden]
    return {
        "kills": {kind: sum(kill.kind == kind for kill in chaos.kills) for kind in sorted(set(chaos.kinds))},
        "while_writing": sum(kill.writing for kill in chaos.kills),
        "seconds_to_go_on": _spread([kill.seconds for kill in chaos.kills]),
        "starts": len(list((chaos.run / "starts").glob("*.json"))),
        "steps": result["steps"],
        "ended": result["steps"] == chaos.steps,
        "ledger_exact": trained_rows(home, NAME) == trained_rows(home, PLAIN),
        "metrics_differ_by": difference,
        "most_by": metric,
        "stray": stray,
        "stacks": len(list((chaos.run / "stacks").glob("*.txt"))),
    }


def _spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {"least": ordered[0], "median": ordered[len(ordered) // 2], "most": ordered[-1]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"and {HANG}: a worker that is stopped")
    arguments = parser.parse_args()
    # Ended by a signal, it still ends its cluster.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    chosen, named = random.Random(arguments.seed), arguments.kinds.split(",")
    kinds = [*named, *(chosen.choice(named) for _ in range(arguments.kills - len(named)))]
    chosen.shuffle(kinds)
    with tempfile.TemporaryDirectory(prefix="mtlrec-chaos-") as folder:
        chaos = Chaos(Path(folder), kinds[: arguments.kills], arguments.seed)
        found = verdict(chaos, chaos.disturb(), workers=2)
    found["each"] = [vars(kill) for kill in chaos.kills]
    print(json.dumps(found))
    holds = found["ended"] and found["ledger_exact"] and not found["stray"]
    return 0 if holds and found["metrics_differ_by"] <= 1e-3 else 1


if __name__ == "__main__":
    sys.exit(main())
