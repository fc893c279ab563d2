"""Runs an action (train, evaluate, predict) on workers: in this process, or on Ray Train."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any

from mtlrec import storage
from mtlrec.job.errors import InputError
from mtlrec.job.run import RunSection
from mtlrec.stopping import StopRequest

CONNECT_S = 5.0
"""Seconds in which a cluster must accept a connection."""
POLL_S = 0.25
"""Seconds between two looks of the driver at what its workers have shown."""


def launch(
    action: str,
    payload: dict[str, Any],
    run: RunSection,
    *,
    name: str,
    address: str | None,
    show: Callable[[dict[str, Any]], None],
    stop: StopRequest,
    alive: Callable[[], None],
) -> dict[str, Any]:
    """Perform `actions.ACTIONS[action]` with `payload` (plain data) on `run.workers` workers.

    `show` is given the workers' events; `alive` is called again and again and may raise to end everything.
    Returns rank 0's result. Raises InputError for what the user can correct, RuntimeError for faults.
    """
    if run.workers == 0:
        import torch

        from mtlrec import actions, distributed

        torch.set_num_threads(run.threads)
        world = distributed.init_single_process(run.step_timeout_s, run.device)
        try:
            return actions.perform(action, payload, world, _DirectControl(show, stop, alive))
        finally:
            distributed.shut_down()
    return _launch_on_ray(action, payload, run, name, address, show, stop, alive)


class _DirectControl:
    def __init__(
        self, show: Callable[[dict[str, Any]], None], stop: StopRequest, alive: Callable[[], None]
    ) -> None:
        self._show, self._stop, self._alive = show, stop, alive

    def show(self, event: dict[str, Any]) -> None:
        self._show(event)

    def report(self, metrics: dict[str, float], checkpoint: str) -> None:
        del metrics, checkpoint

    def should_stop(self) -> bool:
        self._alive()
        return self._stop.asked

    def should_save(self) -> bool:
        return False


class _Board:
    """An actor between the workers and the driver: events one way, the stop request the other."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._refused: str | None = None
        self._stop = False

    def show(self, event: dict[str, Any]) -> None:
        self._events.append(event)

    def refuse(self, message: str) -> None:
        self._refused = self._refused or message

    def drain(self, stop: bool) -> tuple[list[dict[str, Any]], str | None]:
        """The events since the last call, and the input error that a worker met, if one did."""
        self._stop = self._stop or stop
        events, self._events = self._events, []
        return events, self._refused

    def stop_asked(self) -> bool:
        return self._stop


class _RayControl:
    def __init__(self, board: Any, rank: int) -> None:
        self._board, self._rank = board, rank
        self._answer: Any = None
        self._asked_at = 0.0

    def show(self, event: dict[str, Any]) -> None:
        if self._rank == 0:
            self._board.show.remote(event)

    def report(self, metrics: dict[str, float], checkpoint: str) -> None:
        import ray.train

        # Ray is told where the finished folder lies and copies nothing: the manifest must come last, and
        # what is kept is decided in one place, ours.
        found = None
        if self._rank == 0:
            # Ray compares filesystems, and those of object storage are equal only to themselves.
            filesystem = ray.train.get_context().get_storage().storage_filesystem
            found = ray.train.Checkpoint(_arrow_place(checkpoint)[0], filesystem)
        mode = ray.train.CheckpointUploadMode.NO_UPLOAD
        ray.train.report(metrics, checkpoint=found, checkpoint_upload_mode=mode)

    def should_stop(self) -> bool:
        """Never waits: looks whether the last question has been answered, and asks again now and then."""
        import ray

        if self._rank > 0:
            return False
        if self._answer is None and time.monotonic() - self._asked_at > 2 * POLL_S:
            self._asked_at, self._answer = time.monotonic(), self._board.stop_asked.remote()
        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            answer, self._answer = self._answer, None
            return bool(ray.get(answer))
        return False

    def should_save(self) -> bool:
        return False


def _work(config: dict[str, Any]) -> dict[str, Any]:
    """What every Ray Train worker runs.

    An input error is told to the driver, which ends all workers: raised, it would be retried, and the other
    workers may be waiting for this one in a collective.
    """
    import torch

    from mtlrec import actions, distributed

    torch.set_num_threads(config["threads"])
    world = distributed.this_world(config["device"])
    control = _RayControl(config["board"], world.rank)
    try:
        return actions.perform(config["action"], config["payload"], world, control)
    except InputError as error:
        import ray

        ray.get(config["board"].refuse.remote(str(error)))
        return {}
    except Exception as error:
        # Ray restarts the workers; a person should know why.
        text = f"worker {world.rank} failed: {type(error).__name__}: {_first_line(error)}"
        config["board"].show.remote({"kind": "log", "text": text})
        raise


def _launch_on_ray(
    action: str,
    payload: dict[str, Any],
    run: RunSection,
    name: str,
    address: str | None,
    show: Callable[[dict[str, Any]], None],
    stop: StopRequest,
    alive: Callable[[], None],
) -> dict[str, Any]:
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A report waits for the controller's next look, by default every 2 s.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # Ray's own advice on environment variables and deprecations is for its developers.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address is None:
        # A local Ray listens on every interface; without a token anyone could join it and run code. Ray reads
        # these two when it is imported.
        assert "ray" not in sys.modules
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    import ray

    show({"kind": "log", "text": f"starting {run.workers} Ray Train worker(s)"})
    with (
        # What Ray tells the driver of a worker that died it prints, and stdout is for the command's result.
        redirect_stdout(sys.stderr),
        _ray_session(ray, run, address),
        tempfile.TemporaryDirectory(prefix="mtlrec-ray-") as scratch,
    ):
        import ray.train
        from ray.train.torch import TorchConfig, TorchTrainer

        for logger in ("ray", "ray.train"):
            logging.getLogger(logger).setLevel(logging.ERROR)
        board = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Board).remote()
        stop.listen_again()
        config = {
            "action": action,
            "payload": payload,
            "board": board,
            "device": run.device,
            "threads": run.threads,
        }
        cuda = run.device == "cuda"
        trainer = TorchTrainer(
            _work,  # type: ignore[arg-type]  # what rank 0 returns is the result's return_value
            train_loop_config=config,
            torch_config=TorchConfig(
                backend="cpu:gloo,cuda:nccl" if cuda else "gloo", timeout_s=int(max(run.step_timeout_s, 1))
            ),
            scaling_config=ray.train.ScalingConfig(
                num_workers=run.workers,
                use_gpu=cuda,
                resources_per_worker={"CPU": run.threads, "GPU": 1} if cuda else {"CPU": run.threads},
            ),
            run_config=_run_config(action, run, name, scratch),
        )
        return _follow(ray, trainer, board, show, stop, alive)


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
    path, filesystem = _arrow_place(run.storage)
    return ray.train.RunConfig(
        name=name,
        storage_path=path,
        storage_filesystem=filesystem,
        failure_config=ray.train.FailureConfig(max_failures=run.max_failures),
        **common,
    )


def _arrow_place(url: str) -> tuple[str, Any]:
    """(path, pyarrow filesystem) of a URL, through the same fsspec filesystem that everything else uses."""
    import pyarrow.fs

    local = storage.local_path(url)
    if local is not None:
        return str(local), pyarrow.fs.LocalFileSystem()
    filesystem, path = storage.resolve(url)
    return path, pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem))


@contextmanager
def _ray_session(ray: Any, run: RunSection, address: str | None) -> Iterator[None]:
    """A Ray of our own that ends with us, closed to strangers; or the user's cluster at `address`."""
    cpus, gpus = run.workers * run.threads, run.workers if run.device == "cuda" else 0
    if address is None:
        # More workers than cores are slow, not wrong, on one's own machine.
        options: dict[str, Any] = {
            "address": "local",
            "include_dashboard": False,
            "num_cpus": max(os.cpu_count() or 1, cpus),
            "object_store_memory": 256 * 2**20,
        }
    else:
        options = {"address": address}
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, configure_logging=False, **options)
    except (ConnectionError, TimeoutError, ValueError, RuntimeError) as error:
        if address is None:
            raise
        raise InputError(
            f"--address {address}: no Ray cluster answers there ({_first_line(error)})"
        ) from None
    try:
        found = ray.cluster_resources()
        for resource, wanted in (("CPU", cpus), ("GPU", gpus)):
            if found.get(resource, 0) < wanted:
                raise InputError(
                    f"run.workers: {run.workers} worker(s) need {wanted} {resource}s, and the cluster has "
                    f"{found.get(resource, 0):g}; use fewer workers or a larger cluster"
                )
        yield
    finally:
        ray.shutdown()


def _follow(
    ray: Any,
    trainer: Any,
    board: Any,
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
    while thread.is_alive():
        alive()
        _pass_on(ray.get(board.drain.remote(stop.asked)), show)
        thread.join(POLL_S)
    _pass_on(ray.get(board.drain.remote(stop.asked)), show)
    if "error" in outcome:
        raise RuntimeError(_cause(outcome["error"])) from outcome["error"]
    result: dict[str, Any] = outcome["result"].return_value
    return result


def _pass_on(
    drained: tuple[list[dict[str, Any]], str | None], show: Callable[[dict[str, Any]], None]
) -> None:
    events, refused = drained
    for event in events:
        show(event)
    if refused is not None:
        raise InputError(refused)


def check_address(address: str | None) -> None:
    """InputError where nothing listens at `address` (host:port); Ray itself would try for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"--address {address}: no Ray cluster answers there ({error})") from None


def _cause(error: BaseException) -> str:
    """The worker's own last words, out of Ray's wrapping."""
    failures = getattr(error, "worker_failures", None) or {}
    for rank, failure in sorted(failures.items()):
        lines = [line for line in str(failure).splitlines() if line.strip()]
        return f"worker {rank} failed: {lines[-1].strip() if lines else repr(failure)}"
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
