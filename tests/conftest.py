"""What every test shares: bounded property tests, the same in every run of CI; the longest files first."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

# Before anything imports torch: many small products on many threads only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import HealthCheck, settings

from mtlrec import s3
from mtlrec.importing import uncollected
from mtlrec.job.storage import StorageSection
from tests.distributed.processes import forking

settings.register_profile(
    "mtlrec",
    deadline=None,  # a busy machine is no defect
    max_examples=50,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
settings.load_profile("mtlrec")


@pytest.fixture(scope="session", autouse=True)
def forked_ranks() -> Iterator[None]:
    """Tests with several processes do not wait for each of them to import torchrec."""
    with forking():
        yield


@pytest.fixture(autouse=True)
def as_if_new() -> Iterator[None]:
    """How object storage is reached holds for a process: what a command in a test has set must not stay."""
    yield
    s3.configure(StorageSection())


LONGEST = (
    "test_ray",
    "test_training",
    "test_everything",
    "test_chaos",
    "test_compare",
    "test_sharding",
    "test_checkpoint",
)
"""Files that take minutes: begun last, one would keep one process busy while the others have nothing left."""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Which imports everything, in every process that runs tests."""
    with uncollected():
        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def turn(item: pytest.Item) -> int:
        name = Path(item.path).stem
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=turn)  # stable: within a file and among the others nothing changes


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`--dist loadfile`, but for files whose tests start ranks: those all go to one process.

    Each process that forks ranks imports everything three times more (SERVERS): 24 s of processor time.
    """
    from xdist.scheduler import LoadFileScheduling

    @cache
    def starts_ranks(file: str) -> bool:
        return "benchmarks" in file or "run_processes" in (config.rootpath / file).read_text()

    class WholeFiles(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "ranks" if starts_ranks(file) else file

    return WholeFiles(config, log) if config.getoption("dist") == "loadfile" else None
