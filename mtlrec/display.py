"""What a person sees on stderr: what was read, the plan, a progress bar, the table of metrics."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

PLAIN_WIDTH = 120
"""Columns of a table that goes to a file or a pipe."""
_SHORT = {"positives": "pos.", "calibration": "calib."}
LINE_EVERY_S = 10.0
"""Without a terminal, progress is a line every so often."""


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Whoever read stderr has gone: training goes on in silence."""
        self.quiet = True


class Display:
    """Draws events (plain dicts with a `kind`) as they come. Every word goes to stderr."""

    def __init__(self, quiet: bool = False) -> None:
        terminal = sys.stderr.isatty()
        width = None if terminal else PLAIN_WIDTH
        self.console = _Console(
            stderr=True, quiet=quiet, width=width, soft_wrap=not terminal, highlight=False
        )
        self._bar: Progress | None = None
        self._task: Any = None
        self._live = terminal and not quiet
        self._what, self._last_line = "", 0.0

    def handle(self, event: dict[str, Any]) -> None:
        """Draw one event; a kind this screen does not know is ignored."""
        draw = getattr(self, f"_on_{event['kind']}", None)
        if draw is not None:
            draw(event)

    def say(self, text: str) -> None:
        """One line of plain text."""
        self.console.print(text, markup=False)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _on_log(self, event: dict[str, Any]) -> None:
        self.say(event["text"])

    def _on_data(self, event: dict[str, Any]) -> None:
        self.say(
            f"{event['role']}: {event['rows']:,} rows in {event['shards']:,} shards, "
            f"{event['groups']:,} row groups, from {event['url']}"
        )
        scenarios = event["scenarios"]
        tasks = list(next(iter(scenarios.values()))["tasks"])
        table = _table(f"labels, in {event['sampled_rows']:,} rows read for this table")
        table.add_column("scenario")
        table.add_column("rows", justify="right")
        for task in tasks:
            table.add_column(f"{task}\nlabelled", justify="right")
            table.add_column(f"{task}\nmean", justify="right")
        for name, numbers in scenarios.items():
            cells = [f"{numbers['rows']:,}"]
            for task in tasks:
                cells += [
                    _percent(numbers["tasks"][task]["labelled"]),
                    _number(numbers["tasks"][task]["mean"]),
                ]
            table.add_row(name, *cells)
        self.console.print(table)

    def _on_plan(self, event: dict[str, Any]) -> None:
        table = _table(f"embedding tables on {event['workers']} worker(s)")
        for column in ("table", "rows", "dim", "MiB", "sharding", "ranks"):
            table.add_column(column, justify="left" if column in ("table", "sharding") else "right")
        for row in event["tables"]:
            ranks = ",".join(str(rank) for rank in row["ranks"])
            mib = f"{row['bytes'] / 2**20:,.1f}"
            table.add_row(row["table"], f"{row['rows']:,}", str(row["dim"]), mib, row["kind"], ranks)
        self.console.print(table)
        self.say(f"dense parameters: {event['dense_parameters']:,}")

    def _on_progress(self, event: dict[str, Any]) -> None:
        losses = "  ".join(f"{task} {_number(loss)}" for task, loss in event.get("losses", {}).items())
        left = _duration(event["seconds_left"])
        done, total, what = event["done"], event["total"], event["what"]
        rate = f"{event['rows_per_s']:,.0f} {event.get('unit', 'samples')}/s"
        if self._live:
            if self._bar is None:
                columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
                self._bar = Progress(*columns, console=self.console, transient=True)
                self._bar.start()
                self._task = self._bar.add_task(what, total=total, text="")
            text = f"{done:,}/{total:,}  {rate}  {losses}  {left} left"
            self._bar.update(self._task, description=what, total=total, completed=done, text=text)
        now = time.monotonic()
        if what != self._what:
            self._what, self._last_line = what, now
        if not self._live and (now - self._last_line >= LINE_EVERY_S or done >= total):
            self._last_line = now
            self.say(f"{what} {done:,}/{total:,}  {rate}  {losses}  {left} left".replace("    ", "  "))
        if done >= total:
            self.close()

    def metrics(self, metrics: dict[str, Any], ideal: dict[str, Any] | None, title: str) -> None:
        """The table scenario x task; `ideal` in the same shape adds the distance to the best possible."""
        tasks = list(metrics["all"])
        for kind, columns in (
            ("auc", ("auc", "logloss", "calibration")),
            ("rmse", ("rmse", "mae")),
        ):
            here = [task for task in tasks if kind in metrics["all"][task]]
            if not here:
                continue
            table = _table(title)
            for name in ("scenario", "task", "rows", *(["positives"] if kind == "auc" else []), *columns):
                table.add_column(
                    _SHORT.get(name, name), justify="left" if name in ("scenario", "task") else "right"
                )
            known = [column for column in columns if ideal and column != "calibration" and column != "mae"]
            for column in known:
                table.add_column(f"{column}\n- ideal", justify="right")
            for scenario, by_task in metrics.items():
                for task in here:
                    numbers = by_task[task]
                    best = ((ideal or {}).get(scenario) or {}).get(task) or {}
                    cells = [f"{numbers['rows']:,}"]
                    if kind == "auc":
                        cells.append(f"{numbers['positives']:,}")
                    cells += [_number(numbers[column]) for column in columns]
                    for column in known:
                        mine, ours = numbers[column], best.get(column)
                        cells.append("-" if mine is None or ours is None else f"{mine - ours:+.4f}")
                    table.add_row(scenario, task, *cells)
            self.console.print(table)


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
