"""What runs inside a Ray Train worker."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import Any

from mtlrec import storage, watchdog
from mtlrec.importing import uncollected
from mtlrec.job.errors import FinalFailure, InputError
from mtlrec.ray_board import FINAL, INPUT

POLL_S = 0.25
"""Seconds between two looks of the driver at what its workers have shown."""
DUMP_S = 5.0
"""Seconds that a worker which has hung leaves the others to write their stacks, before it ends."""
NOTICED_S = 10.0
"""Seconds that Ray gets to see that the time of a node has come which was announced."""


class RayControl:
    """A worker's `Control`: to the board, and to Ray Train."""

    def __init__(self, board: Any, rank: int) -> None:
        self._board, self._rank = board, rank
        self._answer: Any = None
        self._asked_at = 0.0
        self._notice: Any = None

    def show(self, event: dict[str, Any]) -> None:
        watchdog.alive(str(event.get("what", event["kind"])))
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
            found = ray.train.Checkpoint(arrow_place(checkpoint)[0], filesystem)
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
        """Yes once for every notice that nodes of ours are about to be taken away, with all that it names."""
        if self._rank > 0:
            return False
        notice = _preemption_notice()
        if notice is None or notice == self._notice:
            return False
        self._notice = notice
        nodes, deadline_ms = notice
        left = f" in {max(deadline_ms / 1000 - time.time(), 0):.0f} s" if deadline_ms else ""
        text = f"{len(nodes)} node(s) of this run will be taken away{left}: saving at the next step"
        self._board.show.remote({"kind": "log", "text": text})
        return True


def _preemption_notice() -> tuple[tuple[str, ...], int | None] | None:
    """The nodes of this run that drain and when they end (ms since 1970), if Ray has been told of any.

    Ray's public `ray.train.get_preemption_info()` gives the same, but is a barrier of all workers: far too
    dear for every step. What it would agree on lies in the worker already.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    info = get_train_context().preemption_context.preemption_info
    return None if info is None else (tuple(info.preempted_node_ids), info.deadline_ms)


def work(config: dict[str, Any]) -> dict[str, Any]:
    """What every Ray Train worker runs.

    An input error, or a failure that would only repeat, is told to the driver, which ends all workers:
    raised, it would be retried, and the other workers may be waiting for this one in a collective.
    """
    import ray

    with uncollected():
        import torch

        from mtlrec import actions, distributed

    torch.set_num_threads(config["threads"])
    world = distributed.this_world(config["device"])
    board = config["board"]
    control = RayControl(board, world.rank)
    dog = watchdog.Watchdog(config["limit_s"], world.rank, config["stacks"])

    def hung(text: str) -> None:
        try:
            ray.get(board.say_hung.remote(text), timeout=DUMP_S)
        finally:
            dog.ended.wait(DUMP_S)

    try:
        with dog.watching(hung):
            _dump_when_called(board, dog)
            return actions.perform(config["action"], config["payload"], world, control)
    except (InputError, FinalFailure) as error:
        kind = INPUT if isinstance(error, InputError) else FINAL
        ray.get(board.end.remote(kind, str(error)))
        return {}
    except Exception as error:
        # Ray restarts the workers; a person should know why.
        text = f"worker {world.rank} failed: {type(error).__name__}: {first_line(error)}"
        board.show.remote({"kind": "log", "text": text})
        if _preemption_notice() is not None:
            # Most likely another worker has gone with its node, as announced. Told of this before it misses
            # that one, Ray would count a failure.
            time.sleep(NOTICED_S)
        raise


def _dump_when_called(board: Any, dog: watchdog.Watchdog) -> None:
    """Write this worker's stacks too when another one has hung, and so waits for us or makes us wait."""
    import ray

    call = board.hung.remote()

    def wait() -> None:
        with suppress(Exception):  # the board ends with the run
            asked = call
            while not ray.get(asked):
                asked = board.hung.remote()
            dog.dump()

    threading.Thread(target=wait, name="hung-elsewhere", daemon=True).start()


def arrow_place(url: str) -> tuple[str, Any]:
    """(path, pyarrow filesystem) of a URL, through the same fsspec filesystem that everything else uses."""
    import pyarrow.fs

    local = storage.local_path(url)
    if local is not None:
        return str(local), pyarrow.fs.LocalFileSystem()
    filesystem, path = storage.resolve(url)
    return path, pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem))


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
