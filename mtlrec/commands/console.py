"""What every command has: its exit codes, and the one object that `--json` puts on stdout."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import json
import os
import sys
from typing import Any, NoReturn

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


def fail(arguments: argparse.Namespace, message: str, code: int) -> int:
    """`message` as the command's last line, and as its object with `--json`; returns `code`."""
    print(f"mtlrec: {message}", file=sys.stderr)
    if getattr(arguments, "json", False):
        print_text(json.dumps({"error": message, "exit": code}))
    return code


def leave(code: int) -> NoReturn:
    """End this process with `code`.

    A thread of gloo lets go of a collective's tensors some time after the collective has returned, and needs
    the interpreter for it. Where that is just being taken down, the thread is ended in the middle of a C++
    destructor, and the whole process with SIGABRT ("terminate called without an active exception"). TorchRec
    holds on to the process group, so the threads cannot be joined: leave without taking anything down.
    """
    if "torch.distributed" not in sys.modules:
        sys.exit(code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        # Who was to read it may be gone.
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
