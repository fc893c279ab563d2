"""The process group of Ray Train's workers, set up without torch in the driver and in Ray's controller.

Ray's own `TorchConfig` comes from a module that imports torch: driver and controller would each spend seconds
on it, one after the other, before a worker is even asked for.
"""

from __future__ import annotations

import datetime
import os
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
from ray.train.backend import Backend, BackendConfig

from mtlrec.importing import uncollected

LEAVE_S = 30.0
"""Seconds that workers get to leave their group together."""


@dataclass
class Group(BackendConfig):
    """Tells Ray Train how its workers meet."""

    backends: str
    """As `torch.distributed.init_process_group` takes them."""
    timeout_s: float
    """After which a collective fails."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _Meeting


class _Meeting(Backend):
    """Runs in the controller."""

    share_cuda_visible_devices = True
    """NCCL connects the devices of one node only where each worker sees them all."""

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        address = worker_group.execute_single(0, _address)
        size = len(worker_group)
        ray.get(
            [
                worker_group.execute_single_async(rank, _join, backend_config, address, rank, size)
                for rank in range(size)
            ]
        )

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        del backend_config
        if len(worker_group) > 1:
            with suppress(ray.exceptions.GetTimeoutError):
                ray.get(worker_group.execute_async(_leave), timeout=LEAVE_S)


def _address() -> str:
    """Where the workers meet: a free port of rank 0's node."""
    from ray.train._internal.utils import get_address_and_port

    host, port = get_address_and_port()
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _join(group: Any, address: str, rank: int, size: int) -> None:
    """In a worker: meet the others."""
    with uncollected():
        import torch.distributed as dist

    context = ray.train.get_context()
    # What launchers of torch say, and libraries look for.
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        "NODE_RANK": str(context.get_node_rank()),
    }
    if "nccl" in group.backends:
        # A collective that fails ends the process, as under Ray's own TorchConfig.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    dist.init_process_group(
        group.backends,
        init_method=address,
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=group.timeout_s),
    )


def _leave() -> None:
    from mtlrec.distributed import shut_down

    shut_down()
