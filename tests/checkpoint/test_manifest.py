"""A checkpoint that is damaged, or lies, is refused in one line that names the file and says what to do."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtlrec import storage
from mtlrec.checkpoint.folder import checkpoint_url
from mtlrec.checkpoint.inspect import inspect_checkpoint
from mtlrec.checkpoint.load import load_dense, load_tables
from mtlrec.checkpoint.manifest import (
    MAX_MANIFEST_BYTES,
    Manifest,
    check_tables,
    checksum,
    encode,
    find_problem,
    read_manifest,
)
from mtlrec.job.errors import InputError
from mtlrec.schema import Table
from tests.checkpoint.tables import FakeTable, blank, cut, make_table, random_bits, save_ranks

TABLE = make_table("user", 9_000, 4)
SECOND = "tables/user/000000005000.safetensors"


def save_run(run: Path, steps: tuple[int, ...] = (10, 20)) -> list[Path]:
    """A run with complete checkpoints, two blocks of rows and of columns in each; their folders."""
    other = make_table("item", 50, 4, "element")
    urls = [checkpoint_url(str(run), step, 1) for step in steps]
    for url, step in zip(urls, steps, strict=True):
        ranks = [cut(TABLE, [5_000])[:1], [*cut(TABLE, [5_000])[1:], *cut(other, [], [2])]]
        save_ranks(url, ranks, [TABLE, other], {"weights.trunk": random_bits([5, 3], 3)}, step=step)
    return [Path(url) for url in urls]


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, Path]:
    """The older and the newer checkpoint of a run."""
    older, newer = save_run(tmp_path / "run")
    return older, newer


def refusal(action: Callable[[], Any]) -> str:
    with pytest.raises(InputError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700, message
    return message


def use(folder: Path) -> None:
    """All that a program does with a checkpoint."""
    manifest = read_manifest(str(folder))
    read = blank(TABLE)
    load_tables(str(folder), manifest, cut(read))
    load_dense(str(folder), manifest)


def change(path: Path, damage: Callable[[bytes], bytes]) -> None:
    path.write_bytes(damage(path.read_bytes()))


def rewrite(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """A manifest that says something else, with a checksum that holds."""
    body = json.loads((folder / "manifest.json").read_bytes())
    edit(body)
    head = {key: body.pop(key) for key in ("format", "version", "checksum")}
    text = "".join(f'"{key}": {json.dumps(value)},\n' for key, value in body.items())
    rest = text.removesuffix(",\n").encode() + b"\n}\n"
    first = f'{{"format": {json.dumps(head["format"])}, "version": {head["version"]}, '
    (folder / "manifest.json").write_bytes(
        first.encode() + f'"checksum": "{checksum(rest)}",\n'.encode() + rest
    )


def flip(data: bytes, at: int, bit: int = 0) -> bytes:
    return data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :]


def test_rewrite_leaves_what_it_does_not_edit(run: tuple[Path, Path]) -> None:
    before = (run[1] / "manifest.json").read_bytes()
    rewrite(run[1], lambda body: None)
    assert (run[1] / "manifest.json").read_bytes() == before
    use(run[1])


@pytest.mark.parametrize("file", [SECOND, "dense.safetensors"])
def test_truncated_file(run: tuple[Path, Path], file: str) -> None:
    older, newer = run
    size = (newer / file).stat().st_size
    change(newer / file, lambda data: data[:-1])
    message = refusal(lambda: use(newer))
    assert message.startswith(f"{newer}/{file}: truncated: {size - 1:,} bytes of {size:,}; ")
    assert f"use the checkpoint before it, {older}" in message


def test_file_with_more_bytes(run: tuple[Path, Path]) -> None:
    size = (run[1] / SECOND).stat().st_size
    change(run[1] / SECOND, lambda data: data + b"x")
    words = f"{run[1]}/{SECOND}: {size + 1:,} bytes where {size:,} were written"
    assert words in refusal(lambda: use(run[1]))


@pytest.mark.parametrize("file", [SECOND, "dense.safetensors"])
def test_missing_file(run: tuple[Path, Path], file: str) -> None:
    older, newer = run
    (newer / file).unlink()
    message = refusal(lambda: use(newer))
    assert message.startswith(f"{newer}/{file}: the file is missing; ") and str(older) in message


def test_flipped_bit_of_a_table(run: tuple[Path, Path]) -> None:
    older, newer = run
    change(newer / SECOND, lambda data: flip(data, len(data) - 16_000 - 1, 6))
    message = refusal(lambda: use(newer))
    assert message.startswith(f"{newer}/{SECOND}: damaged: rows 0 to 4,000 of 'weights' do not match")
    assert f"use the checkpoint before it, {older}" in message


def test_flipped_bit_of_the_dense_part(run: tuple[Path, Path]) -> None:
    change(run[1] / "dense.safetensors", lambda data: flip(data, len(data) - 1))
    assert "dense.safetensors: damaged: rows 0 to 5 of 'weights.trunk'" in refusal(lambda: use(run[1]))


def test_a_rank_is_not_bothered_by_damage_elsewhere(run: tuple[Path, Path]) -> None:
    change(run[1] / SECOND, lambda data: flip(data, len(data) - 1))
    load_tables(str(run[1]), read_manifest(str(run[1])), cut(blank(TABLE), [5_000])[:1])


@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_no_flipped_bit_of_a_manifest_goes_unseen(
    tmp_path_factory: pytest.TempPathFactory, where: float, bit: int
) -> None:
    folder = save_run(tmp_path_factory.mktemp("flip"), (10,))[0]
    change(folder / "manifest.json", lambda data: flip(data, int(where * len(data)), bit))
    assert "manifest.json" in refusal(lambda: use(folder))


@pytest.mark.parametrize("file", ["tables/user/000000000000.safetensors", "dense.safetensors"])
def test_verify_finds_a_flipped_bit_anywhere(run: tuple[Path, Path], file: str) -> None:
    whole = (run[1] / file).read_bytes()
    for at in {0, 5, 8, 30, len(whole) // 2, len(whole) - 1}:
        (run[1] / file).write_bytes(flip(whole, at, 3))
        assert f"{run[1]}/{file}: damaged" in refusal(lambda: inspect_checkpoint(str(run[1]), verify=True))
    (run[1] / file).write_bytes(whole)
    assert inspect_checkpoint(str(run[1]), verify=True)["verified"]


def test_without_an_earlier_checkpoint(tmp_path: Path) -> None:
    folder = save_run(tmp_path, (10,))[0]
    (folder / SECOND).unlink()
    assert "no complete checkpoint comes before it: copy it again" in refusal(lambda: use(folder))
    copied = tmp_path / "copied"
    folder.rename(copied)
    assert refusal(lambda: use(copied)).endswith("copy the checkpoint again from where it was made")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "manifest.json: empty"),
        (b"hello", "not valid JSON"),
        (b'{"format": "mtlrec checkpoint", "version": 1,', "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b'{"format": NaN}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"format": ' + b"9" * 5_000 + b"}", "not valid JSON"),
        (b"[]", "not the manifest of an mtlrec checkpoint"),
        (b'{"format": "pt"}', "not the manifest of an mtlrec checkpoint"),
        (b'{"format": "mtlrec checkpoint", "version": "1"}', "version: '1' is not a format version"),
        (b'{"format": "mtlrec checkpoint", "version": true}', "version: True is not a format version"),
        (b'{"format": "mtlrec checkpoint", "version": 0}', "version: 0 is not a format version"),
        (b'{"format": "mtlrec checkpoint", "version": 1}', "does not match its own checksum"),
        (pickle.dumps({"format": "mtlrec checkpoint"}), "not valid JSON"),
    ],
)
def test_what_is_not_a_manifest(run: tuple[Path, Path], text: bytes, words: str) -> None:
    (run[1] / "manifest.json").write_bytes(text)
    message = refusal(lambda: use(run[1]))
    assert f"{run[1]}/manifest.json: " in message and words in message


def test_newer_format(run: tuple[Path, Path]) -> None:
    newer = {"format": "mtlrec checkpoint", "version": 2, "meta": {"mtlrec_version": "7.1"}, "new": [1]}
    (run[1] / "manifest.json").write_text(json.dumps(newer))
    message = refusal(lambda: use(run[1]))
    assert "format version 2 (written by mtlrec 7.1)" in message and "install a newer one" in message


def test_a_manifest_of_absurd_size(run: tuple[Path, Path]) -> None:
    with (run[1] / "manifest.json").open("ab") as file:
        file.truncate(MAX_MANIFEST_BYTES + 1)
    assert f"no manifest has more than {MAX_MANIFEST_BYTES:,}" in refusal(lambda: use(run[1]))


def test_keys_of_later_programs_are_passed_over(run: tuple[Path, Path]) -> None:
    def edit(body: dict[str, Any]) -> None:
        body["index"] = {"new": 1}
        body["tables"]["user"]["blocks"][0]["note"] = "new"

    rewrite(run[1], edit)
    use(run[1])


def block(body: dict[str, Any], number: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = body["tables"]["user"]["blocks"][number]
    return found


def widen(body: dict[str, Any]) -> None:
    """800 TB in one block, without a contradiction in it: only the file is not that long."""
    entry = block(body)
    body["tables"]["user"]["blocks"] = [entry]
    weights = entry["tensors"]["weights"]
    del entry["tensors"]["state.sum"]
    rows = 4096 * 50
    weights.update(shape=[rows, 2**30], bytes=rows * 2**32, checksums=weights["checksums"][:1] * 50)
    entry.update(rows=rows, columns=2**30, size=weights["offset"] + rows * 2**32)
    body["tables"]["user"].update(rows=rows, dim=2**30)
    next(t for t in body["meta"]["schema"]["tables"] if t["name"] == "user").update(rows=rows, dim=2**30)


LIES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no dense": (lambda b: b.pop("dense"), "dense: field required"),
    "chunks": (lambda b: b.update(chunk_rows=8), "chunk_rows"),
    "type": (lambda b: block(b).update(row="0"), "tables.user.blocks.0.row: input should be a valid integer"),
    "true": (lambda b: block(b).update(row=True), "blocks.0.row"),
    "negative": (lambda b: block(b).update(row=-1), "blocks.0.row"),
    "enormous": (lambda b: block(b).update(rows=2**60), "blocks.0.rows"),
    "dtype": (lambda b: block(b)["tensors"]["weights"].update(dtype="F128"), "weights.dtype"),
    "checksum": (lambda b: block(b)["tensors"]["weights"].update(checksums=["0"]), "checksums.0"),
    "too few checksums": (
        lambda b: block(b)["tensors"]["weights"]["checksums"].pop(),
        "weights: 1 checksums for 5,000 rows",
    ),
    "shape": (
        lambda b: block(b)["tensors"]["weights"].update(shape=[5000, 2, 2]),
        "weights: shape [5000, 2, 2] in a block of 5,000 rows and 4 columns",
    ),
    "bytes": (
        lambda b: block(b)["tensors"]["weights"].update(bytes=1),
        "weights: 1 bytes for shape [5000, 4] of 4-byte elements",
    ),
    "overlap": (
        lambda b: block(b)["tensors"]["state.sum"].update(offset=block(b)["tensors"]["weights"]["offset"]),
        "begins at byte",
    ),
    "in the header": (lambda b: block(b)["tensors"]["weights"].update(offset=0), "a header of 0 bytes"),
    "beyond the end": (lambda b: block(b).update(size=50_000), "its tensors end at byte"),
    "more at the end": (lambda b: block(b).update(size=10**12), "its tensors end at byte"),
    "state name": (
        lambda b: block(b)["tensors"].update(other=block(b)["tensors"].pop("state.sum")),
        "'other' is neither 'weights' nor 'state.<name>'",
    ),
    "no weights": (lambda b: block(b)["tensors"].pop("weights"), "blocks.0"),
    "other tensors": (
        lambda b: block(b, 1)["tensors"].update({"state.x": block(b, 1)["tensors"].pop("state.sum")}),
        "blocks.1: its tensors differ",
    ),
    "gap": (lambda b: block(b, 1).update(row=5001), "row 5,000 is not there just once"),
    "twice": (lambda b: block(b, 1).update(row=4999), "row 4,999 is not there just once"),
    "first rows": (lambda b: b["tables"]["user"]["blocks"].pop(0), "row 0 is not there just once"),
    "last rows": (lambda b: b["tables"]["user"]["blocks"].pop(), "5,000 rows of 9,000"),
    "last columns": (lambda b: b["tables"]["item"]["blocks"].pop(), "2 columns of 4"),
    "first columns": (lambda b: b["tables"]["item"]["blocks"].pop(0), "column 0 is not there just once"),
    "no blocks": (lambda b: b["tables"]["user"].update(blocks=[]), "tables.user: 0 columns of 4"),
    "one file twice": (
        lambda b: block(b, 1).update(file=block(b)["file"]),
        "'tables/user/000000000000.safetensors' stands twice",
    ),
    "rows": (lambda b: b["tables"]["user"].update(rows=10_000), "'user' is 10,000 x 4"),
    "table left out": (lambda b: b["tables"].pop("item"), "table 'item' is not in the checkpoint"),
    "schema": (lambda b: b["meta"].update(schema={"tables": [["user", 1, 2]]}), "meta: schema.tables.0"),
    "extra table": (lambda b: b["meta"]["schema"]["tables"].pop(), "is in no feature"),
    "no step": (lambda b: b["meta"].pop("step"), "meta: step: field required"),
    "step": (lambda b: b["meta"].update(step="7"), "meta: step"),
    "metrics": (lambda b: b["meta"].update(metrics={"all": 3}), "meta: metrics.all"),
    "far beyond the file": (widen, "truncated"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_lies(run: tuple[Path, Path], lie: str) -> None:
    edit, words = LIES[lie]
    rewrite(run[1], edit)
    message = refusal(lambda: use(run[1]))
    assert words in message and str(run[1]) in message and str(run[0]) in message


@pytest.mark.parametrize(
    "name",
    [
        "../../../outside.safetensors",
        "tables/../../../outside.safetensors",
        "/etc/passwd",
        "/tmp/outside.safetensors",
        "tables//user.safetensors",
        "./dense.safetensors",
        "tables/.hidden.safetensors",
        "tables\\..\\outside.safetensors",
        "C:outside.safetensors",
        "s3://bucket/outside.safetensors",
        "tables/user",
        "tables/user\n.safetensors",
        "manifest.json",
        "",
    ],
)
def test_no_file_name_leads_out(run: tuple[Path, Path], name: str) -> None:
    outside = run[1].parents[2] / "outside.safetensors"
    outside.write_bytes((run[1] / "dense.safetensors").read_bytes())
    rewrite(run[1], lambda body: body["dense"].update(file=name))
    assert f"dense.file: {name!r} is not the name of a .safetensors file inside" in refusal(
        lambda: use(run[1])
    )


def test_no_link_leads_out(run: tuple[Path, Path]) -> None:
    outside = run[1].parents[2] / "outside"
    file, folder = run[1] / "dense.safetensors", run[1] / "tables/user"
    file.rename(outside)
    file.symlink_to(outside)
    assert f"{file}: a symbolic link" in refusal(lambda: use(run[1]))
    file.unlink()
    outside.rename(file)
    folder.rename(outside)
    folder.symlink_to(outside)
    assert f"{folder}: a symbolic link" in refusal(lambda: use(run[1]))
    folder.unlink()
    outside.rename(folder)
    link = run[1].parents[2] / "link"
    link.symlink_to(run[1])
    use(link)  # the folder itself may be reached by one


def test_a_pickle_is_data_like_any_other(run: tuple[Path, Path]) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(run[1] / "exploded"),)

    data = pickle.dumps(Bomb())
    (run[1] / "dense.safetensors").write_bytes(
        data.ljust((run[1] / "dense.safetensors").stat().st_size, b"\0")
    )
    assert "dense.safetensors: damaged" in refusal(lambda: use(run[1]))
    (run[1] / "manifest.json").write_bytes(data)
    refusal(lambda: use(run[1]))
    assert not (run[1] / "exploded").exists()


def test_nothing_is_read_of_a_checkpoint_that_lies(
    run: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is memory taken: no byte of any file but the manifest is asked for."""
    asked: list[str] = []

    def record(name: str) -> None:
        original = getattr(storage, name)

        def recorded(url: str, *rest: Any) -> Any:
            asked.append(storage.name(url))
            return original(url, *rest)

        monkeypatch.setattr(storage, name, recorded)

    record("read_ranges")
    record("read_into")
    rewrite(run[1], widen)
    refusal(lambda: use(run[1]))
    assert set(asked) <= {"manifest.json"}


def schema_table(name: str, rows: int, dim: int) -> Table:
    return Table(name, rows, dim, "hash", "sum", name, (name,))


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ([("user", 9_000, 4)], "the checkpoint's table 'item' is in no feature"),
        (
            [("user", 9_001, 4), ("item", 50, 4)],
            "'user' is 9,000 x 4 (rows x dim) in the checkpoint, not 9,001 x 4",
        ),
        (
            [("user", 9_000, 4), ("item", 50, 8)],
            "'item' is 50 x 4 (rows x dim) in the checkpoint, not 50 x 8",
        ),
        ([("user", 9_000, 4), ("item", 50, 4), ("new", 1, 4)], "table 'new' is not in the checkpoint"),
    ],
)
def test_check_tables(run: tuple[Path, Path], tables: list[tuple[str, int, int]], words: str) -> None:
    manifest = read_manifest(str(run[1]))
    check_tables(str(run[1]), manifest, [schema_table("item", 50, 4), schema_table("user", 9_000, 4)])
    message = refusal(lambda: check_tables(str(run[1]), manifest, [schema_table(*each) for each in tables]))
    assert message.startswith(f"{run[1]}: does not fit this model: ") and words in message


def test_encode_is_stable_and_reads_back(run: tuple[Path, Path]) -> None:
    text = (run[1] / "manifest.json").read_bytes()
    manifest = read_manifest(str(run[1]))
    assert encode(manifest) == text and find_problem(manifest) is None
    assert Manifest.model_validate(json.loads(text)) == manifest
    assert json.loads(text)["version"] == 1


def test_meta_that_json_cannot_hold_is_no_checkpoint(tmp_path: Path) -> None:
    table = FakeTable("user", torch.zeros(3, 4), {})
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_ranks(
            str(tmp_path / "saved"), [cut(table)], [table], metrics={"all": {"a": {"auc": float("nan")}}}
        )
    assert not (tmp_path / "saved/manifest.json").exists()
