from __future__ import annotations

import subprocess
import sys

FAULTS = """
import resource, sys
import numpy as np
from mtlrec.heap import keep_freed_memory
kept = sys.argv[1] == "kept" and keep_freed_memory()
def step():
    for _ in range(4):
        held = [np.ones(2**20) for _ in range(4)]  # 8 MiB each
for _ in range(2):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_what_a_step_frees_is_there_for_the_next() -> None:
    faults = {
        mode: int(
            subprocess.run([sys.executable, "-c", FAULTS, mode], check=True, capture_output=True).stdout
        )
        for mode in ("plain", "kept")
    }
    assert faults["kept"] < 1000 < faults["plain"], faults
