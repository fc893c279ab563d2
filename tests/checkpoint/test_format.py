"""The format, byte for byte, as docs/checkpoints.md tells it to other programs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
import xxhash

from mtlrec.checkpoint import parts
from mtlrec.checkpoint.parts import BLOCK_BYTES, BLOCK_ROWS
from tests.checkpoint.tables import cut, make_table, random_bits, same_bits, save_ranks


def test_files_are_safetensors(tmp_path: Path) -> None:
    table = make_table("user", 10_000, 6)
    dense = {"a": random_bits([3], 1, torch.uint8), "b": random_bits([2, 2], 2), "c": torch.tensor(2.5)}
    url = str(tmp_path / "saved")
    save_ranks(url, [[block] for block in cut(table, [5_001])], [table], dense)
    loaded = safetensors.torch.load_file(tmp_path / "saved/dense.safetensors")
    assert loaded.keys() == dense.keys() and all(same_bits(loaded[name], dense[name]) for name in dense)
    second = safetensors.numpy.load_file(tmp_path / "saved/tables/user/000000005001.safetensors")
    assert second["weights"].tobytes() == table.weights[5_001:].numpy().tobytes()
    assert second["state.sum"].tobytes() == table.state["sum"][5_001:].numpy().tobytes()
    with safetensors.safe_open(tmp_path / "saved/tables/user/000000005001.safetensors", "np") as file:
        assert file.metadata() == {"table": "user", "row": "5001", "column": "0"}


def test_names_in_a_checkpoint_are_these(tmp_path: Path) -> None:
    """Pinned: every checkpoint there is has them. Another name needs another format version."""
    table, other = make_table("user", 70_000, 4), make_table("item", 3, 8, "element", seed=5)
    ranks = [[*cut(table, [66_000])[:1], *cut(other, [], [4])], cut(table, [66_000])[1:]]
    save_ranks(str(tmp_path / "saved"), ranks, [table, other], {"weights.trunk": torch.zeros(2, 3)})
    files = sorted(
        str(path.relative_to(tmp_path / "saved")) for path in tmp_path.rglob("*") if path.is_file()
    )
    assert files == [
        "dense.safetensors",
        "manifest.json",
        "tables/item/000000000000.c0004.safetensors",
        "tables/item/000000000000.safetensors",
        "tables/user/000000000000.safetensors",
        "tables/user/000000065536.safetensors",
        "tables/user/000000066000.safetensors",
    ]
    text = (tmp_path / "saved/manifest.json").read_bytes()
    first, _, rest = text.partition(b"\n")
    digest = xxhash.xxh3_64_hexdigest(rest)
    assert first.decode() == f'{{"format": "mtlrec checkpoint", "version": 1, "checksum": "{digest}",'
    body = json.loads(text)
    assert list(body) == [
        "format", "version", "checksum", "chunk_rows", "meta", "tables", "dense", "vocabularies",
    ]  # fmt: skip
    assert body["chunk_rows"] == 4096
    assert sorted(body["meta"]) == [
        "attempt", "data", "job", "metrics", "mtlrec_version", "position", "saved_at", "schema",
        "schema_fingerprint", "step",
    ]  # fmt: skip
    assert (body["tables"]["user"]["rows"], body["tables"]["user"]["dim"]) == (70_000, 4)
    last = body["tables"]["user"]["blocks"][2]
    data = (tmp_path / "saved" / last["file"]).read_bytes()
    weights, sums = table.weights[66_000:].numpy().tobytes(), table.state["sum"][66_000:].numpy().tobytes()
    start = len(data) - len(weights) - len(sums)
    assert last == {
        "file": "tables/user/000000066000.safetensors",
        "size": len(data),
        "header_checksum": xxhash.xxh3_64_hexdigest(data[:start]),
        "tensors": {
            "weights": {
                "dtype": "F32",
                "shape": [4000, 4],
                "offset": start,
                "bytes": 64_000,
                "checksums": [xxhash.xxh3_64_hexdigest(weights)],
            },
            "state.sum": {
                "dtype": "F32",
                "shape": [4000],
                "offset": start + 64_000,
                "bytes": 16_000,
                "checksums": [xxhash.xxh3_64_hexdigest(sums)],
            },
        },
        "row": 66_000,
        "rows": 4000,
        "column": 0,
        "columns": 4,
    }
    assert data[start:] == weights + sums


def test_the_reader_in_the_documentation_works(tmp_path: Path) -> None:
    table = make_table("user", 70_000, 8, "none")
    save_ranks(str(tmp_path / "saved"), [cut(table, [], [4])], [table])
    text = Path(__file__).parents[2].joinpath("docs/checkpoints.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    code = code.replace("runs/demo/checkpoints/step-000000000500.a0001", str(tmp_path / "saved"))
    code += "import sys; sys.stdout.buffer.write(weights.tobytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert done.stdout == table.weights.numpy().tobytes(), done.stderr.decode()


def test_files_of_a_table_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (BLOCK_ROWS, BLOCK_BYTES) == (65_536, 64 * 2**20)
    monkeypatch.setattr(parts, "BLOCK_BYTES", 2**20)
    narrow, wide = make_table("narrow", 140_000, 1), make_table("wide", 9_000, 64, "none")
    wider = make_table("wider", 5_000, 80, "element")
    manifest = save_ranks(
        str(tmp_path / "saved"), [[*cut(narrow), *cut(wide), *cut(wider)]], [narrow, wide, wider]
    )
    rows = {name: [block.rows for block in table.blocks] for name, table in manifest.tables.items()}
    assert rows == {
        "narrow": [65_536, 65_536, 140_000 - 2 * 65_536],
        "wide": [4_096, 4_096, 808],  # 1 MiB each
        "wider": [4_096, 904],  # one chunk at least
    }
