"""XMarket's 5-core files of any markets -> Parquet with candidates, and jobs; docs/xmarket.md tells how."""

from __future__ import annotations

import datetime
import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mtlrec import storage
from mtlrec.data.prepare.folder import JOB, OutFolder, Progress, Watch, silent
from mtlrec.data.prepare.leave_one_out import (
    FEWEST_ITEMS,
    Ratings,
    Unrated,
    candidates,
    split,
    without_duplicates,
)
from mtlrec.data.prepare.lines import Chunk, Lines
from mtlrec.data.prepare.xmarket_job import job_text
from mtlrec.job.errors import InputError

COLUMNS = ("userId", "itemId", "rate", "date")
"""Of a line, with single blanks between; the first line of a file has these names."""
NEGATIVES = 99
"""Candidates beside the positive one."""
POOLED = "all"
"""Folder of all markets together."""
SPLITS = ("train", "valid", "test")
MARKETS = "markets.json"
"""Written first and removed last: what the folders of an unfinished prepare are called."""

_FILE = re.compile(r"(?P<code>.*)_5core\.txt(\.gz)?")
_CODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,31}")
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_CHUNK = 16384
"""Lines that are parsed at a time."""
_TRAIN_PART = 262_144
"""Rows of a file of train, at most."""
_USERS_PART = 2048
"""Users of a file of valid or test, at most: 204,800 rows."""


def prepare_xmarket(
    source: str, out: str, *, force: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Read every `<code>_5core.txt` (or .txt.gz) in the folder `source`; write splits and jobs to `out`.

    Returns {"out": URL, "rows": {split: rows of all markets}, "markets": {code: counts}}. Nothing is written
    before every file has been read. `out` must be empty, or left by a prepare that did not finish; with
    `force` what an earlier one wrote is replaced, and nothing else is touched. Raises InputError that names
    file, line and column where there is no market's file, two of one market, or one that is not such a file
    or cut short.
    """
    show = progress or silent
    source, out = storage.make_absolute(source, "."), storage.make_absolute(out, ".")
    files = _find(source)
    codes = sorted({*files, *_earlier_markets(out)})
    folder = OutFolder(
        out,
        [f"{code}/{each}" for code in (*codes, POOLED) for each in SPLITS],
        [*(job_file(code) for code in codes), JOB, MARKETS],
        force=force,
    )
    markets = {code: Market(code, url, show) for code, url in files.items()}
    made = {code: market.counts() for code, market in markets.items()}
    rows = {each: sum(counts[each] for counts in made.values()) for each in SPLITS}
    folder.clear()
    folder.write_file(MARKETS, json.dumps(made, indent=1))
    # Every row stands twice: with its market, and with all.
    watch = Watch("write", 2 * sum(rows.values()), show)
    pooled = Counter[str]()
    for code, market in markets.items():
        for each in SPLITS:
            for number, table in enumerate(market.tables(each)):
                folder.write_part(f"{code}/{each}", number, table)
                folder.write_part(f"{POOLED}/{each}", pooled[each], table)
                pooled[each] += 1
                watch.add(2 * table.num_rows)
    jobs = {job_file(code): job_text(job_file(code), code, [code]) for code in markets}
    folder.write_jobs({**jobs, JOB: job_text(JOB, POOLED, list(markets))})
    return {"out": out, "rows": rows, "markets": made}


def job_file(code: str) -> str:
    """Name of the job that trains one market alone."""
    return f"job_{code}.yaml"


def _find(source: str) -> dict[str, str]:
    """Market -> URL of its file, sorted."""
    found: dict[str, str] = {}
    for file in storage.list_files(source):
        match = _FILE.fullmatch(file.path)
        if match is None or "/" in file.path:
            continue
        code = match["code"]
        if not _CODE.fullmatch(code) or code == POOLED:
            raise InputError(
                f"{file.url}: {code!r} is no code of a market: letters, digits and hyphens, and not {POOLED}"
            )
        if code in found:
            raise InputError(f"{file.url}: market {code} has another file, {found[code]}; keep one of them")
        found[code] = file.url
    if not found:
        raise InputError(
            f"{source}: no market's file here (CODE_5core.txt or CODE_5core.txt.gz); SRC is their folder"
        )
    return dict(sorted(found.items()))


def _earlier_markets(out: str) -> list[str]:
    """Markets that an earlier prepare may have left files of."""
    url = storage.join(out, MARKETS)
    try:
        earlier = json.loads(storage.read(url))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except ValueError:
        earlier = None
    if not isinstance(earlier, dict) or not all(_CODE.fullmatch(code) for code in earlier):
        raise InputError(f"{url}: not the file that a prepare writes; move it away, or name a new folder")
    return list(earlier)


class Market:
    """One market's ratings, split, and its candidates."""

    def __init__(self, code: str, url: str, show: Progress) -> None:
        self.code = code
        everything = _read(url, show)
        self._ratings = without_duplicates(everything)
        self._splits = split(self._ratings)
        if not len(self._splits["test"].user):
            raise InputError(
                f"{url}: no user has {FEWEST_ITEMS} different items, so nothing is left for valid and test"
            )
        self._unrated = Unrated(self._ratings)
        self._lines = len(everything.user)
        # A candidate is an item that the user never rated: a small market, or a busy user, has fewer.
        asked = self._splits["test"].user
        negatives = np.minimum(len(self._ratings.items) - np.bincount(self._ratings.user)[asked], NEGATIVES)
        self._fewest = int(negatives.min()) + 1
        candidates_ = int(negatives.sum()) + len(asked)
        self._rows = {"train": len(self._splits["train"].user), "valid": candidates_, "test": candidates_}
        if self._fewest <= NEGATIVES:
            text = (
                f"{url}: {len(self._ratings.items):,} items: some users have only {self._fewest} "
                f"candidates, not {NEGATIVES + 1}"
            )
            show({"kind": "log", "text": text})

    def counts(self) -> dict[str, int]:
        """What there is, for people."""
        users = len(self._ratings.users)
        return {
            "lines": self._lines,
            "ratings": len(self._ratings.user),
            "users": users,
            "items": len(self._ratings.items),
            "users_in_train_alone": users - len(self._splits["test"].user),
            "fewest_candidates": self._fewest,
            **self._rows,
        }

    def tables(self, each: str) -> Iterator[pa.Table]:
        """The rows of a split, in pieces that are a file each."""
        ratings = self._splits[each]
        if each == "train":
            for start in range(0, len(ratings.user), _TRAIN_PART):
                part = ratings.take(np.arange(start, min(start + _TRAIN_PART, len(ratings.user))))
                positive = np.ones(len(part.user), bool)
                yield self._table(part.user, part.item, positive, part.rating, part.date)
            return
        for start in range(0, len(ratings.user), _USERS_PART):
            part = ratings.take(np.arange(start, min(start + _USERS_PART, len(ratings.user))))
            yield self._table(**candidates(part, self._unrated, each, NEGATIVES))

    def _table(
        self,
        user: npt.NDArray[Any],
        item: npt.NDArray[Any],
        positive: npt.NDArray[Any],
        rating: npt.NDArray[Any],
        date: npt.NDArray[Any],
    ) -> pa.Table:
        return pa.table(
            {
                "user_id": self._ratings.users.take(user),
                "item_id": self._ratings.items.take(item),
                "market": pa.repeat(pa.scalar(self.code), len(user)),
                "interaction": pa.array(positive.astype(np.int8)),
                "rating": pa.array(rating, mask=~positive),
                "date": pa.array(date).cast(pa.date32()),
            }
        )


def _read(url: str, show: Progress) -> Ratings:
    """A market's file, every line of it."""
    lines = Lines(url)
    watch = Watch(f"read {storage.name(url)}", lines.size, show, "bytes")
    rest = iter(lines)
    header = next(rest, b"").decode().rstrip("\r\n")
    if header != " ".join(COLUMNS):
        raise InputError(f"{url}: line 1: {header[:80]!r}; a market's file begins with {' '.join(COLUMNS)!r}")
    chunks: list[pa.Table] = []
    count, seen = 1, 0
    while chunk := list(islice(rest, _CHUNK)):
        if not chunk[-1].endswith(b"\n"):
            number = count + len(chunk)
            raise InputError(
                f"{url}: line {number:,}: it does not end, the file is cut short; fetch it again"
            )
        chunks.append(_parse(chunk, count + 1, url))
        count += len(chunk)
        watch.add(lines.read - seen)
        seen = lines.read
    if not chunks:
        raise InputError(f"{url}: line 2: no ratings; the file is cut short; fetch it again")
    table = pa.concat_tables(chunks).unify_dictionaries().combine_chunks()
    users, user = _sorted_codes(table["userId"].chunk(0))
    items, item = _sorted_codes(table["itemId"].chunk(0))
    return Ratings(users, items, user, item, table["rate"].to_numpy(), table["date"].to_numpy())


def _parse(lines: list[bytes], first: int, url: str) -> pa.Table:
    """Lines, numbered from `first` -> text dictionaries, float32 rates, int32 days since 1970."""
    chunk = Chunk(lines, first, url, COLUMNS, " ")
    for name in ("userId", "itemId"):
        chunk.refuse(name, np.array([not text for text in chunk.texts(name)]), "an id")
    rate = chunk.numbers("rate", 1, 5, "a rating from 1 to 5")
    days = np.array([_days(text) for text in chunk.texts("date")])
    chunk.refuse("date", np.isnan(days), "a date such as 2017-01-29")
    return pa.table(
        {
            **{name: chunk.columns[name] for name in ("userId", "itemId")},
            "rate": pa.array(rate.astype(np.float32)),
            "date": pa.array(days[chunk.columns["date"].indices.to_numpy()].astype(np.int32)),
        }
    )


def _days(text: str) -> float:
    """Days since 1970, or NaN."""
    try:
        date = datetime.date.fromisoformat(text) if _DATE.fullmatch(text) else None
    except ValueError:
        date = None
    return float("nan") if date is None else (date - datetime.date(1970, 1, 1)).days


def _sorted_codes(column: pa.DictionaryArray) -> tuple[pa.StringArray, npt.NDArray[np.int64]]:
    """The distinct texts, sorted; and for each row the place of its text among them."""
    order = pc.array_sort_indices(column.dictionary)
    place = np.empty(len(order), np.int64)
    place[order.to_numpy()] = np.arange(len(order))
    return column.dictionary.take(order), place[column.indices.to_numpy()]
