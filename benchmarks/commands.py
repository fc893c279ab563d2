"""Runs mtlrec's own commands, as a user would, for the pages in docs/ that show what they reach."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def mtlrec(*arguments: str | Path) -> dict[str, Any]:
    """The JSON object that `mtlrec ARGUMENTS --json` prints; its progress goes to stderr as ever.

    Ends this program with the command's exit code where that is not 0.
    """
    command = [sys.executable, "-m", "mtlrec.cli", *map(str, arguments), "--json"]
    print("+ mtlrec", *arguments, file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def prepare(name: str, source: Path, out: Path) -> Path:
    """`mtlrec prepare NAME SOURCE OUT`, unless an earlier call has done it."""
    if not (out / "job.yaml").exists():
        mtlrec("prepare", name, source, out)
    return out


def table(head: list[str], rows: list[list[str]]) -> str:
    """A markdown table: the first column to the left, the others to the right."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
