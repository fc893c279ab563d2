"""Runs an action (train, evaluate, predict) on workers: in this process, or on Ray Train."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

from mtlrec import storage, watchdog
from mtlrec.importing import uncollected
from mtlrec.job.errors import InputError
from mtlrec.job.run import RunSection
from mtlrec.stopping import StopRequest

CONNECT_S = 5.0
"""Seconds in which a cluster must accept a connection."""
GRACE_S = 30.0
"""Seconds that a process which has hung gets to end by itself."""


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
    last_words: Callable[[str], object],
) -> dict[str, Any]:
    """Perform `actions.ACTIONS[action]` with `payload` (plain data) on `run.workers` workers.

    `show` is given the workers' events; `alive` is called again and again and may raise to end everything.
    `last_words` is called, in another thread, where this process has hung and is ended without returning.
    Returns rank 0's result. Raises InputError for what the user can correct, RuntimeError for faults.
    """
    # Where the stacks of a worker that hangs are written: a run has a folder of its own, other actions none.
    stacks = storage.join(payload["url"], watchdog.FOLDER) if action == "train" else None
    if run.workers != 0:
        from mtlrec.ray_driver import launch_on_ray

        return launch_on_ray(action, payload, run, name, address, stacks, show, stop, alive)

    with uncollected():
        import torch

        from mtlrec import actions, distributed

    def hung(text: str) -> None:
        stop.fail(text)
        if not dog.ended.wait(GRACE_S):
            last_words(text)
            os._exit(watchdog.EXIT)  # nothing may be said after them

    torch.set_num_threads(run.threads)
    dog = watchdog.Watchdog(run.step_timeout_s, 0, stacks)
    with dog.watching(hung):
        world = distributed.init_single_process(run.step_timeout_s, run.device)
        try:
            return actions.perform(action, payload, world, _DirectControl(show, stop, alive))
        finally:
            distributed.shut_down()


class _DirectControl:
    def __init__(
        self, show: Callable[[dict[str, Any]], None], stop: StopRequest, alive: Callable[[], None]
    ) -> None:
        self._show, self._stop, self._alive = show, stop, alive

    def show(self, event: dict[str, Any]) -> None:
        watchdog.alive(str(event.get("what", event["kind"])))
        self._show(event)

    def report(self, metrics: dict[str, float], checkpoint: str) -> None:
        del metrics, checkpoint

    def should_stop(self) -> bool:
        self._alive()
        return self._stop.asked

    def should_save(self) -> bool:
        return False


def check_address(address: str | None) -> None:
    """InputError where nothing listens at `address` (host:port); Ray itself would try for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"--address {address}: no Ray cluster answers there ({error})") from None
