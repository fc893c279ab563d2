"""The process group, and the few exchanges between workers that everyone uses.

Words travel as tensors of bytes, never as pickled objects.
"""

from __future__ import annotations

import datetime
import hashlib
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from mtlrec import watchdog
from mtlrec.quiet import quiet_libraries


@dataclass(frozen=True)
class World:
    """This worker's place among all."""

    rank: int
    world_size: int
    local_rank: int
    """Rank among the workers of this machine."""
    local_world_size: int
    """Workers on this machine; 1 where machines carry unequal numbers of workers."""
    device: torch.device


def init_single_process(timeout: float, device: str = "cpu") -> World:
    """Make this process a world of its own, through the same code as many workers.

    `timeout`: seconds after which a collective fails. `device`: "cpu" or "cuda".
    """
    dist.init_process_group(
        backends(device),
        store=dist.HashStore(),
        rank=0,
        world_size=1,
        timeout=datetime.timedelta(seconds=timeout),
    )
    return this_world(device)


def backends(device: str) -> str:
    """Backends of the process group for workers on `device`. Gloo always: small exchanges stay on the CPU."""
    return "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"


def this_world(device: str) -> World:
    """This worker's place in the process group that was initialised. A collective: every rank calls it.

    `device`: "cpu" or "cuda"; a worker on CUDA takes the device of its local rank.
    """
    quiet_libraries()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    alone = World(rank, world_size, 0, 1, torch.device("cpu"))
    if device == "cuda" and not _carries_cpu():
        # Only until the local rank is known: NCCL has to meet on some device of this worker's own.
        alone = World(rank, world_size, 0, 1, torch.device("cuda", torch.cuda.current_device()))
    hosts = all_gather_bytes(_host(), alone)
    local_rank = hosts[:rank].count(hosts[rank])
    even = len({hosts.count(host) for host in hosts}) == 1
    place = torch.device("cpu")
    if device == "cuda":
        # A launcher that hides all devices but this worker's leaves one that every local rank calls 0.
        place = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(place)
    return World(rank, world_size, local_rank, hosts.count(hosts[rank]) if even else 1, place)


def shut_down() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce_sum(tensor: torch.Tensor, world: World) -> torch.Tensor:
    """Sum of `tensor` over all ranks, on its own device; the tensor itself is left as it was."""
    if world.world_size == 1:
        return tensor.clone()
    total = _to_wire(tensor.detach().clone(), world)
    dist.all_reduce(total)
    return total.to(tensor.device)


def all_gather_bytes(data: bytes, world: World) -> list[bytes]:
    """Each rank's `data`, in rank order, on every rank. Holds world size x the longest."""
    if world.world_size == 1:
        return [data]
    sizes = _sizes(data, world)
    mine = _padded(data, max(sizes), world)
    parts = [torch.empty_like(mine) for _ in sizes]
    dist.all_gather(parts, mine)
    return _cut(parts, sizes)


def gather_bytes(data: bytes, world: World) -> list[bytes] | None:
    """Each rank's `data`, in rank order, on rank 0; None elsewhere. Rank 0 holds world size x the longest."""
    if world.world_size == 1:
        return [data]
    sizes = _sizes(data, world)
    mine = _padded(data, max(sizes), world)
    parts = [torch.empty_like(mine) for _ in sizes] if world.rank == 0 else None
    dist.gather(mine, parts)
    return _cut(parts, sizes) if parts is not None else None


def combine_bytes(give: Callable[[], bytes], take: Callable[[bytes], None], world: World) -> bool:
    """Bring together on rank 0 what the ranks have, two by two; True there, False elsewhere.

    give: what this rank has, and has been given, for another; take: adds another's to it. A rank holds one
    other's at a time, and after log2(world size) rounds all is on rank 0. A collective.
    """
    distance = 1
    while distance < world.world_size:
        if world.rank % (2 * distance):
            _send(give(), world.rank - distance, world)
            return False
        if world.rank + distance < world.world_size:
            take(_receive(world.rank + distance, world))
        distance *= 2
    return True


def broadcast_bytes(data: bytes | None, world: World) -> bytes:
    """Rank 0's `data` on every rank; what others hand in is not looked at."""
    if world.world_size == 1:
        assert data is not None
        return data
    assert data is not None or world.rank > 0
    mine = data if data is not None and world.rank == 0 else b""
    size = max(_sizes(mine, world))
    buffer = _padded(mine, size, world)
    dist.broadcast(buffer, src=0)
    return _cut([buffer], [size])[0]


def all_ok(error: str | None, world: World) -> list[str]:
    """The errors of all ranks that have one, in rank order; empty where all went well. Also a barrier.

    Every rank learns of a failure on any, so that all stop together instead of waiting for one that left.
    """
    words = all_gather_bytes(b"" if error is None else b"!" + error.encode(), world)
    return [word[1:].decode() for word in words if word]


def _host() -> bytes:
    """Tells machines apart, and containers on one machine, which have memory of their own."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    started = boot.read_text().strip() if boot.exists() else ""
    return hashlib.blake2b(f"{socket.gethostname()}|{started}".encode(), digest_size=16).digest()


def _to_wire(tensor: torch.Tensor, world: World) -> torch.Tensor:
    """`tensor` where the process group can carry it: NCCL alone carries nothing that is on the CPU."""
    return tensor if _carries_cpu() else tensor.to(world.device)


def _carries_cpu() -> bool:
    return "cpu:" in dist.get_backend_config()


def _sizes(data: bytes, world: World) -> list[int]:
    # All exchanges of words come by here, and once this is done all ranks have.
    size = _to_wire(torch.tensor([len(data)]), world)
    sizes = [torch.empty_like(size) for _ in range(world.world_size)]
    dist.all_gather(sizes, size)
    watchdog.alive("an exchange between workers")
    return [int(each) for each in sizes]


def _send(data: bytes, to: int, world: World) -> None:
    dist.send(_to_wire(torch.tensor([len(data)]), world), to)
    dist.send(_padded(data, len(data), world), to)


def _receive(source: int, world: World) -> bytes:
    size = _to_wire(torch.empty(1, dtype=torch.int64), world)
    dist.recv(size, source)
    buffer = _to_wire(torch.empty(max(int(size), 1), dtype=torch.uint8), world)
    dist.recv(buffer, source)
    watchdog.alive("an exchange between workers")
    return _cut([buffer], [int(size)])[0]


def _padded(data: bytes, size: int, world: World) -> torch.Tensor:
    # One byte at least: collectives on empty tensors are not equally supported everywhere.
    buffer = torch.frombuffer(bytearray(data.ljust(max(size, 1), b"\0")), dtype=torch.uint8)
    return _to_wire(buffer, world)


def _cut(parts: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[bytes]:
    return [part[:size].cpu().numpy().tobytes() for part, size in zip(parts, sizes, strict=True)]
