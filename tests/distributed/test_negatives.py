"""The index that negatives are drawn from is the same on every worker, for any number of workers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from mtlrec.distributed import World
from tests.data.interactions import make_table, write
from tests.distributed.indexing import build
from tests.distributed.processes import run_processes

pytestmark = pytest.mark.distributed


def test_one_and_three_workers_build_the_same_index(tmp_path: Path) -> None:
    whole = make_table(500)
    # Two row groups: one of the three has nothing to read.
    urls = [
        write(tmp_path / "many", whole).url,
        write(tmp_path / "two", whole.slice(0, 60), group=30, files=1).url,
    ]
    click = pa.array([None] * 499 + [3])
    wrong = whole.set_column(whole.column_names.index("click"), "click", click)
    bad = write(tmp_path / "bad", wrong).url
    alone = build(World(0, 1, 0, 1, torch.device("cpu")), urls, bad)
    ranks = run_processes("tests.distributed.indexing:build", 3, tmp_path / "run", {"urls": urls, "bad": bad})
    assert "column click: 3.0 is not a label" in alone["error"]
    for found in ranks:
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)
            if isinstance(value, np.ndarray):
                assert found[name].dtype == value.dtype
