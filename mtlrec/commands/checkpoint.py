"""`mtlrec evaluate`, `predict` and `inspect`: what is done with a checkpoint."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from mtlrec import storage
from mtlrec.checkpoint.folder import CHECKPOINTS, find, list_checkpoints
from mtlrec.checkpoint.inspect import inspect_checkpoint, render
from mtlrec.commands.console import DONE, FAILED, fail, print_json, print_text
from mtlrec.display import Display
from mtlrec.job.errors import InputError
from mtlrec.job.run import MAX_WORKERS
from mtlrec.launch import check_address, launch
from mtlrec.metrics.bootstrap import REPLICATES
from mtlrec.preflight import RESULT, open_checkpoint
from mtlrec.stack import require_stack
from mtlrec.stopping import StopRequest

MAX_REPLICATES = 100_000


def evaluate(arguments: argparse.Namespace) -> int:
    """Measure a checkpoint, per scenario and task; or how it differs from another."""
    if arguments.against is None:
        if arguments.replicates is not None:
            raise InputError(f"--replicates {arguments.replicates}: only with --against")
        result, display = _on_checkpoint("evaluate", arguments, {})
    else:
        replicates = REPLICATES if arguments.replicates is None else arguments.replicates
        if not 1 <= replicates <= MAX_REPLICATES:
            raise InputError(f"--replicates {replicates}: allowed are 1 to {MAX_REPLICATES}")
        result, display = _on_checkpoint("against", arguments, {"replicates": replicates})
    display.metrics(result["metrics"], result["ideal"], f"{result['checkpoint']} on {result['data']}")
    if "against" in result:
        display.metrics(result["against_metrics"], None, f"{result['against']} on {result['data']}")
        display.differences(result)
    return print_json(arguments, result)


def predict(arguments: argparse.Namespace) -> int:
    """Score rows with a checkpoint, into Parquet."""
    out = storage.make_absolute(arguments.out, ".")
    if storage.list_files(out) if storage.exists(out) else False:
        raise InputError(f"--out {out}: the folder is not empty; name a new one")
    named = arguments.keys.split(",") if arguments.keys is not None else None
    keys = list(dict.fromkeys(key for key in named if key)) if named is not None else None
    result, display = _on_checkpoint("predict", arguments, {"out": out, "keys": keys})
    display.say(f"wrote {result['rows']:,} predictions to {result['out']}")
    return print_json(arguments, result)


def choose(url: str, last: bool) -> tuple[str, str]:
    """The checkpoint that `url` names, and which one it is: of a run's folder its best, or its `last`.

    Which is best, the result of a finished run says where the job has run.evaluate; else, or where that one
    is not there any more, it is the last too.
    """
    url = storage.make_absolute(url, ".")
    chosen = find(url)
    if storage.parent(chosen) != storage.join(url, CHECKPOINTS):
        return chosen, "as named"
    best = None if last else _best_of(url)
    if best is None:
        return chosen, "the run's latest"
    # By its name, as the run's folder may have been moved or copied since.
    for found in list_checkpoints(url):
        if storage.name(found.url) == best:
            return found.url, "the run's best"
    return chosen, f"the run's latest, as its best, {best}, is not there"


def _best_of(run: str) -> str | None:
    """Name of the checkpoint that the run's result says is best."""
    try:
        result = json.loads(storage.read(storage.join(run, RESULT)))
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    best = result.get("best") if isinstance(result, dict) else None
    url = best.get("checkpoint") if isinstance(best, dict) else None
    return storage.name(url) if isinstance(url, str) else None


def _on_checkpoint(
    action: str, arguments: argparse.Namespace, payload: dict[str, Any]
) -> tuple[dict[str, Any], Display]:
    """Run `action` on the checkpoint that the arguments name, on as many workers as they say."""
    require_stack(arguments.device)
    if arguments.workers is not None and not 0 <= arguments.workers <= MAX_WORKERS:
        raise InputError(f"--workers {arguments.workers}: allowed are 0 to {MAX_WORKERS}")
    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise InputError(f"--batch-size {arguments.batch_size}: at least 1")
    if arguments.address and not arguments.workers:
        raise InputError(f"--address {arguments.address}: needs --workers of at least 1")
    check_address(arguments.address)
    checkpoint, which = choose(arguments.checkpoint, arguments.last)
    job, task = open_checkpoint(checkpoint, arguments.data, arguments.device, arguments.batch_size, payload)
    against = None
    if action == "against":
        against = choose(arguments.against, arguments.last)
        _, other = open_checkpoint(against[0], task["data"], arguments.device, arguments.batch_size, {})
        task["against"] = {"job": other["job"], "checkpoint": other["checkpoint"]}
    run = job.run.model_copy(update={"workers": arguments.workers or 0})
    display = Display(arguments.quiet)
    display.say(f"checkpoint {checkpoint} ({which})")
    if against is not None:
        display.say(f"against    {against[0]} ({against[1]})")
    try:
        result = launch(
            action,
            task,
            run,
            name=f"{action}-{os.getpid()}",
            address=arguments.address,
            show=display.handle,
            stop=StopRequest(),
            alive=lambda: None,
            last_words=lambda text: fail(arguments, text, FAILED),
        )
    finally:
        display.close()
    return result, display


def inspect(arguments: argparse.Namespace) -> int:
    """Show what a checkpoint holds."""
    display = Display()
    try:
        found = inspect_checkpoint(find(arguments.checkpoint), verify=arguments.verify, show=display.handle)
    finally:
        display.close()
    if arguments.json:
        return print_json(arguments, found)
    print_text(render(found))
    return DONE
