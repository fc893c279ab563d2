"""Vocabularies in a checkpoint: saved and read back whole, and refused where anything is wrong with them."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import safetensors
import safetensors.numpy

from mtlrec.checkpoint import ranges
from mtlrec.checkpoint.inspect import inspect_checkpoint, render
from mtlrec.checkpoint.manifest import checksum, read_manifest
from mtlrec.checkpoint.save import finish, save
from mtlrec.checkpoint.vocabularies import load_vocabularies
from mtlrec.data.vocabulary import Vocabulary, count
from mtlrec.job.errors import InputError
from tests.checkpoint.tables import ALONE, cut, make_table, meta_of, save_ranks
from tests.checkpoint.test_manifest import rewrite

ITEM = "vocabularies/item.safetensors"


def make(ids: list[Any], kind: pa.DataType, reserved: int) -> Vocabulary:
    return count([pa.chunked_array([pa.array(ids, kind)])]).to_vocabulary(reserved)


NUMBERS = [number * 7919 - 10**6 for number in range(9_000)]
VOCABULARIES = {
    "user": make([*NUMBERS, *NUMBERS[:100]], pa.int64(), 1),
    "item": make([f"ä{number}" for number in range(5_000)] + [""], pa.string(), 3),
    "wide": make([0, 2**64 - 1], pa.uint64(), 1),
    "raw": make([b"\xff", b""], pa.binary(), 1),
    "empty": make([""], pa.string(), 1),
}
TABLES = [make_table(name, each.rows, 4) for name, each in VOCABULARIES.items()]


def save_here(folder: Path) -> str:
    blocks = [block for table in TABLES for block in cut(table)]
    save_ranks(str(folder), [blocks, []], TABLES, vocabularies=VOCABULARIES)
    return str(folder)


@pytest.fixture
def saved(tmp_path: Path) -> str:
    return save_here(tmp_path / "saved")


def test_read_back_whole(saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "PIECE_BYTES", 2**15)
    manifest = read_manifest(saved)
    found = load_vocabularies(saved, manifest)
    assert found == VOCABULARIES and list(found) == list(VOCABULARIES)
    assert found["item"].raw_ids().to_pylist() == VOCABULARIES["item"].raw_ids().to_pylist()
    np.testing.assert_array_equal(
        found["user"].look_up(found["user"].hashes), np.arange(1, 1 + len(found["user"]))
    )
    finish(saved, {"all": {}})
    assert load_vocabularies(saved, read_manifest(saved)) == VOCABULARIES


def test_the_collective_saves_them(tmp_path: Path) -> None:
    table = make_table("raw", 3, 4)
    url = str(tmp_path / "saved")
    some = {"raw": VOCABULARIES["raw"]}
    manifest = save(url, cut(table), {}, meta_of([table]), ALONE, some)
    assert manifest is not None and load_vocabularies(url, manifest) == some


def test_files_are_safetensors(saved: str) -> None:
    """As docs/checkpoints.md tells it to other programs; the names are pinned."""
    item = safetensors.numpy.load_file(Path(saved, ITEM))
    assert {name: (str(array.dtype), array.shape) for name, array in item.items()} == {
        "hashes": ("int64", (5_001,)),
        "counts": ("int64", (5_001,)),
        "offsets": ("int64", (5_002,)),
        "ids": ("uint8", (len("".join(VOCABULARIES["item"].ids.to_pylist()).encode()),)),
    }
    begin, end = item["offsets"][17:19]
    assert item["ids"][begin:end].tobytes().decode() == VOCABULARIES["item"].ids[17].as_py()
    with safetensors.safe_open(Path(saved, ITEM), "np") as file:
        assert file.metadata() == {"table": "item", "kind": "string", "reserved": "3"}
    user = safetensors.numpy.load_file(Path(saved, "vocabularies/user.safetensors"))
    assert set(user) == {"hashes", "counts", "ids"}
    assert user["ids"].tolist() == VOCABULARIES["user"].ids.to_pylist()
    body = json.loads(Path(saved, "manifest.json").read_bytes())["vocabularies"]
    assert {key: body["item"][key] for key in ("file", "kind", "ids", "reserved")} == {
        "file": ITEM,
        "kind": "string",
        "ids": 5_001,
        "reserved": 3,
    }


def test_a_checkpoint_from_before_there_were_any(saved: str) -> None:
    path = Path(saved, "manifest.json")
    lines = path.read_bytes().splitlines(keepends=True)
    assert lines[-2].startswith(b'"vocabularies": ') and lines[-3].startswith(b'"dense": ')
    rest = b"".join(lines[1:-2]).removesuffix(b",\n") + b"\n}\n"
    first = f'{{"format": "mtlrec checkpoint", "version": 1, "checksum": "{checksum(rest)}",\n'
    path.write_bytes(first.encode() + rest)
    manifest = read_manifest(saved)
    assert manifest.vocabularies == {} == load_vocabularies(saved, manifest)
    assert "vocabulary" not in render(inspect_checkpoint(saved))


def test_inspect(saved: str) -> None:
    found = inspect_checkpoint(saved, verify=True)
    size = Path(saved, ITEM).stat().st_size
    item = {"table": "item", "kind": "string", "ids": 5_001, "reserved": 3, "bytes": size}
    assert found["vocabularies"][1] == item and len(found["vocabularies"]) == 5
    lines = render(found).splitlines()
    assert ["vocabulary", "ids", "kind", "reserved", "rows", "on", "disk"] in [line.split() for line in lines]
    shown = next(line for line in lines if line.startswith("item ") and "string" in line)
    assert shown.split() == ["item", "5,001", "string", "3", f"{size / 1000:.1f}", "KB"]


@pytest.mark.parametrize("at", [0.0, 0.001, 0.3, 0.6, 0.9, 0.99999])
def test_a_flipped_bit_is_found(saved: str, at: float) -> None:
    path = Path(saved, ITEM)
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 4
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"vocabularies/item\.safetensors: damaged"):
        inspect_checkpoint(saved, verify=True)
    if at > 0.01:  # the header is not needed to read what the manifest tells of
        with pytest.raises(InputError, match=r"vocabularies/item\.safetensors: damaged: rows [\d,]+ to"):
            load_vocabularies(saved, read_manifest(saved))


def test_a_short_or_missing_file_is_found(saved: str) -> None:
    path = Path(saved, ITEM)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"item\.safetensors: truncated"):
        read_manifest(saved)
    path.unlink()
    with pytest.raises(InputError, match=r"item\.safetensors: the file is missing"):
        read_manifest(saved)


@pytest.mark.parametrize(
    ("table", "change", "problem"),
    [
        ("item", {"reserved": 0}, "vocabularies.item: 0 reserved rows"),
        ("item", {"reserved": 4}, "4 reserved rows and 5,001 ids in a table of 5,004 rows"),
        ("item", {"ids": 5_000}, "not those of 5,000 ids of kind string"),
        ("item", {"ids": 2**50}, "ids in a table of 5,004 rows"),
        ("item", {"kind": "int64"}, "not those of 5,001 ids of kind int64"),
        ("user", {"kind": "binary"}, "not those of 9,000 ids of kind binary"),
        (
            "item",
            {"kind": "pickle"},
            "vocabularies.item.kind: input should be 'int64', 'uint64', 'string' or",
        ),
        ("item", {"file": "../item.safetensors"}, "not the name of a .safetensors file"),
        ("item", {"file": "vocabularies/user.safetensors"}, "stands twice"),
    ],
)
def test_a_manifest_that_contradicts_itself(
    saved: str, table: str, change: dict[str, Any], problem: str
) -> None:
    def edit(body: dict[str, Any]) -> None:
        body["vocabularies"][table].update(change)

    rewrite(Path(saved), edit)
    with pytest.raises(InputError, match=problem):
        read_manifest(saved)


def test_of_no_table_or_with_other_tensors(saved: str) -> None:
    def rename(body: dict[str, Any]) -> None:
        body["vocabularies"]["gone"] = body["vocabularies"].pop("raw")

    rewrite(Path(saved), rename)
    with pytest.raises(InputError, match=r"vocabularies\.gone: there is no such table"):
        read_manifest(saved)

    def drop(body: dict[str, Any]) -> None:
        body["vocabularies"]["raw"] = body["vocabularies"].pop("gone")
        tensors = body["vocabularies"]["raw"]["tensors"]
        tensors["other"] = tensors.pop("hashes")

    rewrite(Path(saved), drop)
    with pytest.raises(InputError, match=r"vocabularies\.raw\.tensors: they are not those of 2 ids"):
        read_manifest(saved)


def test_arrays_that_contradict_themselves(tmp_path: Path) -> None:
    """Checksums hold, and yet it is no vocabulary: a stranger's checkpoint."""
    good = VOCABULARIES["user"]
    bad = Vocabulary(good.hashes[::-1].copy(), good.ids, good.counts, 1)
    table = make_table("user", good.rows, 4)
    url = str(tmp_path / "saved")
    save_ranks(url, [cut(table)], [table], vocabularies={"user": bad})
    with pytest.raises(InputError, match=r"user\.safetensors: its hashes do not increase; copy the"):
        load_vocabularies(url, read_manifest(url))


def test_memory_is_that_of_the_file(saved: str) -> None:
    manifest = read_manifest(saved)
    size = sum(entry.size for entry in manifest.vocabularies.values())
    tracemalloc.start()
    load_vocabularies(saved, manifest)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2.5 * size


def test_works_without_torch(saved: str) -> None:
    script = (
        "import sys\n"
        "for name in ('torch', 'safetensors', 'ray'): sys.modules[name] = None\n"
        "from mtlrec.checkpoint.manifest import read_manifest\n"
        "from mtlrec.checkpoint.vocabularies import load_vocabularies\n"
        f"print(load_vocabularies({saved!r}, read_manifest({saved!r}))['raw'].raw_ids().to_pylist())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(VOCABULARIES["raw"].raw_ids().to_pylist())
