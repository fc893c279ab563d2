from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import mean_squared_error, roc_auc_score

from mtlrec import storage
from mtlrec.data.population import DEVICES, LONGEST_HISTORY, Population
from mtlrec.data.shards import Dataset
from mtlrec.data.synthetic import SPLITS, _job_text, split_sizes, synthesise
from mtlrec.job.errors import InputError
from mtlrec.job.job import parse_job
from mtlrec.schema import build_schema

pytest_plugins = ["tests.s3_server"]

OPTIONS: dict[str, Any] = {"rows": 20_000, "users": 500, "items": 200, "scenarios": 3, "files": 3, "seed": 5}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synthetic") / "data"
    synthesise(str(out), **OPTIONS)
    return out


@pytest.fixture(scope="module")
def train(made: Path) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in sorted((made / "train").glob("*.parquet")))


def _small(out: Path, **changes: Any) -> dict[str, Any]:
    return synthesise(str(out), **{**OPTIONS, "rows": 300, "files": 2, **changes})


def _bytes(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_layout(made: Path) -> None:
    assert {path.name for path in made.iterdir()} == {*SPLITS, "job.yaml"}
    for split, (rows, files) in split_sizes(OPTIONS["rows"], OPTIONS["files"]).items():
        shards = sorted((made / split).glob("*.parquet"))
        assert len(shards) == files
        footers = [pq.read_metadata(shard) for shard in shards]
        assert sum(footer.num_rows for footer in footers) == rows
        assert all(footer.num_row_groups >= 4 for footer in footers)
    assert not list(made.rglob(".*"))


def test_sizes_of_the_splits() -> None:
    assert split_sizes(1_000_000, 16) == {
        "train": (1_000_000, 16),
        "valid": (100_000, 2),
        "test": (100_000, 2),
    }
    assert split_sizes(2_000, 1)["valid"] == (1_000, 1)
    assert split_sizes(7, 7)["test"] == (7, 1)


def test_row_groups_are_bounded(tmp_path: Path) -> None:
    synthesise(str(tmp_path / "data"), **{**OPTIONS, "rows": 150_000, "files": 1})
    footer = pq.read_metadata(tmp_path / "data" / "train" / "part-00000.parquet")
    sizes = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    assert max(sizes) <= 32_768
    assert sum(sizes) == 150_000


def test_the_same_options_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        _small(tmp_path / name)
    assert _bytes(tmp_path / "one") == _bytes(tmp_path / "two")
    _small(tmp_path / "other", seed=6)
    other = _bytes(tmp_path / "other")
    assert all(other[name] != data for name, data in _bytes(tmp_path / "one").items())


def test_what_a_seed_means_is_pinned() -> None:
    block = Population(users=1_000, items=300, scenarios=4, seed=0).block("train", 0, 0, rows=6)
    assert block.scenario.tolist() == [2, 2, 0, 0, 2, 0]
    assert block.hour.tolist() == [13, 11, 5, 17, 18, 14]
    assert block.user.tolist() == [336, 380, 557, 387, 335, 102]
    assert block.item.tolist() == [111, 86, 159, 208, 55, 298]
    assert block.history_ends.tolist() == [8, 23, 37, 48, 52, 56]
    assert block.history[:6].tolist() == [99, 297, 236, 22, 148, 70]


def test_nulls_are_where_the_documentation_says(train: pa.Table) -> None:
    click, buy, rating = (train[name].to_pylist() for name in ("click", "buy", "rating"))
    assert set(click) == {0, 1}
    assert [value is None for value in buy] == [value == 0 for value in click]
    assert [value is None for value in rating] == [value != 1 for value in buy]
    assert {value for value in rating if value is not None} == {1.0, 2.0, 3.0, 4.0, 5.0}
    for name, share in (("age", 0.05), ("price", 0.02), ("history", 0.02)):
        assert train[name].null_count / train.num_rows == pytest.approx(share, abs=0.03), name
    for name in set(train.column_names) - {"age", "price", "history", "buy", "rating"}:
        assert train[name].null_count == 0, name


def test_values_stay_in_range(train: pa.Table) -> None:
    for name, most in (
        ("user_id", 500),
        ("item_id", 200),
        ("category", 40),
        ("hour", 24),
        ("campaign", 10_000),
    ):
        ids = train[name].to_numpy()
        assert ids.min() >= 0, name
        assert ids.max() < most, name
    lengths = pc.list_value_length(train["history"]).drop_null().to_numpy()
    assert (lengths.min(), lengths.max()) == (1, LONGEST_HISTORY)
    assert pc.max(pc.list_flatten(train["history"])).as_py() < 200
    assert pc.min_max(train["age"]).as_py() == {"min": 18, "max": 79}
    assert set(train["device"].unique().to_pylist()) == set(DEVICES)
    assert all(city.startswith("city-") for city in train["city"].unique().to_pylist())


def test_popularity_is_skewed_and_scenarios_differ_in_size(train: pa.Table) -> None:
    for name, count, least in (("item_id", 200, 0.2), ("user_id", 500, 0.18)):
        rows = np.sort(np.bincount(train[name].to_numpy(), minlength=count))[::-1]
        assert rows[: count // 10].sum() > least * rows.sum(), name
    sizes = [train.filter(pc.equal(train["scenario"], f"s{s}")).num_rows for s in range(3)]
    assert sizes[0] > 1.3 * sizes[1] > 1.3 * sizes[2] > 0


def test_the_job_reads_the_data(made: Path) -> None:
    job = parse_job((made / "job.yaml").read_text(), str(made / "job.yaml"))
    # The mean and deviation that a run measures on its training data.
    schema = build_schema(_measured(job), job.model)
    for split in SPLITS:
        data = Dataset.open(str(made / split), schema.columns())
        assert data.rows == split_sizes(OPTIONS["rows"], OPTIONS["files"])[split][0]
    assert (job.data.train, job.data.eval, job.run.storage) == ("train", "valid", "runs")
    assert schema.scenarios == ("s0", "s1", "s2")
    assert {table.name: table.rows for table in schema.tables}["user_id"] == 500
    text = (made / "job.yaml").read_text()
    assert text.startswith("# ") and "mtlrec train" in text and "--rows 20000" in text


def test_the_job_suits_the_number_of_rows() -> None:
    ideal = {"all": {"click": {"auc": 0.8}}}
    small, large = (
        parse_job(_job_text(**{**OPTIONS, "users": 20_000, "rows": rows}, ideal=ideal), "/data/job.yaml")
        for rows in (999_999, 2_000_001)
    )
    assert (small.model.backbone.kind, large.model.backbone.kind) == ("mmoe", "ple")
    assert (small.data.batch_size, large.data.batch_size) == (1024, 4096)
    # The learning rate falls until the last step of the last epoch.
    assert (small.run.epochs, large.run.epochs) == (1, 2)
    assert small.optimizer.dense.schedule.decay == "none"
    assert large.optimizer.dense.schedule.decay_steps == 2 * 489


def _measured(job: Any) -> Any:
    features = {
        name: feature.model_copy(update={"mean": 0.0, "std": 1.0})
        if getattr(feature, "transform", None) == "standardise"
        else feature
        for name, feature in job.schema_.features.items()
    }
    return job.schema_.model_copy(update={"features": features})


def test_the_ideal_is_the_score_of_the_true_probabilities(tmp_path: Path) -> None:
    result = synthesise(str(tmp_path / "data"), **{**OPTIONS, "rows": 40_000, "files": 1})
    ideal = json.loads((tmp_path / "data" / "train" / "_ideal.json").read_text())
    assert ideal == result["ideal"]["train"]
    population = Population(500, 200, 3, seed=5)
    blocks = [population.block("train", 0, group, rows=10_000) for group in range(4)]
    truth, labels, valid, scenario = (
        np.concatenate([getattr(block, name) for block in blocks])
        for name in ("truth", "labels", "valid", "scenario")
    )
    assert list(ideal) == ["all", "s0", "s1", "s2"]
    for name, rows in (("all", scenario >= 0), ("s1", scenario == 1)):
        for task, column in (("click", 0), ("buy", 1)):
            chosen = rows & valid[:, column]
            expected = roc_auc_score(labels[chosen, column], truth[chosen, column])
            assert ideal[name][task]["auc"] == pytest.approx(expected, abs=1e-9)
            assert ideal[name][task]["rows"] == chosen.sum()
            assert ideal[name][task]["calibration"] == pytest.approx(1, abs=0.06)
        chosen = rows & valid[:, 2]
        expected = mean_squared_error(labels[chosen, 2], truth[chosen, 2]) ** 0.5
        assert ideal[name]["rating"]["rmse"] == pytest.approx(expected, abs=1e-6)
    assert 0.77 < ideal["all"]["click"]["auc"] < 0.83
    # The stored labels are the ones that were scored.
    assert pq.read_table(tmp_path / "data" / "train" / "part-00000.parquet")["click"].to_pylist() == list(
        labels[:, 0]
    )


def test_the_truth_is_the_chance_of_the_labels() -> None:
    population = Population(2_000, 500, 2, seed=1)
    blocks = [population.block("x", group, rows=32_768) for group in range(8)]
    truth, labels, valid = (
        np.concatenate([getattr(block, name) for block in blocks]) for name in ("truth", "labels", "valid")
    )
    for task in range(2):
        chance = 1 / (1 + np.exp(-truth[valid[:, task], task].astype(np.float64)))
        outcome = labels[valid[:, task], task]
        for low in np.arange(0, 1, 0.1):
            bin_ = (chance >= low) & (chance < low + 0.1)
            spread = np.sqrt((chance[bin_] * (1 - chance[bin_])).sum()) / max(bin_.sum(), 1)
            assert abs(outcome[bin_].mean() - chance[bin_].mean()) < 4 * spread
    rated = valid[:, 2]
    error = labels[rated, 2] - truth[rated, 2]
    assert abs(error.mean()) < 4 * error.std() / np.sqrt(rated.sum())


def test_scenarios_share_a_part_and_differ_in_another() -> None:
    population = Population(users=20, items=20, scenarios=2, seed=2)
    blocks = [population.block("x", group, rows=32_768) for group in range(4)]
    pair, scenario, logit = (
        np.concatenate(parts)
        for parts in zip(*((b.user * 20 + b.item, b.scenario, b.truth[:, 0]) for b in blocks), strict=True)
    )
    means = []
    for s in range(2):
        here = scenario == s
        rows = np.bincount(pair[here], minlength=400)
        assert rows.min() > 3
        means.append(np.bincount(pair[here], logit[here], minlength=400) / rows)
    assert 0.4 < np.asarray(np.corrcoef(means))[0, 1] < 0.9


def test_histories_tell_what_a_user_likes() -> None:
    """Items rated highly by similar users are what histories hold: held items get more clicks than others."""
    population = Population(users=300, items=100, scenarios=1, seed=3)
    blocks = [population.block("x", group, rows=32_768) for group in range(4)]
    held, liked = np.zeros((300, 100)), np.zeros((300, 100))
    rows = np.zeros((300, 100))
    for block in blocks:
        lengths = np.diff(block.history_ends, prepend=0)
        np.add.at(held, (np.repeat(block.user, lengths), block.history), 1)
        np.add.at(liked, (block.user, block.item), block.truth[:, 0])
        np.add.at(rows, (block.user, block.item), 1)
    met = rows > 0
    # Against the item's and the user's own means, so that popularity does not pass for taste.
    share = np.log((held + 1) / (held.sum(1, keepdims=True) + 100))
    share -= share.mean(0)
    logit = np.divide(liked, rows, out=np.zeros_like(liked), where=met)
    logit -= (logit.sum(axis=0) / met.sum(axis=0))[None, :]
    assert np.asarray(np.corrcoef(share[met], logit[met]))[0, 1] > 0.4


def test_dense_columns_and_popularity_alone_close_less_than_half_the_distance() -> None:
    population = Population(users=2_000, items=1_500, scenarios=4, seed=4)
    blocks = [population.block("x", group, rows=32_768) for group in range(7)]
    column = {
        name: np.concatenate([getattr(block, name) for block in blocks])
        for name in ("user", "item", "scenario", "price", "recency", "age", "signals", "truth", "labels")
    }
    click, scenario = column["labels"][:, 0], column["scenario"]
    fit = np.arange(len(click)) < 6 * 32_768
    features = [np.log(column["price"]), np.log1p(column["recency"]), np.cos((column["age"] - 35) / 12)]
    features += list(column["signals"].T)
    for name, count in (("user", 2_000), ("item", 1_500)):
        for key, size in ((column[name], count), (column[name] * 4 + scenario, count * 4)):
            rows = np.bincount(key[fit], minlength=size)
            clicks = np.bincount(key[fit], click[fit], minlength=size)
            features += [((clicks + 10 * click.mean()) / (rows + 10))[key], np.log1p(rows)[key]]
    values = np.stack(features, axis=1)
    values = (values - values.mean(0)) / values.std(0)
    for s in range(4):
        here = scenario == s
        model = LogisticRegression().fit(values[fit & here], click[fit & here])
        score = model.decision_function(values[~fit & here])
        reached = roc_auc_score(click[~fit & here], score) - 0.5
        possible = roc_auc_score(click[~fit & here], column["truth"][~fit & here, 0]) - 0.5
        assert reached < 0.5 * possible, f"s{s} : {reached / possible:.3f}"


@pytest.mark.parametrize(("users", "items", "scenarios"), [(1, 1, 1), (2, 3, 100), (2**31, 2**31, 2)])
def test_extreme_populations(tmp_path: Path, users: int, items: int, scenarios: int) -> None:
    made = _small(tmp_path / "data", users=users, items=items, scenarios=scenarios)
    assert made["rows"] == {"train": 300, "valid": 300, "test": 300}
    table = pq.read_table(tmp_path / "data" / "train" / "part-00000.parquet")
    assert 0 <= pc.max(table["user_id"]).as_py() < users
    assert 0 <= pc.max(table["item_id"]).as_py() < items


def test_a_single_row(tmp_path: Path) -> None:
    made = _small(tmp_path / "data", rows=1, files=1)
    assert made["rows"] == {"train": 1, "valid": 1, "test": 1}
    assert made["ideal"]["train"]["all"]["click"]["auc"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 0}, r"--rows: 0 is out of range; use 1 to"),
        ({"users": 2**31 + 1}, "--users"),
        ({"items": -1}, "--items"),
        ({"scenarios": 1001}, "--scenarios"),
        ({"seed": -1}, "--seed"),
        ({"rows": 3, "files": 4}, r"--files: 4 is more than --rows \(3\)"),
    ],
)
def test_numbers_out_of_range_are_refused(tmp_path: Path, changes: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        _small(tmp_path / "data", **changes)
    assert not (tmp_path / "data").exists()


def test_a_finished_folder_is_replaced_only_with_force(tmp_path: Path) -> None:
    out = tmp_path / "data"
    _small(out)
    before = _bytes(out)
    with pytest.raises(InputError, match="--force"):
        _small(out, seed=9)
    assert _bytes(out) == before
    (out / "runs").mkdir()
    (out / "runs" / "mine").write_text("kept")
    _small(out, seed=9, files=1, force=True)
    assert (out / "runs" / "mine").read_text() == "kept"
    assert [path.name for path in (out / "train").glob("*.parquet")] == ["part-00000.parquet"]
    assert (out / "job.yaml").read_bytes() != before["job.yaml"]


@pytest.mark.parametrize("force", [False, True])
def test_files_of_others_are_left_alone(tmp_path: Path, force: bool) -> None:
    out = tmp_path / "data"
    (out / "train").mkdir(parents=True)
    (out / "train" / "thesis.parquet").write_text("years of work")
    with pytest.raises(InputError, match=r"thesis\.parquet is not of mtlrec synth"):
        _small(out, force=force)
    assert _bytes(out) == {"train/thesis.parquet": b"years of work"}


def test_a_job_of_others_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("name: mine\n")
    with pytest.raises(InputError, match="not written by mtlrec synth"):
        _small(tmp_path, force=True)
    assert _bytes(tmp_path) == {"job.yaml": b"name: mine\n"}


def test_a_folder_with_other_things_needs_force(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes\.txt"):
        _small(tmp_path)
    assert _bytes(tmp_path) == {"notes.txt": b"mine"}
    with pytest.raises(InputError, match="cannot be used as a folder"):
        _small(tmp_path / "notes.txt")


def test_interrupted_it_leaves_no_job_and_runs_again(tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(event: dict[str, Any]) -> None:
        if event["done"] > event["total"] // 2:
            raise Interrupted

    out = tmp_path / "data"
    with pytest.raises(Interrupted):
        _small(out, progress=interrupt)
    assert (out / "train").exists()
    assert not (out / "job.yaml").exists()
    assert not list(out.rglob("*.unfinished"))
    _small(out)
    _small(tmp_path / "again")
    assert _bytes(out) == _bytes(tmp_path / "again")


def test_progress_counts_every_row(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    _small(tmp_path / "data", progress=events.append)
    assert [event["done"] for event in events] == sorted({event["done"] for event in events})
    assert events[-1]["done"] == events[-1]["total"] == 900
    assert {"kind", "what", "rows_per_s", "seconds_left"} <= set(events[-1])


def test_object_storage_holds_the_same(tmp_path: Path, bucket: str) -> None:
    _small(tmp_path / "data")
    made = synthesise(f"{bucket}/data", **{**OPTIONS, "rows": 300, "files": 2})
    found = {file.path: storage.read(file.url) for file in storage.list_files(made["out"])}
    assert found == _bytes(tmp_path / "data")
    with pytest.raises(InputError, match="--force"):
        synthesise(f"{bucket}/data", **{**OPTIONS, "rows": 300, "files": 2})
