"""The table of a comparison: mean and deviation over seeds, as plain data and as markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from mtlrec.compare.cells import Outcome
from mtlrec.compare.grid import Cell, Grid
from mtlrec.job.errors import InputError
from mtlrec.job.metric import BY_KIND, SMALLER_IS_BETTER, split

ALL = "all"
DEFAULTS = {"binary": ("auc", "gauc", "ndcg@10"), "pairwise": ("ndcg@10",), "regression": ("rmse",)}
"""Columns by kind of task; those by user only where they were measured."""
WITHOUT_BEST = ("calibration",)
"""Neither larger nor smaller is better."""

Column = tuple[str, str, str]
"""(scenario, task, metric)."""


def columns(grid: Grid, asked: Sequence[str]) -> list[Column] | None:
    """What `--metric` asks for: "metric" (of every task that has it), "task/metric", "scenario/task/metric".

    None: nothing is asked. Raises InputError for a name that is none of these in any variation.
    """
    kinds, scenarios = _tasks(grid), _scenarios(grid)
    known = {task: (*BY_KIND[kind], *(["calibration"] * (kind == "binary"))) for task, kind in kinds.items()}
    found: list[Column] = []
    for name in asked:
        if "/" not in name:
            matches = [(ALL, task, name) for task, metrics in known.items() if name in metrics]
        else:
            scenario, task, metric = split(name)
            fits = scenario in (ALL, *scenarios) and metric in known.get(task, ())
            matches = [(scenario, task, metric)] if fits else []
        if not matches:
            allowed = ", ".join(f"{task}/{metric}" for task, metrics in known.items() for metric in metrics)
            raise InputError(
                f"--metric {name}: allowed are {allowed}; also METRIC alone and SCENARIO/TASK/METRIC"
            )
        found += matches
    return list(dict.fromkeys(found)) if asked else None


def comparison(
    grid: Grid, outcomes: Mapping[str, Outcome], asked: list[Column] | None, data: str | None
) -> dict[str, Any]:
    """All that is known so far, as plain data: `columns`, and for each variation `mean` and `deviation`.

    Both have the shape of metrics, {scenario: {task: {metric: number | null}}}: the mean, and the sample
    deviation (divisor n - 1; null for n = 1), over the `n` runs that have finished; null where the metric is
    undefined in one of them. `steps` and `seconds` are means too.
    """
    rows = [_row(variation_cells, outcomes) for variation_cells in _by_variation(grid)]
    return {
        "job": grid.job.name,
        "seeds": list(grid.seeds),
        "data": data,
        "complete": all(row["n"] == len(grid.seeds) for row in rows),
        "columns": ["/".join(column) for column in asked or _default_columns(grid, rows)],
        "scenarios": _scenarios(grid),
        "variations": rows,
    }


def mean_and_deviation(trees: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of every number that all `trees` (metrics of several runs) have in one place, in the shape of a tree.

    The sample deviation: divisor n - 1, null for one tree. A place where one of them has null gives null;
    what is neither a number nor null (reasons) is left out.
    """
    means: dict[str, Any] = {}
    deviations: dict[str, Any] = {}
    for key in trees[0] if trees else ():
        if not all(key in tree for tree in trees):
            continue
        values = [tree[key] for tree in trees]
        if all(isinstance(value, Mapping) for value in values):
            if key != "reasons":
                means[key], deviations[key] = mean_and_deviation(values)
        elif all(value is None or _is_number(value) for value in values):
            undefined = any(value is None for value in values)
            means[key] = None if undefined else statistics.fmean(values)
            deviations[key] = None if undefined or len(values) < 2 else statistics.stdev(values)
    return means, deviations


def markdown(found: Mapping[str, Any], by_scenario: bool = False) -> str:
    """The tables of a `comparison`: over all scenarios, and with `by_scenario` one more for each of them.

    The best mean of each column is bold, where several variations have one.
    """
    wanted = [split(name) for name in found["columns"]]
    blocks = [_block(found, wanted, None)]
    if by_scenario:
        overall = [column for column in wanted if column[0] == ALL]
        for scenario in found["scenarios"]:
            here = [(scenario, task, metric) for _, task, metric in overall]
            blocks.append(f"### {_cell(scenario)}\n\n{_block(found, here, scenario)}")
    return "\n\n".join(blocks)


def page(found: Mapping[str, Any], by_scenario: bool = False) -> str:
    """`markdown` with what was compared above it, and the runs that failed below."""
    data = f"`{found['data']}`" if found["data"] else "data.eval"
    seeds = ", ".join(map(str, found["seeds"]))
    lines = [f"# {found['job']}: {len(found['variations'])} variation(s), seeds {seeds}", ""]
    lines += [f"Mean ± sample deviation over n runs, on {data}.", "", markdown(found, by_scenario), ""]
    runs = [run for row in found["variations"] for run in row["runs"].values()]
    lines += [f"- {run['name']} {run['status']}: {run['error']}" for run in runs if run.get("error")]
    return "\n".join(lines).rstrip() + "\n"


def _block(found: Mapping[str, Any], wanted: Sequence[Column], scenario: str | None) -> str:
    rows = found["variations"]
    paths = list(rows[0]["settings"])
    heads = ["/".join(column[1:] if column[0] in (ALL, scenario) else column) for column in wanted]
    counted = ["n", "steps", "seconds", "dense", "tables"] if scenario is None else ["n"]
    best = {column: _best(rows, column) for column in wanted}
    lines = [
        _line([*(paths or ["job"]), *heads, *counted]),
        _line([*["---"] * max(len(paths), 1), *["--:"] * (len(heads) + len(counted))]),
    ]
    for row in rows:
        cells = [*row["settings"].values()] or [found["job"]]
        for column in wanted:
            mean, deviation = (_at(row[tree], column) for tree in ("mean", "deviation"))
            text = "-" if mean is None else f"{mean:.4f}"
            if mean is not None and mean == best[column]:
                text = f"**{text}**"
            spread = "-" if deviation is None else f"{deviation:.4f}"
            cells.append(text if mean is None else f"{text} ± {spread}")
        parameters = row["parameters"] or {}
        numbers = {
            "n": row["n"],
            "steps": row["steps"],
            "seconds": row["seconds"],
            "dense": parameters.get("dense"),
            "tables": parameters.get("tables"),
        }
        cells += ["-" if numbers[name] is None else f"{numbers[name]:,.0f}" for name in counted]
        lines.append(_line(cells))
    return "\n".join(lines)


def _row(cells: Sequence[Cell], outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """One variation: what its finished runs have in common, and each run by seed."""
    over = [outcomes[cell.name] for cell in cells if cell.name in outcomes]
    done = [each for each in over if each.status == "done" and each.result is not None]
    results = [each.result for each in done if each.result is not None]
    metrics = [each.metrics for each in done if each.metrics is not None]
    # A mean over other runs than `n` says would mislead: metrics of all finished runs, or none.
    means, deviations = mean_and_deviation(metrics) if len(metrics) == len(done) else ({}, {})
    return {
        "settings": dict(cells[0].variation.settings),
        "n": len(done),
        "failed": sum(each.status == "failed" for each in over),
        "steps": statistics.fmean(result["steps"] for result in results) if results else None,
        "seconds": statistics.fmean(each.seconds for each in done) if done else None,
        "parameters": results[0].get("parameters") if results else None,
        "mean": means,
        "deviation": deviations,
        "runs": {str(cell.seed): _run(cell, outcomes.get(cell.name)) for cell in cells},
    }


def _run(cell: Cell, outcome: Outcome | None) -> dict[str, Any]:
    if outcome is None:
        return {"name": cell.name, "status": "waiting"}
    result = outcome.result or {}
    return {
        "name": cell.name,
        "status": outcome.status,
        "error": outcome.error,
        "run_dir": result.get("run_dir"),
        "checkpoint": outcome.checkpoint,
        "steps": result.get("steps"),
        "seconds": outcome.seconds,
        "metrics": outcome.metrics,
    }


def _by_variation(grid: Grid) -> list[list[Cell]]:
    return [[cell for cell in grid.cells if cell.variation == each] for each in grid.variations]


def _default_columns(grid: Grid, rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    found = []
    for task, kind in _tasks(grid).items():
        first, *others = DEFAULTS[kind]
        found.append((ALL, task, first))
        for metric in others:
            if any(_at(row["mean"], (ALL, task, metric)) is not None for row in rows):
                found.append((ALL, task, metric))
    return found


def _tasks(grid: Grid) -> dict[str, str]:
    """Task -> kind, over all variations."""
    return {task: each.kind for cell in grid.cells for task, each in cell.job.schema_.tasks.items()}


def _scenarios(grid: Grid) -> list[str]:
    sections = [cell.job.schema_.scenario for cell in grid.cells]
    return list(dict.fromkeys(str(value) for each in sections if each is not None for value in each.values))


def _best(rows: Sequence[Mapping[str, Any]], column: Column) -> float | None:
    """The best mean of a column; None where there is nothing to choose from."""
    values = [value for row in rows if (value := _at(row["mean"], column)) is not None]
    if len(values) < 2 or column[2] in WITHOUT_BEST:
        return None
    return min(values) if column[2] in SMALLER_IS_BETTER else max(values)


def _at(tree: Mapping[str, Any], column: Column) -> float | None:
    scenario, task, metric = column
    value: float | None = tree.get(scenario, {}).get(task, {}).get(metric)
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(_cell(cell) for cell in cells)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
