"""Training on a GPU held against training on the CPU beside it: what CI, which has no GPU, cannot see.

    python -m tests.on_device [CHECK ...] [--device cuda] [--folder FOLDER]

One process on one device. Prints a line per check, and one of JSON with the largest differences; exit code 1
where a check fails. Sums on a GPU have another order, so that losses agree to a relative 1e-3 where they are
not the same. `--device cpu` holds the CPU against itself, to see that the checks run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.gpu import need
from benchmarks.measure import run_of
from tests.distributed import test_everything, test_safety
from tests.distributed.processes import Results, run_processes
from tests.distributed.test_training import assert_metrics_agree
from tests.small_data import small_job, write_small_data

HERE = "tests.on_device"
TIMEOUT_S = 400.0
STEPS, HALF = 40, 20
OPTIMIZERS = ("rowwise_adagrad", "adagrad", "sgd")
CUDA_OPTIMIZERS = ("adam", "partial_rowwise_adam", "lamb")
PLANS = ("row_wise", "table_wise", "data_parallel", "column_wise", "auto")
CLOSE = 1e-3
"""Relative difference of losses."""
CHECKS = (
    "steps",
    "plans_and_optimizers",
    "everything",
    "goes_on_elsewhere",
    "only_on_cuda",
    "nobody_waits",
)


class Checks:
    """Jobs on one small data set, trained on `device` and on the CPU."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, device
        self.data = folder / "data"
        write_small_data(self.data)
        write_small_data(folder / "valid", rows=400, shards=2, seed=1)
        self.found: dict[str, Any] = {}
        self._calls = itertools.count()

    def steps(self) -> None:
        """Single steps of six jobs, and six faults that must move nothing: their numbers, and their words."""
        train = self.folder / "numbered"
        train.mkdir()
        test_safety.write_numbers(train)
        arguments = {"data_url": str(train), "cases": test_safety.CASES}
        there, here = (
            self._on(device, "steps", f"{test_safety.HERE}:work", arguments)
            for device in (self.device, "cpu")
        )
        assert there.keys() == here.keys()
        apart = []
        for key, value in there.items():
            if key.endswith("/told"):
                assert value == here[key], (key, value, here[key])
            elif key.endswith("/moved"):
                assert value == [], (key, value)
            elif key.endswith("/losses"):
                apart.append(difference(value, here[key]))
            else:
                np.testing.assert_allclose(value, here[key], rtol=1e-2, atol=2e-3, err_msg=key)
        self.found["steps"] = max(apart)
        assert max(apart) < CLOSE, apart

    def plans_and_optimizers(self) -> None:
        """The losses of 40 steps are those of the CPU, for each plan and optimizer that the CPU has."""
        jobs = {kind: self._job(kind, tables=kind) for kind in OPTIMIZERS}
        jobs |= {plan: self._job(plan, plan) for plan in PLANS}
        self._same("plans_and_optimizers", jobs)

    def everything(self) -> None:
        """Vocabularies, negatives, dropout, balancing, weights, measurements: losses and metrics."""
        jobs = {}
        for backbone in test_everything.BACKBONES:
            jobs[backbone] = test_everything.everything(
                self.data, self.folder / "runs", backbone, backbone, STEPS
            )
            jobs[backbone]["data"]["eval"] = str(self.folder / "valid")
        self._same("everything", jobs)

    def goes_on_elsewhere(self) -> None:
        """20 steps on one device and 20 on the other, both ways, and 20 and 20 on this one, are 40."""
        jobs = {name: self._job(name) for name in ("there-here", "here-there", "there-there", "straight")}

        def some(*names: str) -> dict[str, Any]:
            return {name: jobs[name] for name in names}

        self._train(self.device, "first", half(some("there-here", "there-there")))
        self._train("cpu", "first", half(some("here-there")))
        on_cpu = self._train("cpu", "second", some("there-here", "straight"))
        rest = self._train(self.device, "second", some("there-there", "here-there"))
        straight, rest = on_cpu.pop("straight")["losses"], rest | on_cpu
        for name, result in rest.items():
            assert len(result["losses"]) == STEPS - HALF, "it began where the other had stopped"
            self.found[name] = difference(result["losses"], straight[HALF:])
            assert self.found[name] < CLOSE, (name, self.found[name])

    def only_on_cuda(self) -> None:
        """Optimizers of tables and the precision that no CPU has: losses fall, and a resume goes on alike."""
        if self.device == "cpu":
            return
        jobs = {kind: self._job(kind, tables=kind, lr=1e-3) for kind in CUDA_OPTIMIZERS}
        jobs["bfloat16"] = self._job("bfloat16")
        jobs["bfloat16"]["model"]["precision"] = "bfloat16"
        straight = self._train(
            self.device, "straight", {f"{name}-straight": job for name, job in jobs.items()}
        )
        self._train(self.device, "first", half(jobs))
        rest = self._train(self.device, "second", jobs)
        for name, result in rest.items():
            whole = straight[f"{name}-straight"]["losses"].sum(axis=1)
            assert np.isfinite(whole).all()
            assert whole[-5:].mean() < whole[:5].mean(), (name, whole)
            self.found[f"{name} resumed"] = difference(
                result["losses"], straight[f"{name}-straight"]["losses"][HALF:]
            )
            assert self.found[f"{name} resumed"] < 10 * CLOSE, self.found
            self.found[name] = [round(float(whole[:5].mean()), 4), round(float(whole[-5:].mean()), 4)]

    def nobody_waits(self) -> None:
        """A step that waits for the device raises, from the sixth on."""
        mixed = {
            "user_id": "data_parallel",
            "item_id": "table_wise",
            "hour": "table_wise",
            "price_bucket": "table_wise",
        }
        for name, sharding in (("row_wise", "row_wise"), ("table_wise", "table_wise"), ("mixed", mixed)):
            job = self._job(f"waiting-{name}", sharding)
            found = self._on(self.device, f"waiting-{name}", f"{HERE}:without_waiting", {"run": run_of(job)})
            assert found["steps"] == STEPS and found["watched"] == STEPS - 5

    def _job(
        self, name: str, sharding: Any = "row_wise", tables: str | None = None, lr: float | None = None
    ) -> Any:
        job = small_job(self.data, self.folder / "runs", name, run__sharding=sharding)
        job["data"]["eval"] = str(self.folder / "valid")
        job["run"]["max_steps"] = STEPS
        kind = tables or ("adagrad" if sharding == "column_wise" else "rowwise_adagrad")
        job["optimizer"]["tables"] = {"kind": kind} | ({"lr": lr} if lr else {})
        if kind == "adagrad":
            # As in test_training: a gradient of nearly zero decides by its sign else.
            job["optimizer"]["tables"]["eps"] = 1e-4
        return job

    def _same(self, name: str, jobs: dict[str, Any]) -> None:
        there = self._train(self.device, f"{name}-there", jobs, "there")
        here = self._train("cpu", f"{name}-here", jobs, "here")
        for each, result in there.items():
            assert len(result["losses"]) == STEPS
            self.found[each] = difference(result["losses"], here[each]["losses"])
            assert self.found[each] < CLOSE, (each, self.found[each])
            assert_metrics_agree(result["metrics"], here[each]["metrics"], rel=5e-3, absolute=5e-3)

    def _train(self, device: str, tag: str, jobs: dict[str, Any], suffix: str = "") -> dict[str, Any]:
        """Name -> result, with its `losses`, all in one process on `device`."""
        calls = []
        for name, job in jobs.items():
            named = {**job, "name": f"{name}-{suffix}" if suffix else name}
            calls.append(run_of({**named, "run": named["run"] | {"device": device}}))
        found = self._on(device, f"{tag}-{device}", f"{test_everything.HERE}:work", {"calls": calls})
        return {
            name: {**found["results"][index], "losses": found[f"losses{index}"]}
            for index, name in enumerate(jobs)
        }

    def _on(self, device: str, tag: str, target: str, arguments: dict[str, Any]) -> Results:
        folder = self.folder / f"call-{next(self._calls)}-{tag}"
        return run_processes(target, 1, folder, arguments, timeout=TIMEOUT_S, device=device)[0]


def without_waiting(world: Any, run: dict[str, Any]) -> Results:
    """In a worker: train, where a step that waits for the device raises, once what is made once is made."""
    import torch

    from mtlrec.assembly import Trainer
    from mtlrec.control import Silent
    from mtlrec.preflight import Run
    from mtlrec.train import train

    found = {"steps": 0, "watched": 0}
    step = Trainer.train_step
    watch = torch.cuda.set_sync_debug_mode if world.device.type == "cuda" else lambda mode: None

    def counted(*arguments: Any) -> Any:
        found["steps"] += 1
        if found["steps"] > 5:
            found["watched"] += 1
            watch("error")
        try:
            return step(*arguments)
        finally:
            watch("default")

    with mock.patch.object(Trainer, "train_step", counted):
        train(Run(**run), world, Silent())
    return dict(found)


def half(jobs: dict[str, Any]) -> dict[str, Any]:
    """The same jobs, for their first steps alone."""
    return {name: {**job, "run": job["run"] | {"max_steps": HALF}} for name, job in jobs.items()}


def difference(mine: np.ndarray, theirs: np.ndarray) -> float:
    """The largest, relative to the size of `theirs`."""
    assert mine.shape == theirs.shape, (mine.shape, theirs.shape)
    return float(np.max(np.abs(mine - theirs) / np.maximum(np.abs(theirs), 1e-2)))


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--folder", type=Path, help="where to write; default: the folder of temporary files")
    parser.add_argument("checks", nargs="*", choices=(*CHECKS, []), help="default: all")
    asked = parser.parse_args(arguments)
    need(asked.device)
    failed = []
    with tempfile.TemporaryDirectory(prefix="mtlrec-on-device-", dir=asked.folder) as scratch:
        checks = Checks(Path(scratch), asked.device)
        for name in asked.checks or CHECKS:
            try:
                getattr(checks, name)()
            except Exception:
                traceback.print_exc()
                failed.append(name)
            print(f"{'FAILED' if name in failed else 'ok'}: {name}", file=sys.stderr, flush=True)
    report = {"device": asked.device, "failed": failed, "largest_differences": checks.found}
    print(json.dumps(report), flush=True)
    return report


if __name__ == "__main__":
    sys.exit(1 if main()["failed"] else 0)
