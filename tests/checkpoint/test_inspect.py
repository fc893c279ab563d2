"""`mtlrec inspect`: what it tells of a checkpoint."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from mtlrec.checkpoint.inspect import inspect_checkpoint, render
from tests.checkpoint.tables import cut, make_table, save_ranks

DENSE = {
    "weights.trunk": torch.ones(4, 3),
    "weights.bias": torch.ones(()),
    "optimizer.trunk.exp_avg": torch.ones(4, 3),
    "optimizer.trunk.step": torch.ones(()),
}


def save_example(folder: Path, **meta: Any) -> str:
    user, item, plain = (
        make_table("user", 70_000, 4),
        make_table("item", 9, 8, "element"),
        make_table("x", 1, 4, "none"),
    )
    save_ranks(str(folder), [[*cut(user), *cut(item), *cut(plain)]], [user, item, plain], DENSE, **meta)
    return str(folder)


def test_inspect(tmp_path: Path) -> None:
    click = {"auc": 0.75, "rows": 1200, "logloss": None, "reasons": {"logloss": "no labels"}}
    metrics = {"all": {"click": click, "stars": {"rows": 7, "rmse": 1.5}}}
    url = save_example(tmp_path / "saved", metrics=metrics)
    found = inspect_checkpoint(url)
    on_disk = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert found["bytes"] == on_disk and found["files"] == 6
    assert (found["job"], found["step"], found["attempt"], found["verified"]) == ("fake", 12, 1, False)
    assert found["position"] == {"generation": 0, "epoch": 1, "done": [3, 4]}
    assert found["metrics"] == metrics
    tables = {table["name"]: {k: v for k, v in table.items() if k != "name"} for table in found["tables"]}
    files = {name: list((tmp_path / "saved/tables" / name).iterdir()) for name in tables}
    assert tables == {
        "user": {
            "rows": 70_000,
            "dim": 4,
            "dtype": "F32",
            "state": {"sum": {"dtype": "F32", "shape": [70_000]}},
            "bytes": sum(file.stat().st_size for file in files["user"]),
            "files": 2,
        },
        "item": {
            "rows": 9,
            "dim": 8,
            "dtype": "F32",
            "state": {name: {"dtype": "F32", "shape": [9, 8]} for name in ("exp_avg", "exp_avg_sq")},
            "bytes": files["item"][0].stat().st_size,
            "files": 1,
        },
        "x": {
            "rows": 1,
            "dim": 4,
            "dtype": "F32",
            "state": {},
            "bytes": files["x"][0].stat().st_size,
            "files": 1,
        },
    }
    assert {tensor["name"]: (tensor["kind"], tensor["shape"]) for tensor in found["dense"]} == {
        "weights.trunk": ("parameter", [4, 3]),
        "weights.bias": ("parameter", []),
        "optimizer.trunk.exp_avg": ("optimizer", [4, 3]),
        "optimizer.trunk.step": ("optimizer", []),
    }
    text = render(found)
    for words in (
        "fake",
        "12  (epoch 1, 7 rows into it)",
        "2024-05-06T07:08:09+00:00  by mtlrec 0.1.0, attempt 1",
        "sizes checked (--verify reads every byte)",
        "exp_avg (1 a weight), exp_avg_sq (1 a weight)",
        "sum (1 a row)",
        "dense: 13 numbers in 2 parameters; optimizer state: exp_avg, step",
        "4 x 3",
        "scenario  task    auc   rows  logloss  rmse",
        "all       click  0.75  1,200        -     -",
        "all       stars     -      7        -   1.5",
    ):
        assert words in text, text
    assert all(len(line) < 120 for line in text.removeprefix(url).splitlines())


def test_what_was_passed_over_is_told_where_there_was_any(tmp_path: Path) -> None:
    none = {"steps": 0, "rows": 0, "in_a_row": 0}
    text = render(inspect_checkpoint(save_example(tmp_path / "none", skipped=none, bad_rows=None)))
    assert "skipped" not in text and "left out" not in text
    skipped = {"steps": 2, "rows": 4096, "in_a_row": 0}
    bad = {"earlier_rows": 0, "earlier_bad": 0, "epoch": 1, "epoch_bad": 12}
    found = inspect_checkpoint(save_example(tmp_path / "some", skipped=skipped, bad_rows=bad))
    assert (found["skipped"], found["bad_rows"]) == (skipped, bad)
    assert "skipped   2 steps of 4,096 rows, which were not finite" in render(found)
    assert "left out  12 bad rows so far in epoch 1\n" in render(found)
    bad |= {"earlier_rows": 50_000, "earlier_bad": 3}
    text = render(inspect_checkpoint(save_example(tmp_path / "more", bad_rows=bad)))
    assert "left out  12 bad rows so far in epoch 1, 3 of 50,000 in the generations before\n" in text


def test_verify_shows_progress(tmp_path: Path) -> None:
    url = save_example(tmp_path / "saved")
    events: list[dict[str, Any]] = []
    found = inspect_checkpoint(url, verify=True, show=events.append)
    assert found["verified"] and "every byte read and verified" in render(found)
    assert (events[-1]["kind"], events[-1]["what"], events[-1]["unit"]) == ("progress", "verify", "MB")
    assert events[-1]["done"] == events[-1]["total"] == 2


def test_nothing_in_a_checkpoint_steers_the_terminal(tmp_path: Path) -> None:
    url = save_example(
        tmp_path / "saved",
        job={"name": "\x1b[2Jgone"},
        position={"epoch": "\x1b]0;x\x07", "done": None},
        skipped={"steps": "\x1b[2J"},
        bad_rows=["\x1b[2J"],
        metrics={"a\rll": {"click": {"auc": 0.5}}},
    )
    text = render(inspect_checkpoint(url))
    assert "?[2Jgone" in text and "a?ll" in text
    assert not [mark for mark in text if not mark.isprintable() and mark != "\n"]


def test_works_without_torch(tmp_path: Path) -> None:
    url = save_example(tmp_path / "saved")
    script = (
        "import sys\n"
        "for name in ('torch', 'safetensors', 'ray'): sys.modules[name] = None\n"
        "from mtlrec.checkpoint.folder import find\n"
        "from mtlrec.checkpoint.inspect import inspect_checkpoint, render\n"
        f"print(render(inspect_checkpoint(find({url!r}), verify=True)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "every byte read and verified" in done.stdout
