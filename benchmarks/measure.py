"""What every benchmark shares: options, two sides in turn, ratios with their spread, one JSON line."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

REPEATS = 5


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks have; a benchmark adds its own."""
    found = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    found.add_argument("--repeats", type=int, default=REPEATS, help="measurements of each side")
    found.add_argument("--folder", type=Path, help="where to write; default: the folder of temporary files")
    found.add_argument("--quick", action="store_true", help="a small size, to see that it runs")
    return found


def in_turn(
    sides: Mapping[str, Callable[[], float]], repeats: int, between: Callable[[], None] | None = None
) -> dict[str, list[float]]:
    """Call each of `sides` `repeats` times and return what they gave, by name, in the order of the calls.

    They take turns, and who goes first changes, so that what drifts or is warmed by the other meets both.
    `between` is called before each.
    """
    found: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(repeats):
        for name in names if number % 2 == 0 else reversed(names):
            if between is not None:
                between()
            found[name].append(sides[name]())
            progress(f"{name} {number + 1}/{repeats}: {found[name][-1]:.6g}")
    return found


def ratio(
    values: Sequence[float], must: float, aim: float | None = None, least: bool = True
) -> dict[str, float | bool | None]:
    """Median and spread of `values`, and whether the median reaches `must`.

    `least`: `must` is the least that will do; else the greatest.
    """
    median = statistics.median(values)
    met = median >= must if least else median <= must
    return {**spread(values), "must": must, "aim": aim, "met": met}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
    }


def of_each(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """The ratio of each pair that was measured next to each other."""
    return [over / under for over, under in zip(numerators, denominators, strict=True)]


def report(name: str, ratios: Mapping[str, Mapping[str, Any]], **rest: Any) -> dict[str, Any]:
    """Print the benchmark's one JSON line, and return it. `rest`: sizes, and what the ratios were made of."""
    found = {"benchmark": name, "ratios": dict(ratios), **rest}
    print(json.dumps(found), flush=True)
    return found


def run_of(job: dict[str, Any]) -> dict[str, Any]:
    """`mtlrec.preflight.Run` of a job's first attempt, as plain data that travels to worker processes."""
    from mtlrec.data.shards import Dataset
    from mtlrec.job.job import job_from_dict
    from mtlrec.schema import build_schema

    parsed = job_from_dict(job, "benchmark")
    schema = build_schema(parsed.schema_, parsed.model)
    return {
        "job": parsed.to_dict(),
        "url": f"{parsed.run.storage}/{parsed.name}",
        "attempt": 1,
        "fingerprint": Dataset.open(parsed.data.train, schema.columns()).fingerprint,
    }


def forget_peak() -> None:
    """From here on this process's `memory("VmHWM")` is of what follows."""
    Path("/proc/self/clear_refs").write_text("5")


def memory(field: str) -> int:
    """Bytes of this process's memory, as Linux calls it: VmRSS, what is resident; VmHWM, at most so far."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) * 1024


def progress(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)
