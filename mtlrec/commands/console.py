"""What every command has: its exit codes, and the one object that `--json` puts on stdout."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

DONE, FAILED, WRONG_INPUT, STOPPED = 0, 1, 2, 3
"""Exit codes."""


def print_text(text: str) -> None:
    """To stdout; whoever reads it may have enough (`| head`), which is no failure of ours."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # What is still buffered must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_json(arguments: argparse.Namespace, result: dict[str, Any]) -> int:
    """`result` to stdout where `--json` asks for it; returns DONE."""
    if arguments.json:
        print_text(json.dumps(result))
    return DONE
