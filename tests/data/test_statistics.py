"""Means, deviations and quantiles that number features leave to the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtlrec.data import statistics
from mtlrec.data.statistics import measure, needs_measuring
from mtlrec.job.errors import InputError
from mtlrec.job.schema import NumberFeature, SchemaSection


def section(**features: dict[str, Any]) -> SchemaSection:
    numbers = {name: {"kind": "number", **feature} for name, feature in features.items()}
    body = {
        "features": {"user": {"kind": "id", "rows": 10}, **numbers},
        "tasks": {"click": {"kind": "binary"}},
    }
    return SchemaSection.model_validate(body)


def write(folder: Path, group_rows: int = 1000, shards: int = 1, **columns: Any) -> str:
    folder.mkdir(exist_ok=True)
    table = pa.table(columns)
    size = -(-table.num_rows // shards)
    for number in range(shards):
        pq.write_table(
            table.slice(number * size, size), folder / f"{number}.parquet", row_group_size=group_rows
        )
    return str(folder)


def feature(found: SchemaSection, name: str) -> NumberFeature:
    value = found.features[name]
    assert isinstance(value, NumberFeature)
    return value


def test_what_needs_measuring() -> None:
    assert not needs_measuring(section(a={}, b={"transform": "log1p"}))
    assert not needs_measuring(section(a={"transform": "standardise", "mean": 0.0, "std": 1.0}))
    assert not needs_measuring(section(a={"transform": "bucketise", "boundaries": [1.0]}))
    assert needs_measuring(section(a={}, b={"transform": "standardise"}))
    assert needs_measuring(section(a={"transform": "bucketise", "buckets": 4}))


SENSIBLE = st.floats(-1e6, 1e6).filter(lambda value: value == 0 or abs(value) > 1e-6)
"""Numbers whose squares do not vanish."""


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.one_of(st.none(), st.just(float("nan")), SENSIBLE), min_size=1, max_size=60).filter(
        lambda values: any(value is not None and value == value for value in values)
    ),
    st.integers(1, 20),
    st.integers(1, 3),
)
def test_mean_and_std_are_those_of_all_numbers(
    tmp_path: Path, values: list[float | None], group_rows: int, shards: int
) -> None:
    for old in tmp_path.glob("data/*"):
        old.unlink()
    url = write(tmp_path / "data", group_rows, shards, a=pa.array(values, pa.float64()))
    numbers = np.array([value for value in values if value is not None and value == value])
    found = feature(measure(url, section(a={"transform": "standardise"})), "a")
    assert found.mean == pytest.approx(numbers.mean(), rel=1e-9, abs=1e-9)
    expected = 1.0 if len(np.unique(numbers)) == 1 else numbers.std()
    assert found.std == pytest.approx(expected, rel=1e-6)


def test_a_large_offset_costs_no_precision(tmp_path: Path) -> None:
    values = 1.7e9 + np.random.default_rng(0).normal(0, 1, 20_000)
    url = write(tmp_path / "data", 700, 3, a=values)
    found = feature(measure(url, section(a={"transform": "standardise"})), "a")
    assert found.std == pytest.approx(values.std(), rel=1e-6)


def test_constant_columns(tmp_path: Path) -> None:
    url = write(tmp_path / "data", 3, 2, a=[0.1] * 20, b=[0.1] * 20)
    found = measure(url, section(a={"transform": "standardise"}, b={"transform": "bucketise", "buckets": 4}))
    assert (feature(found, "a").mean, feature(found, "a").std) == (0.1, 1.0)
    assert feature(found, "b").boundaries == [0.1]


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint64(), pa.float16(), pa.float32(), pa.bool_()])
def test_types(tmp_path: Path, kind: pa.DataType) -> None:
    url = write(tmp_path / "data", a=pa.array([0, 1, 1, None, 0, 0], pa.float64()).cast(kind))
    found = measure(url, section(a={"transform": "standardise"}))
    assert feature(found, "a").mean == pytest.approx(0.4)
    assert feature(found, "a").std == pytest.approx(np.sqrt(0.24))


def buckets(boundaries: list[float] | None, values: np.ndarray) -> np.ndarray:
    assert boundaries is not None
    return np.bincount(np.searchsorted(boundaries, values, side="right"), minlength=len(boundaries) + 1)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(-5, 5), min_size=1, max_size=80), st.integers(2, 12))
def test_boundaries_follow_the_contract(tmp_path: Path, values: list[int], wanted: int) -> None:
    """Increasing numbers of the column; every bucket is filled, where there are two numbers to tell apart."""
    for old in tmp_path.glob("data/*"):
        old.unlink()
    url = write(tmp_path / "data", 7, 1, a=values)
    found = feature(measure(url, section(a={"transform": "bucketise", "buckets": wanted})), "a")
    NumberFeature.model_validate(found.model_dump())
    boundaries = found.boundaries
    assert boundaries is not None
    assert 1 <= len(boundaries) < wanted
    assert set(boundaries) <= set(values)
    if len(set(values)) > 1:
        assert (buckets(boundaries, np.array(values)) > 0).all()


def test_distinct_numbers_fill_buckets_evenly(tmp_path: Path) -> None:
    values = np.random.default_rng(1).lognormal(size=10_007)
    url = write(tmp_path / "data", 900, 4, a=values)
    found = feature(measure(url, section(a={"transform": "bucketise", "buckets": 10})), "a")
    counts = buckets(found.boundaries, values)
    assert len(counts) == 10
    assert counts.min() >= 1000
    assert counts.max() <= 1001


def test_mostly_zero(tmp_path: Path) -> None:
    url = write(tmp_path / "data", a=[0.0] * 95 + [3.0, 7.0, 7.0, 8.0, 9.0])
    found = feature(measure(url, section(a={"transform": "bucketise", "buckets": 4})), "a")
    assert found.boundaries == [3.0]


def test_large_data_is_sampled_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "EXACT_ROWS", 1000)
    values = np.arange(10_000.0)
    url = write(tmp_path / "data", 100, 3, a=values, b=values)
    calls: list[tuple[int, int]] = []
    found = measure(
        url,
        section(a={"transform": "bucketise", "buckets": 4}, b={"transform": "standardise"}),
        lambda done, total: calls.append((done, total)),
    )
    boundaries = feature(found, "a").boundaries
    assert boundaries is not None
    assert np.abs(np.array(boundaries) - [2500, 5000, 7500]).max() < 600
    assert feature(found, "b").mean == pytest.approx(4999.5), "the mean is of all rows"
    assert calls[-1][0] == calls[-1][1]
    assert 10_000 + 900 <= calls[-1][1] <= 10_000 + 1100
    assert calls == sorted(calls)


def test_threads_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    many = {f"c{number}": rng.normal(size=3000) for number in range(20)}
    url = write(tmp_path / "data", 130, 3, a=rng.normal(size=3000), **many)
    wanted = section(
        a={"transform": "standardise"}, **{name: {"transform": "bucketise", "buckets": 7} for name in many}
    )
    once = measure(url, wanted)
    monkeypatch.setattr(statistics, "_THREADS", 1)
    monkeypatch.setattr(statistics, "_COLUMNS_AT_ONCE", 3)
    assert measure(url, wanted) == once
    assert not needs_measuring(once)


def test_only_what_is_wanting_is_filled(tmp_path: Path) -> None:
    url = write(tmp_path / "data", renamed=[1.0, 3.0])
    before = section(
        a={"transform": "standardise", "column": "renamed"},
        b={"transform": "standardise", "mean": 5.0, "std": 2.0},
        c={},
    )
    after = measure(url, before)
    assert (feature(after, "a").mean, feature(after, "a").std) == (2.0, 1.0)
    assert list(after.features) == list(before.features)
    for name in ("user", "b", "c"):
        assert after.features[name] == before.features[name]


def test_two_features_of_one_column(tmp_path: Path) -> None:
    url = write(tmp_path / "data", x=[1.0, 3.0, 5.0])
    both = {name: {"transform": "standardise", "column": "x"} for name in "ab"}
    after = measure(url, section(**both))
    assert feature(after, "a").mean == feature(after, "b").mean == 3.0


@pytest.mark.parametrize(
    "transform", [{"transform": "standardise"}, {"transform": "bucketise", "buckets": 3}]
)
def test_refusals(tmp_path: Path, transform: dict[str, Any]) -> None:
    wanted = section(a={**transform, "column": "x"})
    url = write(tmp_path / "inf", 2, 2, x=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, float("-inf"), 8.0])
    with pytest.raises(InputError) as raised:
        measure(url, wanted)
    assert str(raised.value).startswith(
        f"{url}/1.parquet: row group 1, row 0, column x: -inf is not a finite"
    )
    url = write(tmp_path / "null", x=pa.array([None, float("nan")], pa.float64()))
    with pytest.raises(InputError, match=r"column 'x' \(schema.features.a\) holds no number"):
        measure(url, wanted)
    url = write(tmp_path / "text", x=["1"])
    with pytest.raises(InputError, match=r"column 'x' .* has type string"):
        measure(url, wanted)


def test_numbers_too_large_for_a_std(tmp_path: Path) -> None:
    url = write(tmp_path / "data", x=[1e308, 1.5e308, -1e308])
    with pytest.raises(InputError, match="do not fit a double"):
        measure(url, section(x={"transform": "standardise"}))
