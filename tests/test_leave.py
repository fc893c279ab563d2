"""A process ends with its own exit code, whatever the process group's threads are doing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Rank 0 gives up the interpreter to nobody from before the collective's end until it is taken down: the
# thread of gloo that has done the collective then waits for it to let go of the tensor.
SCRIPT = """
import os, sys, time
import torch
import torch.distributed as dist
from mtlrec.commands.console import leave

peer = os.fork()
rank = 0 if peer else 1
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1], 2), rank=rank, world_size=2)
group = dist.group.WORLD
dist.barrier()
if rank == 1:
    time.sleep(0.2)
    dist.all_reduce(torch.ones(4))
    os._exit(0)
sys.setswitchinterval(60)
dist.all_reduce(torch.ones(4), async_op=True)
end = time.monotonic() + 2
while time.monotonic() < end:
    pass
print("done")
{end}
"""


def run(tmp_path: Path, end: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.format(end=end), str(tmp_path / "store")],
        cwd=ROOT,
        env={"PATH": "", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_thread_of_gloo_that_still_holds_a_tensor_does_not_abort_the_process(tmp_path: Path) -> None:
    done = run(tmp_path, "leave(3)")
    assert (done.returncode, done.stdout) == (3, "done\n"), done.stderr
