"""`mtlrec stop`: a file in the run's folder ends the run at its next step, with a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from mtlrec.cli import main
from tests.e2e.driven import Command, checkpoints
from tests.small_data import small_job, write_small_data

EVERY = 20


def test_a_stop_file_saves_and_exits_with_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_small_data(tmp_path / "train")
    job = small_job(Path("train"), Path("runs"), "asked", run__epochs=10_000)
    job["data"]["eval"] = None
    job["run"]["checkpoint"] = {"every_steps": EVERY}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    run = tmp_path / "runs" / "asked"
    stop = run / "stop"

    assert "not a run" in Command(tmp_path, "stop", "train").result(code=2)["error"]
    run.mkdir(parents=True)
    stop.write_text("from before the run began")
    command = Command(tmp_path, "train", "job.yaml")
    command.wait_for(lambda: len(checkpoints(tmp_path, "asked")) > 0)
    assert not stop.exists(), "a request from before asked somebody else"
    asked = Command(tmp_path, "stop", "runs/asked").result()
    assert asked["attempt"] == 1 and asked["run_dir"] == str(run)
    result = command.result(code=3)
    assert result["stopped"] and not stop.exists()
    assert result["checkpoint"].endswith(f"step-{result['steps']:012d}.a0001")
    assert "nobody trains" in Command(tmp_path, "stop", "runs/asked").result(code=2)["error"]
    more = ["--set", f"run.max_steps={result['steps'] + 5}", "--json"]
    assert main(["train", str(tmp_path / "job.yaml"), *more]) == 0
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    again = json.loads(out)
    assert again["steps"] == result["steps"] + 5 and not again["stopped"]
