"""Epinions: splits, labels and each row's past against a second, plain counting; files that are not the one.

The published file is read from the folder `MTLREC_DATA`, or `../shared/data` beside the checkout.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtlrec import storage
from mtlrec.data.prepare import epinions
from mtlrec.data.prepare.catalog import PREPARERS
from mtlrec.data.prepare.epinions import EXPECTED_ROWS, FILE, RANGES, history, prepare_epinions
from mtlrec.data.prepare.epinions_job import HISTORIES, JOBS, MEANS
from mtlrec.data.shards import Dataset
from mtlrec.job.errors import InputError
from mtlrec.preflight import read_job
from mtlrec.schema import Column

ROOT = Path(__file__).parents[2]
SPLITS = ("earlier", "train", "valid", "test")
ROWS_OF = {"earlier": 470_991, "train": 313_448, "valid": 64_485, "test": 73_343}
ROWS = 400


def published() -> Path:
    """The folder with the published file; a test that needs it fails where it is not."""
    given = os.environ.get("MTLREC_DATA")
    data = Path(given) if given else ROOT.parent / "shared" / "data"
    for folder in (data / "epinions", data):
        if (folder / FILE).is_file():
            return folder
    pytest.fail(
        f"{FILE} is neither in {data}/epinions nor in {data}: download Epinions (J. Tang, ASU) as that file "
        "and name its folder in the environment variable MTLREC_DATA"
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[dict[str, Any]]]:
    """(OUT, what prepare returned, its events) of the published file."""
    out = tmp_path_factory.mktemp("epinions") / "out"
    events: list[dict[str, Any]] = []
    made = PREPARERS["epinions"](str(published()), str(out), force=False, progress=events.append)
    return out, made, events


def test_published_splits_and_labels(prepared: Any) -> None:
    out, made, events = prepared
    splits = {split: pq.read_table(out / split) for split in SPLITS}
    assert made == {"out": str(out), "rows": ROWS_OF}
    source = pq.read_table(published() / FILE)
    everyone = pa.concat_tables(splits.values())
    times = {"earlier": [1, 2], "train": range(3, 9), "valid": [9], "test": [10, 11]}
    for split, table in splits.items():
        kept = source.filter(pc.is_in(source["time"], pa.array(times[split], pa.int32())))
        assert table.select(list(RANGES)).equals(kept.select(list(RANGES)))
    assert round(pc.mean(everyone["like"]).as_py(), 3) == 0.738
    assert round(pc.mean(everyone["helpful"]).as_py(), 3) == 0.116
    for label, column, lowest in (("like", "rating", 4), ("helpful", "helpfulness", 3)):
        made_of = pc.greater_equal(everyone[column], lowest).cast(pa.int8())
        assert made_of.equals(everyone[label])
    assert {event["what"] for event in events} == {f"read {FILE}", "write"}
    assert events[-1]["done"] == events[-1]["total"] == EXPECTED_ROWS


def test_the_users_past_tells_helpful_as_measured_outside(prepared: Any) -> None:
    """The README of the data has .922 for the user's mean and .519 for the item's."""
    out, _, _ = prepared
    test = pq.read_table(out / "test")
    helpful = test["helpful"].to_numpy()
    assert auc(helpful, test["user_helpful_mean"].fill_null(0.11).to_numpy()) == pytest.approx(
        0.9205, abs=1e-3
    )
    assert auc(helpful, test["item_helpful_mean"].fill_null(0.11).to_numpy()) == pytest.approx(
        0.523, abs=1e-2
    )
    assert pc.mean(pc.is_valid(test["item_like_mean"])).as_py() == pytest.approx(0.302, abs=1e-3)
    assert pc.mean(pc.is_valid(test["user_like_mean"])).as_py() == pytest.approx(0.911, abs=1e-3)


def auc(label: Any, score: Any) -> float:
    """Of ties, half."""
    _, place, times = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(times) - (times - 1) / 2)[place]
    positives = label.sum()
    return float(
        (rank[label == 1].sum() - positives * (positives + 1) / 2) / (positives * (len(label) - positives))
    )


@pytest.mark.parametrize("file", sorted(JOBS))
def test_jobs_fit_the_data(prepared: Any, file: str) -> None:
    out, made, _ = prepared
    job = read_job(str(out / file), [])
    name, tasks, scenario = JOBS[file]
    assert (job.name, job.data.train, job.data.eval) == (f"epinions-{name}", f"{out}/train", f"{out}/valid")
    assert job.schema_.scenario is not None and job.schema_.scenario.as_feature == scenario
    assert tuple(job.schema_.tasks) == tasks
    features = job.schema_.features
    assert any(feature.startswith("user_category") for feature in features) == scenario
    # Nothing of the row itself but who, what and where: its past, and its labels as labels.
    columns = {getattr(feature, "column", None) or name for name, feature in features.items()}
    past = {
        f"{history}_{column}" for history in HISTORIES for column in ("count", *(f"{m}_mean" for m in MEANS))
    }
    assert columns - past == {"user_id", "item_id"}
    wanted = [Column(column, "number", "test") for column in sorted(columns & past)]
    for split in SPLITS:
        assert Dataset.open(str(out / split), wanted).rows == made["rows"][split]


# The past


def plain_history(rows: list[tuple[int, int, int]], test_time: int) -> tuple[list[int], list[float | None]]:
    """(key, time, value) of each row -> counts and means."""
    counts, means = [], []
    for key, time, _ in rows:
        before = [row for row in rows if row[1] < min(time, test_time)]
        mine = [value for other, _, value in before if other == key]
        counts.append(len(mine))
        general = sum(value for _, _, value in before) / max(len(before), 1)
        means.append((sum(mine) + 5 * general) / (len(mine) + 5) if mine else None)
    return counts, means


rows_ = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(0, 5)), min_size=1, max_size=60)


@given(rows=rows_, test_time=st.integers(1, 7))
def test_history_is_what_was_before(rows: list[tuple[int, int, int]], test_time: int) -> None:
    keys, time, value = (np.array(column) for column in zip(*rows, strict=True))
    # Two columns that together say what the one does.
    past = history([keys // 2, keys % 2], time, {"stars": value}, test_time)
    counts, means = plain_history(rows, test_time)
    assert past["count"].to_pylist() == counts
    for found, expected in zip(past["stars_mean"].to_pylist(), means, strict=True):
        assert (found is None) == (expected is None)
        assert found is None or found == pytest.approx(expected, rel=1e-6)


# Files made up here


def some_rows(count: int = ROWS) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    high = {"user_id": 30, "item_id": 50}
    return {
        name: pa.array(draw.integers(low, high.get(name, most) + 1, count).astype(np.int32))
        for name, (low, most) in RANGES.items()
    }


def write_source(folder: Path, columns: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder / FILE)
    return folder


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(epinions, "EXPECTED_ROWS", ROWS)
    yield write_source(tmp_path / "source", some_rows())


def test_no_row_knows_its_own_time_nor_the_test(source: Path, tmp_path: Path) -> None:
    """Other labels from some time on change no past before it, and none in the test steps at all."""
    prepare_epinions(str(source), str(tmp_path / "out"))
    columns = some_rows()
    time = columns["time"].to_numpy()
    for name in ("rating", "helpfulness"):
        changed = columns[name].to_numpy().copy()
        changed[time >= 9] = 6 - changed[time >= 9]
        columns[name] = pa.array(changed)
    write_source(source, columns)
    prepare_epinions(str(source), str(tmp_path / "other"))
    past = [f"{history}_{name}_mean" for history in HISTORIES for name in MEANS]
    for split in ("train", "valid"):
        one, other = (pq.read_table(tmp_path / made / split).select(past) for made in ("out", "other"))
        assert one.equals(other)
    for name in ("rating", "helpfulness"):
        changed = some_rows()[name].to_numpy().copy()
        changed[time >= 10] = 6 - changed[time >= 10]
        columns[name] = pa.array(changed)
    write_source(source, columns)
    prepare_epinions(str(source), str(tmp_path / "third"))
    one, other = (pq.read_table(tmp_path / made / "test") for made in ("out", "third"))
    assert one.select(past).equals(other.select(past)) and not one["like"].equals(other["like"])
    # The past of a user, counted plainly.
    counts: dict[tuple[int, int], int] = defaultdict(int)
    for user, at in zip(columns["user_id"].to_pylist(), time.tolist(), strict=True):
        for later in range(at + 1, 11):
            counts[user, later] += 1
    for row in one.to_pylist():
        assert row["user_count"] == counts[row["user_id"], 10]


def refused(source: Path) -> str:
    """The message that refuses `source`; nothing may have been written."""
    out = source.parent / "out"
    with pytest.raises(InputError) as caught:
        prepare_epinions(str(source), str(out))
    assert not out.exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("column", "value", "expected"),
    [
        ("rating", 6, "row 18, column rating: 6 is not a whole number from 1 to 5"),
        ("rating", 0, "row 18, column rating: 0 is not"),
        ("helpfulness", None, "row 18, column helpfulness: None is not a whole number from 1 to 5"),
        ("category_id", 28, "row 18, column category_id: 28 is not a whole number from 1 to 27"),
        ("time", 12, "row 18, column time: 12 is not"),
        ("user_id", -3, "row 18, column user_id: -3 is not"),
        ("item_id", 296_278, "row 18, column item_id: 296278 is not"),
    ],
)
def test_a_wrong_value_is_named(source: Path, column: str, value: int | None, expected: str) -> None:
    columns = some_rows()
    values = columns[column].to_pylist()
    values[17] = value
    write_source(source, {**columns, column: pa.array(values, pa.int32())})
    message = refused(source)
    assert message.startswith(f"{source / FILE}: ") and expected in message


def test_files_that_are_not_the_published_one(source: Path) -> None:
    path, columns = source / FILE, some_rows()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert f"{path}: not Parquet, or corrupt or cut short" in refused(source)
    path.write_bytes(b"")
    assert f"{path}: not Parquet" in refused(source)
    path.write_bytes(b"PAR1 but of our own making PAR1")
    assert f"{path}: not Parquet" in refused(source)
    renamed = {("stars" if name == "rating" else name): values for name, values in columns.items()}
    write_source(source, renamed)
    assert f"{path}: column 'rating' (of the published file) is missing; columns here: user_id" in refused(
        source
    )
    write_source(source, {**columns, "time": columns["time"].cast(pa.float64())})
    assert f"{path}: column 'time' has type double" in refused(source)
    write_source(source, some_rows(ROWS - 1))
    assert f"{path}: ends after row 399; the published file has 400 rows" in refused(source)
    path.rename(source / "ratings.parquet")
    assert f"{path}: no such file" in refused(source)
    assert "Not a directory" in refused(source / "ratings.parquet")
    assert "no such file" in refused(source.parent / "nowhere")


def read_tree(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_force_replaces_our_files_alone(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare_epinions(str(source), str(out))
    first = read_tree(out)
    with pytest.raises(InputError, match="give --force to replace it"):
        prepare_epinions(str(source), str(out))
    (out / "runs").mkdir()
    (out / "runs" / "result.json").write_text("{}")
    write_source(source, some_rows(7))
    with pytest.raises(InputError, match="ends after row 7"):
        prepare_epinions(str(source), str(out), force=True)
    assert (out / "job.yaml").is_file(), "a file that is wrong must not cost those that are there"
    write_source(source, some_rows())
    prepare_epinions(str(source), str(out), force=True)
    assert read_tree(out) == {**first, "runs/result.json": b"{}"}
    (out / "valid" / "mine.parquet").write_bytes(b"would be read as a shard")
    with pytest.raises(InputError, match=r"valid/mine\.parquet is not of a prepare"):
        prepare_epinions(str(source), str(out), force=True)


def test_an_interrupted_prepare_runs_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    prepare_epinions(str(source), str(whole))
    write, written = storage.write_stream, []

    def fail_later(url: str) -> Any:
        written.append(url)
        if len(written) == 10:
            raise KeyboardInterrupt
        return write(url)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_stream", fail_later)
        with pytest.raises(KeyboardInterrupt):
            prepare_epinions(str(source), str(out))
    assert len(read_tree(out)) == 9 and not (out / "job.yaml").exists()
    prepare_epinions(str(source), str(out))
    assert read_tree(out) == read_tree(whole)
