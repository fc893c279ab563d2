"""Priors, and means and deviations of targets: against plain numpy over the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mtlrec.data.label_statistics import measure_labels, needs_measuring
from mtlrec.job.errors import InputError
from mtlrec.job.job import Job, job_from_dict


def job_of(data: Path, tasks: dict[str, Any], weight: str | None = None, **changes: Any) -> Job:
    raw: dict[str, Any] = {
        "name": "labels",
        "schema": {
            "user": "user",
            "item": "item",
            "weight": weight,
            "features": {"user": {"kind": "id", "rows": 4}, "item": {"kind": "id", "rows": 4}},
            "tasks": tasks,
        },
        "data": {"train": str(data), **changes},
    }
    return job_from_dict(raw, "test")


@pytest.fixture(scope="module")
def rows() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    click = (random.random(999) < 0.3).astype(float)
    click[random.random(999) < 0.1] = np.nan
    buy = (random.random(999) < 0.5).astype(float)
    stars = random.normal(1e4, 2.0, 999)
    stars[random.random(999) < 0.2] = np.nan
    ids = random.integers(0, 9, (2, 999))
    return {
        "user": ids[0], "item": ids[1], "click": click, "buy": buy, "stars": stars,
        "trust": random.lognormal(0, 1, 999), "never": np.full(999, np.nan), "same": np.full(999, 0.1),
        "yes": np.ones(999),
    }  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, rows: dict[str, np.ndarray]) -> Path:
    folder = tmp_path_factory.mktemp("labels")
    table = pa.table({name: pa.array(values, from_pandas=True) for name, values in rows.items()})
    pq.write_table(table.slice(0, 400), folder / "a.parquet", row_group_size=77)
    pq.write_table(table.slice(400), folder / "b.parquet", row_group_size=300)
    return folder


TASKS: dict[str, Any] = {
    "click": {"kind": "binary"},
    "buy": {"kind": "binary", "given": "click"},
    "stars": {"kind": "regression", "given": "buy"},
}


@pytest.mark.parametrize("weight", [None, "trust"])
def test_priors_and_moments_are_those_of_the_rows(
    data: Path, rows: dict[str, np.ndarray], weight: str | None
) -> None:
    job = job_of(data, TASKS, weight)
    assert needs_measuring(job.schema_)
    seen: list[tuple[int, int]] = []
    section = measure_labels(job, lambda done, total: seen.append((done, total)))
    assert not needs_measuring(section) and seen[-1] == (999, 999)
    by = rows[weight].astype(np.float32).astype(float) if weight else np.ones(999)
    clicked = rows["click"] == 1
    rated = clicked & (rows["buy"] == 1) & ~np.isnan(rows["stars"])
    tasks = section.model_dump()["tasks"]
    here = ~np.isnan(rows["click"])
    assert tasks["click"]["prior"] == pytest.approx(np.average(rows["click"][here], weights=by[here]))
    assert tasks["buy"]["prior"] == pytest.approx(np.average(rows["buy"][clicked], weights=by[clicked]))
    stars = rows["stars"].astype(np.float32).astype(float)[rated]
    mean = np.average(stars, weights=by[rated])
    assert tasks["stars"]["mean"] == pytest.approx(mean)
    variance = np.average((stars - mean) ** 2, weights=by[rated])
    assert tasks["stars"]["std"] == pytest.approx(variance**0.5, rel=1e-6)


def test_negatives_count_towards_the_prior_of_their_task(data: Path, rows: dict[str, np.ndarray]) -> None:
    job = job_of(data, TASKS, negatives={"task": "click", "per_positive": 3})
    tasks = measure_labels(job).model_dump()["tasks"]
    positives, labels = np.nansum(rows["click"]), np.isfinite(rows["click"]).sum()
    assert tasks["click"]["prior"] == pytest.approx(positives / (labels + 3 * positives))


def test_labels_of_one_value_and_none_at_all_leave_finite_numbers(data: Path) -> None:
    tasks = {
        "never": {"kind": "binary"},
        "yes": {"kind": "binary"},
        "same": {"kind": "regression"},
        "gone": {"kind": "regression", "label": "never"},
    }
    found = measure_labels(job_of(data, tasks)).model_dump()["tasks"]
    assert found["never"]["prior"] == 0.5
    assert found["yes"]["prior"] == pytest.approx(1 - 0.5 / 1000)
    assert found["same"]["mean"] == pytest.approx(0.1) and found["same"]["std"] == 1.0
    assert (found["gone"]["mean"], found["gone"]["std"]) == (0.0, 1.0)


def test_a_prior_does_not_depend_on_the_scale_of_weights(data: Path, rows: dict[str, np.ndarray]) -> None:
    table = pq.read_table(data)
    small = data.parent / f"{data.name}-light"
    small.mkdir()
    light = pa.array(table["trust"].to_numpy() * 1e-6)
    pq.write_table(
        table.set_column(table.schema.get_field_index("trust"), "trust", light), small / "a.parquet"
    )
    heavy, found = (
        measure_labels(job_of(folder, TASKS, "trust")).model_dump()["tasks"]["click"]["prior"]
        for folder in (data, small)
    )
    assert found == pytest.approx(heavy, rel=1e-5)


def test_what_is_given_stays(data: Path) -> None:
    tasks = {
        "click": {"kind": "binary", "prior": 0.25},
        "stars": {"kind": "regression", "mean": 1.0, "std": 2.0},
    }
    job = job_of(data, tasks)
    assert not needs_measuring(job.schema_)
    assert measure_labels(job) == job.schema_


def test_a_label_that_may_not_be_is_named(data: Path) -> None:
    with pytest.raises(InputError, match=r"a\.parquet, row group 0, row \d+, column stars: .* binary task"):
        measure_labels(job_of(data, {"stars": {"kind": "binary"}}))
