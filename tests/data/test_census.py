"""Census: what the published files become, checked against a second reading of them; files that are not they.

The published files are read from the folder `MTLREC_DATA`, or `../shared/data` beside the checkout.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml
from pyarrow import csv

from benchmarks import census_reference
from mtlrec import storage
from mtlrec.data.ids import hash_ids
from mtlrec.data.prepare import census
from mtlrec.data.prepare.catalog import PREPARERS
from mtlrec.data.prepare.census import COLUMNS, LEARN, TEST, prepare_census
from mtlrec.data.prepare.census_job import JOBS, NUMBERS, boundaries
from mtlrec.data.shards import Dataset
from mtlrec.job.errors import InputError
from mtlrec.preflight import read_job
from mtlrec.schema import build_schema

ROOT = Path(__file__).parents[2]
ROWS = {LEARN: 60, TEST: 25}
SAMPLE = (
    "73, Not in universe, 0, 0, High school graduate, 0, Not in universe, Widowed, "
    "Not in universe or children, Not in universe, White, All other, Female, Not in universe, "
    "Not in universe, Not in labor force, 0, 0, 0, Nonfiler, Not in universe, Not in universe, "
    "Other Rel 18+ ever marr not in subfamily, Other relative of householder, 1700.09, ?, ?, ?, "
    "Not in universe under 1 year old, ?, 0, Not in universe, United-States, United-States, United-States, "
    "Native- Born in the United States, 0, Not in universe, 2, 0, 95, - 50000."
)


def published() -> Path:
    """The folder with the published files; a test that needs them fails where they are not."""
    given = os.environ.get("MTLREC_DATA")
    data = Path(given) if given else ROOT.parent / "shared" / "data"
    for folder in (data / "census_income_kdd", data):
        if (folder / f"{LEARN}.gz").is_file() and (folder / f"{TEST}.gz").is_file():
            return folder
    pytest.fail(
        f"{LEARN}.gz and {TEST}.gz are neither in {data}/census_income_kdd nor in {data}: download UCI's "
        "Census-Income (KDD) and name its folder in the environment variable MTLREC_DATA"
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
    """(OUT, what prepare returned, its events) of the published files."""
    out = str(tmp_path_factory.mktemp("census") / "out")
    events: list[dict[str, Any]] = []
    made = PREPARERS["census"](str(published()), out, force=False, progress=events.append)
    return out, made, events


@pytest.fixture(scope="module")
def published_values() -> dict[str, pa.Table]:
    """Every value of both published files as text, read without any of our code."""
    options = csv.ConvertOptions(column_types=dict.fromkeys(COLUMNS, pa.string()), strings_can_be_null=False)
    tables = {}
    for name in (LEARN, TEST):
        with gzip.open(published() / f"{name}.gz") as file:
            table = csv.read_csv(file, csv.ReadOptions(column_names=COLUMNS), convert_options=options)
        tables[name] = pa.table({column: pc.utf8_trim(table[column], " ") for column in COLUMNS})
    return tables


def splitmix64(value: int) -> int:
    """As docs/data.md writes it."""
    z = (value + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_published_splits_and_labels(prepared: Any) -> None:
    out, made, _ = prepared
    splits = {split: pq.read_table(f"{out}/{split}") for split in ("train", "valid", "test")}
    assert made == {"out": out, "rows": {split: table.num_rows for split, table in splits.items()}}
    assert splits["test"]["line"].to_pylist() == list(range(1, 99_763))
    held_out = [line for line in range(1, 199_524) if splitmix64(line) % 10 == 0]
    assert splits["valid"]["line"].to_pylist() == held_out
    assert splits["train"]["line"].to_pylist() == sorted(set(range(1, 199_524)) - set(held_out))
    assert made["rows"] == {"train": 179_499, "valid": 20_024, "test": 99_762}
    everyone = pa.concat_tables([splits["train"], splits["valid"]])
    assert sum(everyone["income"].to_pylist()) == 12_382
    assert sum(everyone["never_married"].to_pylist()) == 86_485
    assert sum(splits["test"]["income"].to_pylist()) == 6_186
    assert len(COLUMNS) == 42 and set(everyone.column_names) == {
        *(set(COLUMNS) - {"instance_weight", "marital_stat", "income_50k"}),
        *("line", "income", "never_married"),
    }


@pytest.mark.parametrize(("split", "name"), [("train", LEARN), ("valid", LEARN), ("test", TEST)])
def test_every_value_is_the_published_one(
    prepared: Any, published_values: dict[str, pa.Table], split: str, name: str
) -> None:
    out, _, _ = prepared
    table = pq.read_table(f"{out}/{split}")
    codes = json.loads(Path(out, "categories.json").read_text(encoding="utf-8"))
    there = published_values[name].take(pc.subtract(table["line"], 1))
    for column in set(COLUMNS) - {"instance_weight", "marital_stat", "income_50k"}:
        if column in codes:
            values = pa.chunked_array([codes[column]])
            assert values.take(pc.subtract(table[column], 1)).equals(there[column]), column
        else:
            assert pc.cast(there[column], table[column].type).equals(table[column]), column
    for task, column, positive in (
        ("income", "income_50k", "50000+."),
        ("never_married", "marital_stat", "Never married"),
    ):
        assert pc.cast(pc.equal(there[column], positive), pa.int8()).equals(table[task])


@pytest.mark.parametrize("file", sorted(JOBS))
def test_jobs_fit_the_data(prepared: Any, file: str) -> None:
    out, made, _ = prepared
    job = read_job(f"{out}/{file}", [])
    assert (job.data.train, job.data.eval) == (f"{out}/train", f"{out}/valid")
    assert job.name == JOBS[file][0]
    schema = build_schema(job.schema_, job.model)
    assert schema.scenarios == ("94", "95")
    steps = -(-made["rows"]["train"] // job.data.batch_size) * job.run.epochs
    schedule = job.optimizer.dense.schedule
    assert (schedule.decay, schedule.decay_steps) == ("linear", steps)
    assert job.run.evaluate is not None and job.run.evaluate.metric == ["income/auc", "never_married/auc"]
    # 31 categories, the year, 7 numbers as they are and 7 in buckets: 39 of the 42 columns.
    assert (len(schema.id_features), schema.dense_width) == (31 + 1 + 7, 7)
    for split, rows in made["rows"].items():
        dataset = Dataset.open(f"{out}/{split}", schema.columns())
        assert dataset.rows == rows and len(dataset.shards) > 1 and len(dataset.group_rows) > 2
    categories = json.loads(Path(out, "categories.json").read_text(encoding="utf-8"))
    for feature in schema.id_features:
        if feature.source == "id":
            assert schema.table_of[feature.table].rows == len(categories[feature.column]) + 1
            assert categories[feature.column] == sorted(set(categories[feature.column]))
    assert "?" in categories["mig_chg_msa"]


def test_progress_is_told(prepared: Any) -> None:
    events = prepared[2]
    assert {event["what"] for event in events} == {f"read {LEARN}.gz", f"read {TEST}.gz", "write"}
    assert all(event["kind"] == "progress" and event["done"] <= event["total"] for event in events)
    for what, total in ((f"read {LEARN}.gz", 199_523), (f"read {TEST}.gz", 99_762), ("write", 299_285)):
        last = [event for event in events if event["what"] == what][-1]
        assert last["done"] == last["total"] == total and last["seconds_left"] == 0


def test_pages_carry_checksums(prepared: Any, tmp_path: Path) -> None:
    shard = Path(prepared[0], "test", "part-0.parquet")
    chunk = pq.read_metadata(shard).row_group(0).column(3)
    raw = bytearray(shard.read_bytes())
    raw[chunk.dictionary_page_offset + chunk.total_compressed_size - 5] ^= 1
    (tmp_path / "flipped.parquet").write_bytes(raw)
    with pytest.raises(OSError, match="CRC"):
        pq.ParquetFile(tmp_path / "flipped.parquet", page_checksum_verification=True).read_row_group(0)


# Files made up here


def write_files(folder: Path, rows: dict[str, int] = ROWS) -> Path:
    """Both files with `rows` lines, varied in age, marital status, sex, year and income."""
    folder.mkdir()
    for name, count in rows.items():
        text = "".join(f"{line(number)}\n" for number in range(count))
        (folder / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    return folder


def line(number: int = 0, **changes: str) -> str:
    values = dict(zip(COLUMNS, SAMPLE.split(", "), strict=True))
    values |= {name: str(number % 4 * 100) for name in NUMBERS}
    values |= {"age": str(number), "year": str(94 + number % 2), "sex": ("Female", "Male")[number % 2]}
    values["marital_stat"] = ("Never married", "Divorced", "Widowed")[number % 3]
    values["income_50k"] = "50000+." if number % 5 == 0 else "- 50000."
    return ", ".join((values | changes).values())


def replace_line(folder: Path, name: str, number: int, text: str) -> None:
    """Line `number` (from 1) of a file becomes `text`."""
    path = folder / f"{name}.gz"
    found = gzip.decompress(path.read_bytes()).decode().split("\n")[:-1]
    found[number - 1] = text
    path.write_bytes(gzip.compress(("\n".join(found) + "\n").encode()))


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(census, "EXPECTED_ROWS", ROWS)
    monkeypatch.setattr(census, "_CHUNK", 7)
    yield write_files(tmp_path / "source")


def refused(source: Path) -> str:
    """The message that refuses `source`; nothing may have been written."""
    out = source.parent / "out"
    with pytest.raises(InputError) as caught:
        prepare_census(str(source), str(out))
    assert not out.exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (line(3) + ", more", "line 18: 43 columns; every line has 42"),
        (",".join(line(3).split(",")[:30]), "line 18: 30 columns"),
        ("", "line 18: 1 columns"),
        (line(3, income_50k="<=50K"), "line 18, column income_50k: '<=50K' is not one of - 50000., 50000+."),
        (
            line(3, marital_stat="Single"),
            "line 18, column marital_stat: 'Single' is not one of Never married",
        ),
        (line(3, year="96"), "line 18, column year: '96' is not one of 94, 95"),
        (line(3, age="old"), "line 18, column age: 'old' is not a number"),
        (line(3, age="nan"), "line 18, column age: 'nan' is not a number"),
        (line(3, weeks_worked="-1"), "line 18, column weeks_worked: '-1' is not a number from 0 on"),
        (line(3, capital_gains="1e999"), "line 18, column capital_gains: '1e999' is not a number"),
        (line(3, instance_weight="?"), "line 18, column instance_weight: '?' is not a number"),
        (line(3, race=" "), "line 18, column race: '' is not a value"),
        (line(3, race="Whité"), "line 18: not plain text"),
        (line(3, race="White\rBlack"), "line 18: not plain text"),
        (line(3, race="W" * 5000), "line 18: longer than 4096 bytes"),
    ],
)
def test_a_wrong_line_is_named(source: Path, text: str, expected: str) -> None:
    replace_line(source, TEST, 18, text)
    message = refused(source)
    assert message.startswith(f"{source}/{TEST}.gz: ")
    assert expected in message


def test_a_file_cut_short_is_named(source: Path) -> None:
    path = source / f"{LEARN}.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    message = refused(source)
    assert f"{path}: line " in message and "cut short" in message
    path.write_bytes(whole[:-8] + b"\0" * 8)
    assert f"{path}: line 61: corrupt" in refused(source)
    path.write_bytes(gzip.compress("\n".join(line(n) for n in range(50)).encode()))
    assert f"{path}: ends after line 50; the published {LEARN} has 60 lines" in refused(source)
    path.write_bytes(b"PK\x03\x04 some archive")
    assert f"{path}: line 1: not gzip" in refused(source)
    path.write_bytes(b"")
    assert f"{path}: line 1: not gzip" in refused(source)


def test_files_in_each_others_place(source: Path) -> None:
    learn, test = source / f"{LEARN}.gz", source / f"{TEST}.gz"
    content = learn.read_bytes()
    learn.write_bytes(test.read_bytes())
    test.write_bytes(content)
    assert f"{learn}: ends after line 25" in refused(source)
    learn.write_bytes(content)
    assert f"{test}: line 26: too many" in refused(source)


def test_missing_files(source: Path) -> None:
    (source / f"{TEST}.gz").unlink()
    assert f"no {TEST}.gz here" in refused(source)
    with pytest.raises(InputError, match=f"no {LEARN}.gz here"):
        prepare_census(str(source / "nowhere"), str(source.parent / "out"))


def read_tree(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_uncompressed_files_give_the_same(source: Path, tmp_path: Path) -> None:
    prepare_census(str(source), str(tmp_path / "out"))
    for name in ROWS:
        path = source / f"{name}.gz"
        (source / name).write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    prepare_census(str(source), str(tmp_path / "plain"))
    assert read_tree(tmp_path / "out") == read_tree(tmp_path / "plain")


def test_codes_begin_at_one_and_the_unseen_is_zero(source: Path, tmp_path: Path) -> None:
    replace_line(source, TEST, 4, line(3, race="Martian", education="?"))
    replace_line(source, LEARN, 4, line(3, education="?"))
    out = tmp_path / "out"
    made = prepare_census(str(source), str(out))
    assert sum(made["rows"].values()) == 85
    categories = json.loads((out / "categories.json").read_text(encoding="utf-8"))
    assert categories["race"] == ["White"] and categories["sex"] == ["Female", "Male"]
    assert categories["education"] == ["?", "High school graduate"]
    test = pq.read_table(out / "test")
    assert test["race"].to_pylist() == [1, 1, 1, 0, *[1] * 21]
    assert test["education"].to_pylist() == [2, 2, 2, 1, *[2] * 21]
    assert test["sex"].to_pylist() == [1 + n % 2 for n in range(25)]
    assert test["race"].type == pa.int32()
    held_out = hash_ids(np.arange(1, 61)) % np.uint64(10) == 0
    assert pq.read_table(out / "valid")["line"].to_pylist() == (np.flatnonzero(held_out) + 1).tolist()


def test_a_folder_in_use_is_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"thesis\.tex is not of a prepare"):
        prepare_census(str(source), str(out))
    assert read_tree(out) == {"thesis.tex": b"years of work"}
    (out / "train").mkdir()
    (out / "train" / "mine.parquet").write_bytes(b"would be read as a shard")
    with pytest.raises(InputError, match=r"train/mine\.parquet is not of a prepare"):
        prepare_census(str(source), str(out), force=True)
    with pytest.raises(InputError, match="this is a file"):
        prepare_census(str(source), str(out / "thesis.tex"))


def test_force_replaces_our_files_alone(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare_census(str(source), str(out))
    first = read_tree(out)
    with pytest.raises(InputError, match="give --force to replace it"):
        prepare_census(str(source), str(out))
    assert read_tree(out) == first
    (out / "train" / "part-99.parquet").write_bytes(b"of an older version")
    (out / "runs" / "census-mmoe").mkdir(parents=True)
    (out / "runs" / "census-mmoe" / "result.json").write_text("{}")
    replace_line(source, LEARN, 4, "wrong")
    with pytest.raises(InputError, match="line 4"):
        prepare_census(str(source), str(out), force=True)
    assert (out / "job.yaml").is_file(), "files that are wrong must not cost those that are there"
    replace_line(source, LEARN, 4, line(3))
    prepare_census(str(source), str(out), force=True)
    assert read_tree(out) == {**first, "runs/census-mmoe/result.json": b"{}"}


def test_an_interrupted_prepare_runs_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    prepare_census(str(source), str(whole))
    write = storage.write_stream
    written: list[str] = []

    def fail_later(url: str) -> Any:
        written.append(url)
        if len(written) == 6:
            raise KeyboardInterrupt
        return write(url)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_stream", fail_later)
        with pytest.raises(KeyboardInterrupt):
            prepare_census(str(source), str(out))
    assert len(read_tree(out)) == 5 and not (out / "job.yaml").exists()
    prepare_census(str(source), str(out))
    assert read_tree(out) == read_tree(whole)


def test_the_reference_follows_every_job(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare_census(str(source), str(out))
    kinds = {yaml.safe_load(backbone)["kind"] for _, backbone, *_ in JOBS.values()}
    assert kinds == {"shared_bottom", "mmoe", "ple"}
    for kind in kinds:
        job = census_reference.find_job(out, kind)
        data = census_reference.Data(out, job)
        learn = data.read("train")
        model, epoch = census_reference.train(job, data, learn, learn, seed=0)
        assert 1 <= epoch <= job["run"]["epochs"]
        assert all(0 <= area <= 1 for area in census_reference.auc(model, data.read("test")))
        changed = job | {"objective": {"balance": "uncertainty"}}
        with pytest.raises(ValueError, match="objective"):
            census_reference.train(changed, data, learn, learn, seed=0)


def test_boundaries_leave_zero_a_bucket_of_its_own() -> None:
    assert boundaries(np.array([0.0] * 1000 + [5.0, 7.0, 7.0, 9.0])) == [5.0, 7.0, 9.0]
    spread = boundaries(np.arange(0.0, 3001.0))
    assert spread == [1.0, *(float(value) for value in range(100, 3000, 100))]
    assert set(NUMBERS) <= set(COLUMNS)
