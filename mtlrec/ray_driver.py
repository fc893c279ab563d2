"""The driver's side of Ray Train: its session, its settings, and the wait for the workers' end."""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any

from mtlrec import storage
from mtlrec.importing import uncollected
from mtlrec.job.errors import FinalFailure, InputError
from mtlrec.job.run import MAX_WORKERS, RunSection
from mtlrec.priority import CHECKPOINTS, LAST
from mtlrec.ray_board import INPUT, Board, Ending
from mtlrec.ray_worker import DUMP_S, POLL_S, arrow_place, first_line, work
from mtlrec.stopping import StopRequest

ROOM_S, SAY_S = 10.0, 60.0
"""Seconds between two looks at whether a run's nodes are there, and between two lines that they are not."""
TIMEOUT_FACTOR = 1.5
"""A collective may last longer than a worker may show no sign of life, by so much."""


def launch_on_ray(
    action: str,
    payload: dict[str, Any],
    run: RunSection,
    name: str,
    address: str | None,
    stacks: str | None,
    show: Callable[[dict[str, Any]], None],
    stop: StopRequest,
    alive: Callable[[], None],
) -> dict[str, Any]:
    """`launch.launch` on a local Ray of our own, or on the cluster at `address`.

    `stacks`: URL of a folder for the stacks of workers that hang; None: they are part of what is shown.
    """
    cuda = run.device == "cuda"
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A report waits for the controller's next look, by default every 2 s.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # Ray's own advice on environment variables and deprecations is for its developers.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if cuda:
        # Ray asks NCCL itself which ranks have stopped in the middle of a collective, before it times out.
        os.environ.setdefault("RAY_TRAIN_ENABLE_NCCL_HANG_DETECTOR", "1")
        os.environ.setdefault("RAY_TRAIN_NCCL_RAS_ACTION", "fail")
        # Before the watchdogs, which know no more than that nothing goes on.
        os.environ.setdefault("RAY_TRAIN_NCCL_RAS_CONFIRM_DURATION_S", str(run.step_timeout_s / 2))
    if address is None:
        # A local Ray listens on every interface; without a token anyone could join it and run code. Ray reads
        # these two when it is imported.
        assert "ray" not in sys.modules
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        # Nobody takes away the one node of a Ray of our own.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        # At Ray's own 15 of 19 little room is left behind a worker, for its threads that let it go first.
        os.environ.setdefault("RAY_worker_niceness", str(LAST - CHECKPOINTS))
    with uncollected():
        import ray

    few, many = run.fewest_workers, run.most_workers
    count = f"{many}" if few == many else f"{few} to {many}"
    show({"kind": "log", "text": f"starting {count} Ray Train worker(s)"})
    with (
        # What Ray tells the driver of a worker that died it prints, and stdout is for the command's result.
        redirect_stdout(sys.stderr),
        _ray_session(ray, run, address),
        tempfile.TemporaryDirectory(prefix="mtlrec-ray-") as scratch,
    ):
        with uncollected():
            import ray.train
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

            from mtlrec.ray_group import Group
            from mtlrec.ray_trainer import Trainer

        for logger in ("ray", "ray.train"):
            logging.getLogger(logger).setLevel(logging.ERROR)
        # Each worker waits in one call for news of a hang, while it makes others.
        placed: dict[str, Any] = {
            "max_concurrency": 2 * MAX_WORKERS,
            # Beside the driver: on another node it would be lost, with what it holds, when that node is. What
            # is soft, Ray often does not heed.
            "scheduling_strategy": NodeAffinitySchedulingStrategy(
                ray.get_runtime_context().get_node_id(), soft=False
            ),
        }
        board = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, **placed)(Board).remote()
        stop.listen_again()
        config = {
            "action": action,
            "payload": payload,
            "board": board,
            "device": run.device,
            "threads": run.threads,
            "limit_s": run.step_timeout_s,
            "stacks": stacks,
        }
        trainer = Trainer(
            work,  # what rank 0 returns is the result's return_value
            own_ray=address is None,
            train_loop_config=config,
            backend_config=Group(
                backends="cpu:gloo,cuda:nccl" if cuda else "gloo",
                # The watchdogs come first: a worker whose collective times out takes the others with it, and
                # the one that it waits for must have written its stacks by then.
                timeout_s=TIMEOUT_FACTOR * run.step_timeout_s + 2 * DUMP_S,
            ),
            scaling_config=ray.train.ScalingConfig(
                num_workers=few if few == many else (few, many),  # type: ignore[arg-type]
                use_gpu=cuda,
                resources_per_worker={"CPU": run.threads, "GPU": 1} if cuda else {"CPU": run.threads},
            ),
            run_config=_run_config(action, run, name, scratch),
        )
        if action == "train":
            # Elastic workers are reserved under this id, and what a killed driver had reserved is held
            # for three minutes: the next driver of the run takes it over by having the same.
            run_id = hashlib.blake2b(payload["url"].encode(), digest_size=16).hexdigest()
            context = getattr(trainer, "train_run_context")  # noqa: B009 - Ray's types show another class
            object.__setattr__(context, "run_id", run_id)
        return _follow(ray, trainer, board, run, show, stop, alive)


def _run_config(action: str, run: RunSection, name: str, scratch: str) -> Any:
    import ray.train

    threads = str(run.threads)
    common: dict[str, Any] = {
        "worker_runtime_env": {"env_vars": {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}},
        "logging_config": ray.train.LoggingConfig(log_level="ERROR"),
    }
    if action != "train":
        return ray.train.RunConfig(name=name, storage_path=scratch, **common)
    # Ray's memory of an earlier attempt names checkpoints that retention has removed since, and would refuse
    # to start; what is resumed is decided from the run's own folder.
    with suppress(FileNotFoundError):
        storage.remove(storage.join(run.storage, name, "checkpoint_manager_snapshot.json"))
    path, filesystem = arrow_place(run.storage)
    return ray.train.RunConfig(
        name=name,
        storage_path=path,
        storage_filesystem=filesystem,
        failure_config=ray.train.FailureConfig(
            max_failures=-1 if run.max_failures is None else run.max_failures,
            # Ray's types show the class that this one takes the place of.
            max_preemption_failures=-1 if run.max_preemptions is None else run.max_preemptions,  # type: ignore[call-arg]
        ),
        **common,
    )


@contextmanager
def _ray_session(ray: Any, run: RunSection, address: str | None) -> Iterator[None]:
    """A Ray of our own that ends with us, closed to strangers; or the user's cluster at `address`."""
    if address is None:
        _leave_out_servants()
        # More workers than cores are slow, not wrong, on one's own machine.
        options: dict[str, Any] = {
            "address": "local",
            "include_dashboard": False,
            "num_cpus": max(os.cpu_count() or 1, run.most_workers * run.threads),
            "object_store_memory": 256 * 2**20,
        }
    else:
        options = {"address": address}
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, configure_logging=False, **options)
    except (ConnectionError, TimeoutError, ValueError, RuntimeError) as error:
        if address is None:
            raise
        raise InputError(f"--address {address}: no Ray cluster answers there ({first_line(error)})") from None
    try:
        short = _short_of(ray, run)
        if short is not None:
            raise InputError(f"run.workers: {short}; use fewer workers or a larger cluster")
        yield
    finally:
        ray.shutdown()


def _leave_out_servants() -> None:
    """Of a Ray of our own nobody looks at pages, nor is sent what processes log.

    Ray starts the server of its pages also with `include_dashboard=False`, and waits for it; it goes on
    without, as where that fails to start. The reader of logs looks through all of them ten times a second.
    """
    from ray._private.node import Node

    for name in ("start_api_server", "start_log_monitor"):
        setattr(Node, name, lambda node, **options: None)


def _short_of(ray: Any, run: RunSection) -> str | None:
    """What the cluster lacks for the fewest workers that may start; None where it has room."""
    found, few = ray.cluster_resources(), run.fewest_workers
    for resource, wanted in (("CPU", few * run.threads), ("GPU", few if run.device == "cuda" else 0)):
        has = found.get(resource, 0)
        if has < wanted:
            return f"{few} worker(s) need {wanted} {resource}s, and the cluster has {has:g}"
    return None


def _follow(
    ray: Any,
    trainer: Any,
    board: Any,
    run: RunSection,
    show: Callable[[dict[str, Any]], None],
    stop: StopRequest,
    alive: Callable[[], None],
) -> dict[str, Any]:
    """Wait for the workers' end, passing on what they show and what the user asks."""
    outcome: dict[str, Any] = {}

    def fit() -> None:
        try:
            outcome["result"] = trainer.fit()
        except BaseException as error:  # handed to the main thread, whatever it is
            outcome["error"] = error

    # fit() in the main thread would take SIGINT for itself and abort without a checkpoint.
    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    thread.start()

    unanswered = RuntimeError(
        f"the Ray cluster has not answered for {run.step_timeout_s:g} s; the last checkpoint stands"
    )

    def pass_on() -> None:
        try:
            # It lies beside the driver and waits for nobody.
            drained = ray.get(board.drain.remote(stop.asked), timeout=run.step_timeout_s)
        except ray.exceptions.GetTimeoutError:
            raise unanswered from None
        _pass_on(drained, show)

    room, said_at = _Room(lambda: _short_of(ray, run)), 0.0
    while thread.is_alive():
        alive()
        now = time.monotonic()
        if now - room.looked_at >= run.step_timeout_s:
            raise unanswered
        if (short := room.short) is not None:
            if stop.asked:
                # No worker is left that could hear it, nor anything that could be saved.
                raise KeyboardInterrupt
            if now - said_at >= SAY_S:
                # Ray waits for nodes without end, and without a word.
                said_at = now
                show({"kind": "log", "text": f"waiting for nodes: {short}"})
        pass_on()
        thread.join(POLL_S)
    room.ended.set()
    pass_on()
    if "error" in outcome:
        raise RuntimeError(_cause(outcome["error"])) from outcome["error"]
    result: dict[str, Any] = outcome["result"].return_value
    return result


class _Room:
    """What the cluster lacks, asked for again and again in a thread: a head that hangs gives no answer."""

    def __init__(self, ask: Callable[[], str | None]) -> None:
        self.short: str | None = None
        self.looked_at = time.monotonic()
        """When the head last answered."""
        self.ended = threading.Event()
        self._ask = ask
        threading.Thread(target=self._keep, name="room", daemon=True).start()

    def _keep(self) -> None:
        while not self.ended.wait(ROOM_S):
            # A head that refuses is told by its silence.
            with suppress(Exception):
                self.short = self._ask()
                self.looked_at = time.monotonic()


def _pass_on(
    drained: tuple[list[dict[str, Any]], Ending | None], show: Callable[[dict[str, Any]], None]
) -> None:
    events, ending = drained
    for event in events:
        show(event)
    if ending is not None:
        kind, message = ending
        raise InputError(message) if kind == INPUT else FinalFailure(message)


def _cause(error: BaseException) -> str:
    """The worker's own last words, out of Ray's wrapping."""
    failures = getattr(error, "worker_failures", None) or {}
    for rank, failure in sorted(failures.items()):
        lines = [line for line in str(failure).splitlines() if line.strip()]
        return f"worker {rank} failed: {lines[-1].strip() if lines else repr(failure)}"
    return first_line(error)
