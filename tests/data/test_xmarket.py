"""XMarket: the protocol against a second, plain writing of it; files of any markets; files that are none.

The published files are read from the folder `MTLREC_DATA`, or `../shared/data` beside the checkout.
"""

from __future__ import annotations

import gzip
import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import results_xmarket
from mtlrec import storage
from mtlrec.data.prepare import xmarket
from mtlrec.data.prepare.catalog import PREPARERS
from mtlrec.data.prepare.leave_one_out import Ratings, Unrated
from mtlrec.data.prepare.xmarket import prepare_xmarket
from mtlrec.data.shards import Dataset
from mtlrec.job.errors import InputError
from mtlrec.preflight import read_job
from mtlrec.schema import build_schema

ROOT = Path(__file__).parents[2]
HEADER = "userId itemId rate date"
SPLITS = ("train", "valid", "test")
Line = tuple[str, str, float, str]


def published(code: str) -> Path:
    """The published file of a market; a test that needs it fails where it is not."""
    given = os.environ.get("MTLREC_DATA")
    data = Path(given) if given else ROOT.parent / "shared" / "data"
    for folder in (data / "xmarket_electronics", data):
        if (file := folder / f"{code}_5core.txt").is_file():
            return file
    pytest.fail(
        f"{code}_5core.txt is neither in {data}/xmarket_electronics nor in {data}: download XMarket's "
        "Electronics and name its folder in the environment variable MTLREC_DATA"
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[dict[str, Any]]]:
    """(OUT, what prepare returned, its events) of two published markets."""
    source, out = tmp_path_factory.mktemp("xmarket"), tmp_path_factory.mktemp("prepared") / "out"
    for code in ("de", "mx"):
        (source / f"{code}_5core.txt").symlink_to(published(code))
    events: list[dict[str, Any]] = []
    made = PREPARERS["xmarket"](str(source), str(out), force=False, progress=events.append)
    return out, made, events


# The protocol once more, as docs/xmarket.md writes it


def xxh3(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode())


def splitmix64(value: int) -> int:
    """As docs/data.md writes it."""
    z = (value + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def plain_protocol(lines: list[Line], market: str, every: int = 1) -> dict[str, list[dict[str, Any]]]:
    """Rows of each split, in order; of every so many-th user alone."""
    latest: dict[tuple[str, str], tuple[str, float]] = {}
    for user, item, rating, date in lines:
        latest[user, item] = max(latest.get((user, item), ("", 0.0)), (date, rating))
    items = sorted({item for _, item in latest})
    mine = defaultdict(list)
    for (user, item), (date, rating) in latest.items():
        mine[user].append((date, xxh3(f"{user}|{item}"), item, rating))
    rows: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}

    def row(user: str, item: str, label: int, rating: float | None, date: str) -> dict[str, Any]:
        return {
            "user_id": user,
            "item_id": item,
            "market": market,
            "interaction": label,
            "rating": rating,
            "date": date,
        }

    for user in sorted(mine)[::every]:
        rated = sorted(mine[user])
        asked = {"valid": rated[-2], "test": rated[-1]} if len(rated) >= 3 else {}
        for date, _, item, rating in rated[: len(rated) - len(asked)]:
            rows["train"].append(row(user, item, 1, rating, date))
        unrated = [item for item in items if item not in {each[2] for each in rated}]
        for split, (date, _, positive, rating) in asked.items():
            m = min(99, len(unrated))
            taken: set[int] = set()
            for step in range(m):
                j = len(unrated) - m + step
                t = splitmix64((xxh3(f"{user}|{split}") + step) % 2**64) % (j + 1)
                taken.add(j if t in taken else t)
            among = sorted([positive, *(unrated[t] for t in taken)], key=lambda item: xxh3(f"{user}|{item}"))
            rows[split] += [
                row(user, item, int(item == positive), rating if item == positive else None, date)
                for item in among
            ]
    return rows


def read_rows(table: pa.Table) -> list[dict[str, Any]]:
    return [{**row, "date": str(row["date"])} for row in table.to_pylist()]


def read_lines(file: Path) -> list[Line]:
    texts = file.read_text().splitlines()
    assert texts[0] == HEADER
    found = [text.split(" ") for text in texts[1:]]
    return [(user, item, float(rating), date) for user, item, rating, date in found]


def test_published_rows_are_those_of_the_protocol(prepared: Any) -> None:
    out, made, _ = prepared
    expected = plain_protocol(read_lines(published("mx")), "mx", every=10)
    users = pa.array({row["user_id"] for row in expected["train"]})
    for split in SPLITS:
        table = pq.read_table(out / "mx" / split)
        assert read_rows(table.filter(pc.is_in(table["user_id"], users))) == expected[split]
    assert made["markets"]["de"] == {
        "lines": 22_247,
        "ratings": 21_519,
        "users": 2_373,
        "items": 2_210,
        "users_in_train_alone": 0,
        "fewest_candidates": 100,
        "train": 16_773,
        "valid": 237_300,
        "test": 237_300,
    }
    mx = made["markets"]["mx"]
    assert (mx["lines"], mx["users"], mx["items"], mx["users_in_train_alone"]) == (17_095, 1_878, 1_645, 1)
    assert json.loads((out / "markets.json").read_text()) == made["markets"]
    assert made["rows"] == {split: made["markets"]["de"][split] + mx[split] for split in SPLITS}


def test_the_pooled_data_are_the_markets(prepared: Any) -> None:
    out, _, _ = prepared
    for split in SPLITS:
        one_by_one = [pq.read_table(out / code / split) for code in ("de", "mx")]
        parts = sorted((out / "all" / split).iterdir(), key=lambda path: int(path.stem.removeprefix("part-")))
        assert pa.concat_tables(pq.read_table(part) for part in parts).equals(pa.concat_tables(one_by_one))


@pytest.mark.parametrize(("code", "expected"), [("de", 0.279), ("mx", 0.521)])
def test_popularity_ranks_as_measured_outside(prepared: Any, code: str, expected: float) -> None:
    """The README of the data has .283 and .524 by the protocol that keeps duplicates."""
    out, made, _ = prepared
    train, test = pq.read_table(out / code / "train"), pq.read_table(out / code / "test")
    times = defaultdict(int, {each["values"]: each["counts"] for each in count(train["item_id"])})
    score = np.array([times[item] for item in test["item_id"].to_pylist()]).reshape(-1, 100)
    positive = test["interaction"].to_numpy().reshape(-1, 100) == 1
    assert (positive.sum(axis=1) == 1).all()
    own = score[positive][:, None]
    above, alike = (score > own).sum(axis=1), (score == own).sum(axis=1)
    # The positive is as likely at each of the places that its equals share.
    gain = np.where(np.arange(100) < 10, 1 / np.log2(np.arange(100) + 2), 0)
    total = np.concatenate([[0], np.cumsum(gain)])
    ndcg = (total[above + alike] - total[above]) / alike
    assert ndcg.mean() == pytest.approx(expected, abs=5e-4)
    # That of docs/results.md breaks ties by chance.
    printed = results_xmarket.popularity(out / code, "test")
    assert printed.ndcg.mean() == pytest.approx(ndcg.mean(), abs=2e-3)
    assert len(printed.ndcg) == made["markets"][code]["users"] - made["markets"][code]["users_in_train_alone"]
    assert 0.006 < results_xmarket.standard_error(printed.ndcg) < 0.011


def count(column: pa.ChunkedArray) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = column.value_counts().to_pylist()
    return found


def test_jobs_fit_the_data(prepared: Any) -> None:
    out, made, events = prepared
    for file, folder, markets in (
        ("job.yaml", "all", ("de", "mx")),
        ("job_de.yaml", "de", ("de",)),
        ("job_mx.yaml", "mx", ("mx",)),
    ):
        job = read_job(str(out / file), [])
        assert (job.name, job.data.train, job.data.eval) == (
            f"xmarket-{folder}",
            f"{out}/{folder}/train",
            f"{out}/{folder}/valid",
        )
        schema = build_schema(job.schema_, job.model)
        assert schema.scenarios == markets
        header = (out / file).read_text().split("\nname: ")[0]
        assert all(word in header for word in ("mtlrec train", "Expected time", "Expected metric"))
        assert ("not known" in header) == (folder == "all"), "what nobody has measured is not expected"
        for split in SPLITS:
            dataset = Dataset.open(str(out / folder / split), schema.columns())
            counted = made["rows"] if folder == "all" else made["markets"][folder]
            assert dataset.rows == counted[split]
    assert {event["what"] for event in events} == {"read de_5core.txt", "read mx_5core.txt", "write"}
    for what in ("read de_5core.txt", "write"):
        last = [event for event in events if event["what"] == what][-1]
        assert last["done"] == last["total"] and last["seconds_left"] == 0


# Files made up here


def some_lines(items: int = 130, seed: int = 0) -> list[Line]:
    """Ratings with duplicates, and with dates that tie."""
    draw = np.random.default_rng(seed)
    return [
        (
            f"u{user}",
            f"B{draw.integers(items):03}",
            float(draw.integers(1, 6)),
            f"2019-01-0{draw.integers(1, 4)}",
        )
        for user in range(12)
        for _ in range(6)
    ] + [("once", "B000", 5.0, "2018-05-05")]


def write_market(folder: Path, code: str, lines: list[Line]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{code}_5core.txt"
    path.write_text(HEADER + "\n" + "".join(" ".join(map(str, line)) + "\n" for line in lines))
    return path


def read_tree(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


lines_ = st.lists(
    st.tuples(
        st.sampled_from(["ann", "bob", "cid"]),
        st.sampled_from([f"B{n}" for n in range(8)]),
        st.sampled_from([1.0, 4.0, 5.0]),
        st.sampled_from(["2010-02-03", "2010-02-04", "2011-01-01"]),
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=20)
@given(lines=lines_, order=st.randoms(use_true_random=False))
def test_the_protocol_on_any_ratings(
    tmp_path_factory: pytest.TempPathFactory, lines: list[Line], order: Any
) -> None:
    home = tmp_path_factory.mktemp("any")
    expected = plain_protocol(lines, "x1")
    write_market(home / "source", "x1", lines)
    if not expected["test"]:
        with pytest.raises(InputError, match="no user has 3 different items"):
            prepare_xmarket(str(home / "source"), str(home / "out"))
        return
    prepare_xmarket(str(home / "source"), str(home / "out"))
    for split in SPLITS:
        assert read_rows(pq.read_table(home / "out" / "x1" / split)) == expected[split]
    # The order of the lines tells nothing.
    order.shuffle(lines)
    write_market(home / "source", "x1", lines)
    before = read_tree(home / "out")
    prepare_xmarket(str(home / "source"), str(home / "out"), force=True)
    assert {**before, "markets.json": b""} == {**read_tree(home / "out"), "markets.json": b""}


def test_draws_are_uniform() -> None:
    users, items = 4000, 30
    names = pa.array([f"u{n:05}" for n in range(users)])
    everyone = np.arange(users)
    # Each rated the items 3 and 4 + n % 5.
    item = np.stack([np.full(users, 3), 4 + everyone % 5], axis=1).ravel()
    ratings = Ratings(
        names,
        pa.array([f"i{n:02}" for n in range(items)]),
        np.repeat(everyone, 2),
        item,
        np.ones(2 * users, np.float32),
        np.zeros(2 * users, np.int32),
    )
    drawn = Unrated(ratings).draw(everyone, "test", 7)
    assert drawn.shape == (users, 7) and all(len(set(row)) == 7 for row in drawn.tolist())
    assert not (drawn == 3).any() and not (drawn == 4 + everyone[:, None] % 5).any()
    times = np.bincount(drawn.ravel(), minlength=items)
    chance = np.where(np.isin(np.arange(items), range(4, 9)), 0.8, 1.0) * 7 / 28
    chance[3] = 0
    deviation = np.sqrt(users * chance * (1 - chance)) + 1e-9
    assert (np.abs(times - users * chance) < 4 * deviation).all()
    # Another purpose draws others; and all there are where more are wanted.
    assert (Unrated(ratings).draw(everyone, "valid", 7) != drawn).mean() > 0.5
    whole = Unrated(ratings).draw(everyone[:9], "test", 40)
    assert (whole[:, 28:] == -1).all() and all(len(set(row)) == 28 for row in whole[:, :28].tolist())


def test_parts_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_market(tmp_path / "source", "de", some_lines())
    prepare_xmarket(str(tmp_path / "source"), str(tmp_path / "one"))
    for name, value in (("_USERS_PART", 5), ("_TRAIN_PART", 20), ("_CHUNK", 7)):
        monkeypatch.setattr(xmarket, name, value)
    prepare_xmarket(str(tmp_path / "source"), str(tmp_path / "many"))
    for split in SPLITS:
        assert len(list((tmp_path / "many" / "de" / split).iterdir())) == 3
        for folder in ("de", "all"):
            one, many = (pq.read_table(tmp_path / made / folder / split) for made in ("one", "many"))
            assert one.equals(many)


def test_compressed_files_give_the_same(tmp_path: Path) -> None:
    path = write_market(tmp_path / "source", "no", some_lines())
    prepare_xmarket(str(tmp_path / "source"), str(tmp_path / "plain"))
    (tmp_path / "source" / "no_5core.txt.gz").write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(InputError, match="market no has another file"):
        prepare_xmarket(str(tmp_path / "source"), str(tmp_path / "out"))
    path.unlink()
    prepare_xmarket(str(tmp_path / "source"), str(tmp_path / "out"))
    assert read_tree(tmp_path / "out") == read_tree(tmp_path / "plain")
    # YAML's false is a market.
    job = read_job(str(tmp_path / "out" / "job_no.yaml"), [])
    assert build_schema(job.schema_, job.model).scenarios == ("no",)


def test_a_small_market_has_fewer_candidates_and_says_so(tmp_path: Path) -> None:
    write_market(tmp_path / "source", "tiny", some_lines(items=40))
    seen = [(f"w{user}", f"B{user}{item}", 4.0, "2019-01-01") for user in range(9) for item in range(30)]
    write_market(tmp_path / "source", "big", seen)
    events: list[dict[str, Any]] = []
    made = prepare_xmarket(str(tmp_path / "source"), str(tmp_path / "out"), progress=events.append)
    said = [event["text"] for event in events if event["kind"] == "log"]
    fewest = made["markets"]["tiny"]["fewest_candidates"]
    assert fewest < 40 and len(said) == 1 and f"only {fewest} candidates, not 100" in said[0]
    rows = count(pq.read_table(tmp_path / "out" / "tiny" / "test")["user_id"])
    assert min(each["counts"] for each in rows) == fewest
    # "once" rated one item: it trains, and is not asked about.
    assert made["markets"]["tiny"]["users_in_train_alone"] == 1 and len(rows) == 12


def refused(source: Path) -> str:
    """The message that refuses `source`; nothing may have been written."""
    out = source.parent / "out"
    with pytest.raises(InputError) as caught:
        prepare_xmarket(str(source), str(out))
    assert not out.exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("u1 B001 5.0", "line 9: 3 columns; every line has 4"),
        ("u1 B001 5.0 2019-01-01 more", "line 9: 5 columns"),
        ("u1  B001 5.0 2019-01-01", "line 9: 5 columns"),
        ("", "line 9: 1 columns"),
        (" B001 5.0 2019-01-01", "line 9, column userId: '' is not an id"),
        ("u1  5.0 2019-01-01", "line 9, column itemId: '' is not an id"),
        ("u1 B001 five 2019-01-01", "line 9, column rate: 'five' is not a rating from 1 to 5"),
        ("u1 B001 0.0 2019-01-01", "line 9, column rate: '0.0' is not a rating"),
        ("u1 B001 nan 2019-01-01", "line 9, column rate: 'nan' is not a rating"),
        ("u1 B001 5.0 2019-02-30", "line 9, column date: '2019-02-30' is not a date such as 2017-01-29"),
        ("u1 B001 5.0 20190101", "line 9, column date: '20190101' is not a date"),
        ("u1 2019-01-01 5.0 B001", "line 9, column date: 'B001' is not a date"),
        ("u1 B001\xe9 5.0 2019-01-01", "line 9: not plain text"),
        ("u" * 5000 + " B001 5.0 2019-01-01", "line 9: longer than 4096 bytes"),
    ],
)
def test_a_wrong_line_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: str
) -> None:
    monkeypatch.setattr(xmarket, "_CHUNK", 3)
    source = tmp_path / "source"
    path = write_market(source, "de", some_lines())
    write_market(source, "aa", some_lines(seed=1))
    found = path.read_text().split("\n")
    found[8] = text
    path.write_text("\n".join(found), encoding="latin-1")
    message = refused(source)
    assert message.startswith(f"{path}: ") and expected in message


def test_files_that_are_no_markets(tmp_path: Path) -> None:
    source = tmp_path / "source"
    assert "no market's file here" in refused(source)
    path = write_market(source, "de", some_lines())
    whole = path.read_bytes()
    path.rename(source / "ratings.txt")
    assert "no market's file here" in refused(source)
    path.write_bytes(whole[:-4])
    assert f"{path}: line {len(whole.splitlines())}: it does not end" in refused(source)
    path.write_bytes(whole[:-9] + b"\n")
    assert ", column date: " in refused(source)
    path.write_bytes(b"")
    assert f"{path}: line 1: ''; a market's file begins with {HEADER!r}" in refused(source)
    path.write_bytes(whole.split(b"\n", 1)[1])
    assert f"{path}: line 1: 'u0 " in refused(source)
    path.write_bytes(whole.replace(b"rate", b"rating", 1))
    assert f"{path}: line 1: 'userId itemId rating date'" in refused(source)
    path.write_bytes(HEADER.encode() + b"\n")
    assert f"{path}: line 2: no ratings" in refused(source)
    path.unlink()
    for name in ("all_5core.txt", "_5core.txt", "d e_5core.txt"):
        (source / name).write_bytes(whole)
        assert f"{source}/{name}: " in refused(source)
        (source / name).unlink()
    path = source / "de_5core.txt.gz"
    path.write_bytes(gzip.compress(whole)[:-30])
    assert f"{path}: line " in (message := refused(source)) and "cut short" in message


def test_force_replaces_our_files_alone(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    write_market(source, "de", some_lines())
    prepare_xmarket(str(source), str(out))
    alone = read_tree(out)
    gone = write_market(source, "fr", some_lines(seed=2))
    with pytest.raises(InputError, match="give --force to replace it"):
        prepare_xmarket(str(source), str(out))
    prepare_xmarket(str(source), str(out), force=True)
    assert (out / "fr" / "train" / "part-0.parquet").is_file() and (out / "job_fr.yaml").is_file()
    (out / "runs" / "xmarket-fr").mkdir(parents=True)
    (out / "runs" / "xmarket-fr" / "result.json").write_text("{}")
    (out / "job_mine.yaml").write_text("name: mine")
    gone.unlink()
    (source / "de_5core.txt").rename(source / "hidden")
    with pytest.raises(InputError, match="no market's file"):
        prepare_xmarket(str(source), str(out), force=True)
    assert (out / "job.yaml").is_file(), "files that are wrong must not cost those that are there"
    (source / "hidden").rename(source / "de_5core.txt")
    prepare_xmarket(str(source), str(out), force=True)
    assert read_tree(out) == {
        **alone,
        "runs/xmarket-fr/result.json": b"{}",
        "job_mine.yaml": b"name: mine",
    }
    (out / "all" / "train" / "mine.parquet").write_bytes(b"would be read as a shard")
    with pytest.raises(InputError, match=r"all/train/mine\.parquet is not of a prepare"):
        prepare_xmarket(str(source), str(out), force=True)
    (out / "markets.json").write_text("mine")
    with pytest.raises(InputError, match="not the file that a prepare writes"):
        prepare_xmarket(str(source), str(out), force=True)


@pytest.mark.parametrize("writes", [1, 2, 6, 9])
def test_an_interrupted_prepare_runs_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    source, whole, out = tmp_path / "source", tmp_path / "whole", tmp_path / "out"
    gone = write_market(source, "at", some_lines(seed=3))
    write_market(source, "de", some_lines())
    write, written = storage.write_stream, []

    def fail_later(url: str) -> Any:
        written.append(url)
        if len(written) == writes:
            raise KeyboardInterrupt
        return write(url)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_stream", fail_later)
        with pytest.raises(KeyboardInterrupt):
            prepare_xmarket(str(source), str(out))
    assert not (out / "job.yaml").exists()
    # Also where a market that was begun is no longer wanted.
    gone.unlink()
    prepare_xmarket(str(source), str(out))
    prepare_xmarket(str(source), str(whole))
    assert read_tree(out) == read_tree(whole)
