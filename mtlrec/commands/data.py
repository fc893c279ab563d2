"""`mtlrec synth` and `mtlrec prepare`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from mtlrec import storage
from mtlrec.commands.console import print_json
from mtlrec.display import Display
from mtlrec.job.errors import InputError

Make = Callable[[str, Callable[[dict[str, Any]], None]], dict[str, Any]]
"""(URL of the new folder, show) -> what was made."""


def synth(arguments: argparse.Namespace) -> int:
    """Make data with a known answer."""
    from mtlrec.data.synthetic import synthesise

    sizes = {key: getattr(arguments, key) for key in ("rows", "users", "items", "scenarios", "files", "seed")}
    return _make(arguments, lambda out, show: synthesise(out, **sizes, force=arguments.force, progress=show))


def prepare(arguments: argparse.Namespace) -> int:
    """Turn a public data set into Parquet and a job."""
    from mtlrec.data.prepare.catalog import PREPARERS

    prepare = PREPARERS.get(arguments.dataset)
    if prepare is None:
        raise InputError(f"prepare {arguments.dataset}: not known; allowed: {', '.join(sorted(PREPARERS))}")
    return _make(
        arguments,
        lambda out, show: prepare(arguments.source, out, force=arguments.force, progress=show),
    )


def _make(arguments: argparse.Namespace, make: Make) -> int:
    display = Display()
    try:
        made = make(storage.make_absolute(arguments.out, "."), display.handle)
    finally:
        display.close()
    job = storage.join(made["out"], "job.yaml")
    display.say(f"wrote {made['out']}; now: mtlrec train {job}")
    return print_json(arguments, {**made, "job": job})
