"""`mtlrec compare`, and `mtlrec train` of a job with `run.seeds`: many runs, one table."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from mtlrec import storage
from mtlrec.commands.console import DONE, FAILED, STOPPED, print_json, print_text
from mtlrec.compare.cells import Outcome, Setting, run_cells
from mtlrec.compare.grid import Grid, read_grid
from mtlrec.compare.table import Column, columns, comparison, markdown, page
from mtlrec.data.shards import Dataset
from mtlrec.display import Display
from mtlrec.job.errors import InputError
from mtlrec.launch import check_address
from mtlrec.preflight import refuse_nested
from mtlrec.stack import require_stack
from mtlrec.stopping import StopRequest

MAX_PARALLEL = 64


def compare(arguments: argparse.Namespace) -> int:
    """Train every variation with every seed, and put them side by side."""
    if not 1 <= arguments.parallel <= MAX_PARALLEL:
        raise InputError(f"--parallel {arguments.parallel}: allowed are 1 to {MAX_PARALLEL}")
    overrides = list(arguments.set)
    if arguments.workers is not None:
        overrides.append(f"run.workers={arguments.workers}")
    grid = read_grid(arguments.job, overrides, arguments.vary, arguments.seeds)
    asked = columns(grid, arguments.metric)
    data = storage.make_absolute(arguments.data, ".") if arguments.data is not None else None
    if data is None and (without := [cell for cell in grid.cells if cell.job.data.eval is None]):
        raise InputError(f"--data: {without[0].name} has no data.eval, so name the Parquet to measure on")
    for device in sorted({cell.job.run.device for cell in grid.cells}):
        require_stack(device)
    check_address(arguments.address)
    out = _folder(grid, "compare") if arguments.out is None else storage.make_absolute(arguments.out, ".")
    for cell in grid.cells:
        refuse_nested(out, cell.job, "--out")
    setting = Setting(
        out=out,
        data=data,
        fingerprint=_fingerprint(grid, data) if data is not None else None,
        workers=None if arguments.workers is None else grid.cells[0].job.run.fewest_workers,
        address=arguments.address,
        parallel=arguments.parallel,
    )
    found, outcomes = _perform(grid, setting, asked, arguments.scenarios, Display(arguments.quiet))
    if arguments.json:
        print_json(arguments, found)
    else:
        print_text(markdown(found, arguments.scenarios))
    return _exit_code(grid, outcomes)


def _fingerprint(grid: Grid, data: str) -> str:
    skips = any(cell.job.data.tolerance is not None for cell in grid.cells)
    return Dataset.open(data, (), skip_unreadable=skips).fingerprint


def train_seeds(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Train the job once with each of its `run.seeds`."""
    grid = read_grid(arguments.job, overrides, [], None)
    display = Display(arguments.quiet)
    setting = Setting(_folder(grid, "seeds"), address=arguments.address)
    found, outcomes = _perform(grid, setting, None, True, display)
    (row,) = found["variations"]
    ended = [outcomes[cell.name] for cell in grid.cells if cell.name in outcomes]
    if ended and all(outcome.exit == 2 for outcome in ended):
        # What the user has to correct is the same for every seed.
        raise InputError(str(ended[0].error))
    display.say(markdown(found, by_scenario=True))
    results = {
        str(cell.seed): outcomes[cell.name].result
        or {"error": outcomes[cell.name].error, "exit": outcomes[cell.name].exit}
        for cell in grid.cells
        if cell.name in outcomes
    }
    print_json(arguments, {"seeds": results, "mean": row["mean"], "deviation": row["deviation"]})
    return _exit_code(grid, outcomes)


def _perform(
    grid: Grid, setting: Setting, asked: list[Column] | None, by_scenario: bool, display: Display
) -> tuple[dict[str, Any], dict[str, Outcome]]:
    """Run all cells; compare.json and compare.md in `setting.out` say after each what is known."""
    storage.check_writable(setting.out)
    stop = StopRequest()

    def write(outcomes: dict[str, Outcome]) -> dict[str, Any]:
        found = comparison(grid, outcomes, asked, setting.data)
        for name, text in (
            ("compare.json", json.dumps(found, indent=1)),
            ("compare.md", page(found, by_scenario)),
        ):
            storage.write(storage.join(setting.out, name), text.encode())
        return found

    runs = f"{len(grid.variations)} variation(s) x {len(grid.seeds)} seed(s) = {len(grid.cells)} run(s)"
    display.say(f"{runs}, in {setting.out}")
    say: Callable[[str], None] = display.say
    try:
        with stop.listening(say):
            outcomes = run_cells(grid.cells, setting, say=say, should_stop=lambda: stop.asked, changed=write)
    finally:
        display.close()
    if any(outcome.status == "stopped" for outcome in outcomes.values()) or len(outcomes) < len(grid.cells):
        say("stopped on request; the same command goes on from here")
    return write(outcomes), outcomes


def _folder(grid: Grid, what: str) -> str:
    return storage.join(grid.job.run.storage, f"{grid.job.name}-{what}")


def _exit_code(grid: Grid, outcomes: dict[str, Outcome]) -> int:
    if len(outcomes) < len(grid.cells) or any(each.status == "stopped" for each in outcomes.values()):
        return STOPPED
    return FAILED if any(each.status == "failed" for each in outcomes.values()) else DONE
