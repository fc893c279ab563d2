"""A Ray cluster of several nodes on this machine, each of which can be killed as a whole."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import psutil

RAY = Path(sys.executable).with_name("ray")
DEADLINE_S = 120.0

ALIVE = """
import sys, time
from ray._raylet import GcsClient
while True:
    nodes = GcsClient(address=sys.argv[1]).get_all_node_info().values()
    alive = [node for node in nodes if node.state == 0]
    if len(alive) == int(sys.argv[2]):
        break
    time.sleep(0.5)
for node in sorted(alive, key=lambda node: not node.is_head_node):
    print(node.node_id.hex())
"""
"""Prints the ids of the nodes, the head's first, once there are so many."""


class Node:
    """One `ray start --block`: a raylet and all that it starts, in processes below one of ours."""

    def __init__(self, arguments: list[str], environment: Mapping[str, str]) -> None:
        command = [str(RAY), "start", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1"]
        command += ["--object-store-memory=100000000", *arguments]
        quiet = subprocess.DEVNULL
        environment = {**os.environ, **environment}
        self.process = subprocess.Popen(command, env=environment, stdout=quiet, stderr=quiet)

    def processes(self) -> list[psutil.Process]:
        """All that live, the raylet and its workers among them."""
        with contextlib.suppress(psutil.NoSuchProcess):
            whole = psutil.Process(self.process.pid)
            return [whole, *whole.children(recursive=True)]
        return []

    def kill(self) -> None:
        """As a machine that loses its power: every process at once, by SIGKILL."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(60)


class Cluster:
    """A head and as many further nodes as asked for; all end with the `with` block.

    `address` and `environment` (the token) are what it takes to reach it.
    """

    def __init__(self, cpus: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        self.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            # A node that is gone is missed after 5 s instead of 15, and workers that were asked for there are
            # asked for again after 15 s instead of 60.
            "RAY_health_check_period_ms": "1000",
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
            # That a node will be taken away is known after 1 s instead of 5.
            "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
        }
        head = ["--head", f"--port={port}", f"--num-cpus={cpus}", "--include-dashboard=false"]
        self.nodes = [Node(head, self.environment)]

    def ids(self, count: int) -> list[str]:
        """The ids of the cluster's nodes, the head's first, once there are `count`."""
        done = subprocess.run(
            [sys.executable, "-c", ALIVE, self.address, str(count)],
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    def drain(self, node_id: str, seconds: int) -> None:
        """Tell the cluster that a node will be taken away in so many seconds; nobody takes it."""
        command = [str(RAY), "drain-node", f"--address={self.address}", f"--node-id={node_id}"]
        command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=test"]
        command += [f"--deadline-remaining-seconds={seconds}"]
        environment = {**os.environ, **self.environment}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE_S)
        assert done.returncode == 0, done.stdout + done.stderr

    def add(self, cpus: int) -> Node:
        """One more node; it takes seconds until it is there."""
        self.wait_for_head()
        node = Node([f"--address={self.address}", f"--num-cpus={cpus}"], self.environment)
        self.nodes.append(node)
        return node

    def wait_for_head(self) -> None:
        host, _, port = self.address.partition(":")
        deadline = time.monotonic() + DEADLINE_S
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection((host, int(port)), 1.0).close()
                return
            assert time.monotonic() < deadline, "the head of the cluster does not come up"
            time.sleep(0.2)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for node in reversed(self.nodes):
            node.kill()
