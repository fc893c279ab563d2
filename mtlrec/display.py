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
_WORDS = ("scenario", "task", "metric")
_CLASSES, _RANKS, _VALUES = (
    ("auc", "gauc", "logloss", "calibration"),
    ("ndcg", "recall", "hit", "mrr"),
    ("rmse", "mae"),
)
"""What the tables of metrics show, `@k` left out."""
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
        """Tables scenario x task; `ideal` in the same shape adds the distance to the best possible."""
        for wanted, known in ((_CLASSES, ("auc", "logloss")), (_RANKS, ()), (_VALUES, ("rmse",))):
            self._metrics_table(metrics, ideal, title, wanted, known)

    def _metrics_table(
        self,
        metrics: dict[str, Any],
        ideal: dict[str, Any] | None,
        title: str,
        wanted: tuple[str, ...],
        known: tuple[str, ...],
    ) -> None:
        """One table of the metrics that are `wanted`, of the tasks that have one; `known`: with an ideal."""
        names = {name for numbers in metrics["all"].values() for name in numbers}
        columns = [name for word in wanted for name in sorted(names) if name.partition("@")[0] == word]
        here = [task for task, numbers in metrics["all"].items() if numbers.keys() & set(columns)]
        if not here:
            return
        counts = (
            ("rows", "positives") if wanted is _CLASSES else ("groups",) if wanted is _RANKS else ("rows",)
        )
        ideals = [name for name in known if ideal and name in columns]
        table = _table(title)
        for name in ("scenario", "task", *counts, *columns):
            table.add_column(_SHORT.get(name, name), justify="left" if name in _WORDS else "right")
        for name in ideals:
            table.add_column(f"{name}\n- ideal", justify="right")
        sampled = False
        for scenario, by_task in metrics.items():
            for task in here:
                numbers = by_task[task]
                best = ((ideal or {}).get(scenario) or {}).get(task) or {}
                cells = [f"{numbers[count]:,}" for count in counts]
                if wanted is _RANKS and numbers.get("sampled"):
                    sampled, cells[0] = True, f"~ {cells[0]}"
                cells += [_number(numbers.get(column)) for column in columns]
                for column in ideals:
                    mine, ours = numbers.get(column), best.get(column)
                    cells.append("-" if mine is None or ours is None else f"{mine - ours:+.4f}")
                table.add_row(scenario, task, *cells)
        self.console.print(table)
        if sampled:
            self.say("~ too many rows to hold: measured over a sample of the users")

    def differences(self, result: dict[str, Any]) -> None:
        """What the action `against` found: how the checkpoints of `mtlrec evaluate A --against B` differ."""
        table = _table(f"A against B on {result['data']}")
        for name in ("scenario", "task", "metric", "A", "B", "A - B", "95 % interval", "users"):
            table.add_column(name, justify="left" if name in _WORDS else "right")
        for scenario, by_task in result["differences"].items():
            for task, by_metric in by_task.items():
                for metric, found in by_metric.items():
                    interval, difference = "-", "-"
                    if found["difference"] is not None:
                        difference = f"{found['difference']:+.4f}  "
                    if found["low"] is not None:
                        interval = f"{found['low']:+.4f} .. {found['high']:+.4f}"
                        if found["low"] > 0 or found["high"] < 0:
                            difference = f"{difference[:-1]}*"
                    cells = [_number(found["a"]), _number(found["b"]), difference, interval]
                    table.add_row(scenario, task, metric, *cells, f"{found['users']:,}")
        self.say(f"A {result['checkpoint']}")
        self.say(f"B {result['against']}")
        self.console.print(table)
        self.say("* the interval, of a bootstrap over users, excludes 0")


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
