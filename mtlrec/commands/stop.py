"""`mtlrec stop`: ask whoever trains a run to save and end."""

from __future__ import annotations

import argparse

from mtlrec import storage
from mtlrec.checkpoint.lease import holder
from mtlrec.commands.console import DONE, print_json, print_text
from mtlrec.job.errors import InputError
from mtlrec.stopping import ask_to_stop


def stop(arguments: argparse.Namespace) -> int:
    """Leave a stop file in the run's folder; its driver saves at the next step and exits with 3."""
    url = storage.make_absolute(arguments.run, ".")
    held = holder(url)
    if held is None:
        raise InputError(f"{url}: nobody trains this run now, so there is nothing to stop")
    ask_to_stop(url, held["attempt"])
    if arguments.json:
        return print_json(arguments, {"run_dir": url, "attempt": held["attempt"], "host": held.get("host")})
    print_text(f"{url}: asked attempt {held['attempt']} to stop ({held['description']})")
    return DONE
