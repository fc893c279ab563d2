"""`mtlrec train`: one run, or with `run.seeds` one for each seed."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from mtlrec import storage
from mtlrec.commands.console import DONE, FAILED, STOPPED, fail, print_json
from mtlrec.data.quarantine import FOLDER as QUARANTINE
from mtlrec.data.quarantine import told
from mtlrec.display import Display
from mtlrec.job.errors import InputError
from mtlrec.job.job import Job
from mtlrec.launch import check_address, launch
from mtlrec.preflight import open_run, read_job
from mtlrec.stack import require_stack
from mtlrec.stopping import StopRequest


def train(arguments: argparse.Namespace) -> int:
    """Train a job, or go on with it where it stopped."""
    overrides = list(arguments.set)
    if arguments.name is not None:
        overrides.append(f"name={json.dumps(arguments.name)}")
    if arguments.workers is not None:
        overrides.append(f"run.workers={arguments.workers}")
    job = read_job(arguments.job, overrides)
    require_stack(job.run.device)
    check_address(arguments.address)
    if job.run.seeds is not None:
        if arguments.fork is not None:
            raise InputError(f"--fork {arguments.fork}: one run is forked, and run.seeds asks for several")
        from mtlrec.commands.compare import train_seeds

        return train_seeds(arguments, overrides)
    return _train_one(arguments, job)


def _train_one(arguments: argparse.Namespace, job: Job) -> int:
    display, stop = Display(arguments.quiet), StopRequest()
    try:
        opened = open_run(job, {"command": " ".join(sys.argv)}, display.handle, arguments.fork)
        name = arguments.fork or job.name
        if isinstance(opened, dict):
            display.say(f"run {name} has finished at step {opened['steps']:,}; raise run.epochs to go on")
            return _show_result(arguments, display, {**opened, "already_finished": True})
        run, lease = opened
        with lease, stop.listening(display.say), stop.watching(run.url, run.attempt, display.say):
            # What was killed in the middle of a write has left a beginning; the lease alone is written now.
            storage.remove_unfinished(run.url, keep=lease.name)
            result = launch(
                "train",
                asdict(run),
                job.run,
                name=name,
                address=arguments.address,
                show=display.handle,
                stop=stop,
                alive=lease.check,
                last_words=lambda text: fail(arguments, text, FAILED),
            )
            storage.remove_unfinished(run.url, keep=lease.name)
    finally:
        display.close()
    return _show_result(arguments, display, result)


def _show_result(arguments: argparse.Namespace, display: Display, result: dict[str, Any]) -> int:
    best = result.get("best")
    if best is not None:
        display.metrics(best["metrics"], result["ideal"], f"step {best['step']:,}, the best, on data.eval")
    elif result["metrics"]:
        display.metrics(result["metrics"], result["ideal"], f"step {result['steps']:,}, on data.eval")
    rate = f", {result['samples_per_s']:,.0f} samples/s" if result["samples_per_s"] else ""
    display.say(
        f"{result['rows']:,} rows trained, {result['steps']:,} steps{rate}, {result['seconds']:.0f} s"
    )
    if result.get("skipped_steps"):
        steps, rows = result["skipped_steps"], result["skipped_rows"]
        display.say(f"{steps:,} steps of {rows:,} rows were not finite and skipped (run.non_finite: skip)")
    bad = result.get("bad_rows")  # results of older versions have none
    if bad is not None and any(bad.values()):
        display.say(f"left out   {told(bad)}; {result['run_dir']}/{QUARANTINE} says which, and why")
    display.say(f"run        {result['run_dir']}")
    display.say(f"checkpoint {result['checkpoint']}")
    if best is not None and best["checkpoint"] != result["checkpoint"]:
        display.say(f"best       {best['checkpoint']}")
    if result["stopped"]:
        display.say("stopped on request; the same command goes on from here")
    else:
        display.say(f"next: mtlrec evaluate {result['run_dir']} --data FOLDER")
        display.say(f"      mtlrec predict {result['run_dir']} --data FOLDER --out FOLDER")
        display.say(f"      mtlrec inspect {result['run_dir']}")
        display.say(f"      tensorboard --logdir {result['run_dir']}/tensorboard")
    print_json(arguments, result)
    return STOPPED if result["stopped"] else DONE
