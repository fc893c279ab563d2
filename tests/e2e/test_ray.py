"""The main job on real Ray Train workers, from the command line: crashes, resumes, what is left behind."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml

from mtlrec.cli import main
from tests.e2e.cluster import Cluster
from tests.e2e.driven import Command, checkpoints, final_metrics_agree, trained_rows, wait_until_gone
from tests.small_data import small_job, write_small_data

STEPS = 400
"""Long enough to be killed in the middle, at 15 to 40 steps a second."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    write_small_data(folder / "train")
    job = small_job(Path("train"), Path("runs"), run__epochs=100, run__workers=2, run__report_every_s=0.5)
    job["run"] |= {"max_steps": STEPS, "record_rows": True, "checkpoint": {"every_steps": 50}}
    # Under Adagrad a row whose gradient nearly vanishes moves by its sign, and rounding decides: over many
    # steps that would blur what is compared here.
    job["optimizer"]["tables"] = {"kind": "sgd", "lr": 0.5}
    (folder / "job.yaml").write_text(yaml.safe_dump(job, sort_keys=False))
    return folder


@pytest.fixture(scope="module")
def undisturbed(home: Path) -> dict[str, Any]:
    """The same job in one plain process: this one, which need not import torch again."""
    assert main(["train", str(home / "job.yaml"), "--name", "plain", "--workers", "0", "--quiet"]) == 0
    return json.loads((home / "runs" / "plain" / "result.json").read_text())


def attempts(home: Path) -> set[int]:
    return {int(name.split(".a")[1]) for name in checkpoints(home, "killed")}


def test_a_worker_killed_a_driver_killed_and_a_stop_lose_nothing_and_leave_nothing(
    home: Path, undisturbed: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """One run through all of it: every start of Ray takes half a minute."""
    train = ("train", "job.yaml", "--name", "killed")
    first = Command(home, *train)
    # A second driver is told who holds the run, while it is alive: Ray takes longer to start than that does.
    first.wait_for((home / "runs" / "killed" / "attempts" / "1.json").exists)
    refused = Command(home, *train).result(code=2)
    assert str(first.process.pid) in refused["error"]
    first.wait_for(lambda: bool(checkpoints(home, "killed")))
    workers = [process for process in first.descendants() if "RayTrainWorker" in " ".join(process.cmdline())]
    assert len(workers) == 2, [process.cmdline() for process in first.descendants()]
    assert all(worker.nice() <= 4 + os.nice(0) for worker in workers), "threads of theirs let them go first"
    os.kill(workers[1].pid, signal.SIGKILL)
    seen = set(checkpoints(home, "killed"))
    first.wait_for(lambda: bool(set(checkpoints(home, "killed")) - seen))
    restarted = attempts(home)
    assert len(restarted) > 1, "the restarted workers write to folders of their own"
    ours = first.descendants()
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait()
    wait_until_gone(ours)
    # Read once nobody is left to hold the pipe open.
    assert first.process.communicate()[0] == "", "what Ray says of a dead worker is no result"

    second = Command(home, *train)
    second.wait_for(lambda: max(attempts(home)) > max(restarted))
    ours = second.descendants()
    second.process.send_signal(signal.SIGTERM)
    result = second.result(code=3)
    wait_until_gone(ours)
    said = second.err.read_text()
    assert "resuming killed at step" in said and "embedding tables on 2 worker(s)" in said
    assert result["stopped"] and 100 <= result["steps"] < STEPS
    assert result["checkpoint"].endswith(f"step-{result['steps']:012d}.a{max(restarted) + 1:04d}")

    # And on none, which is not worth the start of another Ray.
    capsys.readouterr()
    assert main(["train", str(home / "job.yaml"), "--name", "killed", "--workers", "0", "--json"]) == 0
    out, err = capsys.readouterr()
    assert f"resuming killed at step {result['steps']} " in err and "Traceback" not in err
    result = json.loads(out)
    assert result["steps"] == STEPS
    final_metrics_agree(result, undisturbed)
    assert trained_rows(home, "killed") == trained_rows(home, "plain")
    left = {path.name for path in (home / "runs" / "killed" / "checkpoints").iterdir()}
    assert left == set(checkpoints(home, "killed")), "what was half-written has been swept"


def all_started_by(command: Command) -> list[psutil.Process]:
    """Waits until it ends."""
    ours: set[psutil.Process] = set()
    while command.process.poll() is None:
        ours.update(command.descendants())
        time.sleep(0.5)
    return list(ours)


def test_evaluate_on_workers_agrees_with_one_process_and_leaves_nothing(
    home: Path, undisturbed: dict[str, Any]
) -> None:
    command = Command(home, "evaluate", undisturbed["run_dir"], "--workers", "2")
    ours = all_started_by(command)
    measured = command.result()
    for task, numbers in undisturbed["metrics"]["all"].items():
        for name, value in numbers.items():
            if isinstance(value, float):
                assert np.isclose(measured["metrics"]["all"][task][name], value, atol=1e-6), name
    assert len(ours) > 2
    wait_until_gone(ours)


def test_an_input_error_of_one_worker_ends_all_at_once_with_one_line(home: Path) -> None:
    # Only rank 0 writes the plan; the other waits for it in a collective.
    (home / "runs" / "odd" / "plans" / "2.json").mkdir(parents=True)
    command = Command(home, "train", "job.yaml", "--name", "odd", "--set", "run.step_timeout_s=600")
    ours = all_started_by(command)
    assert "plans/2.json" in command.result(code=2)["error"]
    wait_until_gone(ours)


def test_a_node_that_is_taken_away_is_no_failure(home: Path, undisturbed: dict[str, Any]) -> None:
    with Cluster(1) as cluster:
        cluster.wait_for_head()
        train = ["train", "job.yaml", "--name", "drained", "--address", cluster.address]
        train += ["--set", "run.epochs=10000", "--set", "run.max_steps=null", "--set", "run.max_failures=0"]
        train += ["--set", "run.checkpoint.every_steps=null"]
        error = ""
        deadline = time.monotonic() + 120
        while "CPUs" not in error and time.monotonic() < deadline:
            # Until the cluster is up, the address is refused in one line too.
            refused = Command(home, *train, "--workers", "2", environment=cluster.environment)
            error = refused.result(code=2)["error"]
        assert "2 worker(s) need 2 CPUs, and the cluster has 1" in error
        second = cluster.add(1)
        name = cluster.ids(2)[1]
        command = Command(home, *train, "--workers", "1-2", environment=cluster.environment)
        command.wait_for(lambda: "samples/s  click" in command.err.read_text())
        assert "embedding tables on 2 worker(s)" in command.err.read_text()
        cluster.drain(name, seconds=20)
        # Nothing else asks for a checkpoint here.
        command.wait_for(lambda: bool(checkpoints(home, "drained")))
        saved = checkpoints(home, "drained")[-1]
        # When the node's time has come, Ray starts the workers elsewhere, though nobody has taken it.
        command.wait_for(lambda: "embedding tables on 1 worker(s)" in command.err.read_text())
        second.kill()
        Command(home, "stop", "runs/drained").result()
        result = command.result(code=3)
        cluster.ids(1)  # the cluster is not ours to end
    said = command.err.read_text()
    assert "will be taken away" in said and f"start 2 of this run, from {home}/runs/drained" in said
    assert f"{saved}\n" in said and result["stopped"]
    rows, plain = trained_rows(home, "drained"), trained_rows(home, "plain")
    assert len(rows) == result["steps"]
    assert all(one == other for one, other in zip(rows, plain, strict=False))
