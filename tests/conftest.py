"""What every test shares: property tests are bounded, and the same in every run of continuous integration."""

from __future__ import annotations

import os

# Before anything imports torch: many small products on many threads only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import HealthCheck, settings

settings.register_profile(
    "mtlrec",
    deadline=None,  # a busy machine is no defect
    max_examples=50,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
settings.load_profile("mtlrec")
