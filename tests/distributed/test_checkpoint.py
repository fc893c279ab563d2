"""A trained model, saved under one plan and number of workers, is read to the bit under any other."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from mtlrec.checkpoint import folder
from mtlrec.checkpoint.manifest import read_manifest
from tests.distributed.processes import Results, run_processes

pytestmark = pytest.mark.distributed

HERE = "tests.distributed.test_checkpoint"
PLANS = {
    "rowwise_adagrad": ("row_wise", "table_wise", "data_parallel"),
    "adagrad": ("row_wise", "table_wise", "data_parallel", "column_wise"),
    "sgd": ("row_wise", "data_parallel"),
}


def save_and_load(world: Any, saves: dict[str, list[str]], loads: list[list[str]]) -> Results:
    """In a worker: both in turn, as importing TorchRec again would take longer than either."""
    return {**save_plans(world, saves), **load_plans(world, loads)}


def save_plans(world: Any, cases: dict[str, list[str]]) -> Results:
    """In a worker: train three steps and save; `cases`: URL -> optimizer, plan."""
    from mtlrec.assembly import Trainer
    from mtlrec.checkpoint.save import save
    from mtlrec.lockstep import Totals
    from mtlrec.model.model import build_model
    from mtlrec.objective.objective import Objective
    from mtlrec.optimizers import DenseOptimizer
    from mtlrec.sharding import initialise_tables, local_blocks, shard
    from tests.model.example import counts, example_job, example_schema, global_rows, local

    found: Results = {}
    for url, (optimizer, plan) in cases.items():
        job = example_job(**changes(optimizer, plan))
        schema = example_schema(job)
        model = shard(build_model(job, schema, world.device), job, world)
        initialise_tables(model, job.seed, job.model.table_init)
        trainer = Trainer(model, DenseOptimizer(job, model, world), Objective(schema), world, 0)
        for seed in range(3):
            rows = global_rows(schema, 96, seed)
            trainer.train_step(local(rows, schema, world), Totals(counts(rows).double(), 96, ()))
        meta = {
            "job": job.to_dict(),
            "schema": schema.to_dict(),
            "schema_fingerprint": schema.fingerprint(),
            "data": {},
            "step": trainer.step,
            "position": None,
            "metrics": None,
            "attempt": 1,
        }
        save(url, local_blocks(model), trainer.dense_tensors(), meta, world)
        found.update(
            {f"saved {url}/{key}": value for key, value in contents(model, trainer.optimizer).items()}
        )
    return found


def load_plans(world: Any, cases: list[list[str]]) -> Results:
    """In a worker: read each checkpoint under a plan; `cases`: URL, optimizer, plan."""
    from mtlrec.checkpoint.load import load_dense, load_tables
    from mtlrec.model.model import build_model
    from mtlrec.optimizers import DenseOptimizer
    from mtlrec.sharding import local_blocks, shard
    from tests.model.example import example_job, example_schema

    found: Results = {}
    for url, optimizer, plan in cases:
        job = example_job(**changes(optimizer, plan))
        model = shard(build_model(job, example_schema(job), world.device), job, world)
        dense = DenseOptimizer(job, model, world)
        manifest = read_manifest(url)
        load_tables(url, manifest, local_blocks(model))
        saved = load_dense(url, manifest)
        dense.load({name: value for name, value in saved.items() if name.startswith("optimizer.")})
        with torch.no_grad():
            for name, parameter in model.dense_parameters().items():
                parameter.copy_(saved[f"weights.{name}"])
        found.update({f"{plan} {url}/{key}": value for key, value in contents(model, dense).items()})
    return found


def changes(optimizer: str, plan: str) -> dict[str, Any]:
    return {"optimizer": {"tables": {"kind": optimizer}}, "run": {"sharding": plan}}


def contents(model: Any, dense: Any) -> dict[str, np.ndarray]:
    """Everything on this rank: "table/<name>/<tensor>/<row>/<column>" and "dense/<name>"."""
    from mtlrec.sharding import local_blocks

    found = {
        f"table/{block.table}/{name}/{block.row}/{block.column}": value.detach().numpy().copy()
        for block in local_blocks(model)
        for name, value in (("weights", block.weights), *block.state.items())
    }
    found |= {f"dense/{k}": v.detach().numpy().copy() for k, v in model.dense_parameters().items()}
    return found | {f"dense/{k}": v.numpy().copy() for k, v in dense.state_tensors().items()}


def assembled(results: list[Results], prefix: str) -> dict[str, np.ndarray]:
    """The whole tables and dense tensors of a case, put together from what each rank had."""
    parts: dict[str, dict[tuple[int, int], np.ndarray]] = {}
    for result in results:
        for key, value in result.items():
            if not key.startswith(prefix + "/"):
                continue
            kind, *rest = key.removeprefix(prefix + "/").split("/")
            if kind == "table":
                table, name, row, column = rest
                parts.setdefault(f"{table}/{name}", {})[int(row), int(column)] = value
            else:
                parts.setdefault("/".join(rest), {})[0, 0] = value
    whole = {}
    for name, found in parts.items():
        rows = []
        for top in sorted({row for row, _ in found}):
            strips = [value for (row, _), value in sorted(found.items()) if row == top]
            rows.append(strips[0] if strips[0].ndim < 2 else np.concatenate(strips, axis=1))
        whole[name] = rows[0] if len(rows) == 1 else np.concatenate(rows)
    return whole


def as_another_program_reads_it(url: str) -> dict[str, np.ndarray]:
    """The same from the files alone, by docs/checkpoints.md and the safetensors library."""
    body = json.loads(Path(url, "manifest.json").read_text())
    whole: dict[str, np.ndarray] = {}
    for table, entry in body["tables"].items():
        for block in entry["blocks"]:
            tensors = safetensors.numpy.load_file(Path(url, block["file"]))
            for name, value in tensors.items():
                shape = (entry["rows"], entry["dim"])[: value.ndim]
                target = whole.setdefault(
                    f"{table}/{name.removeprefix('state.')}", np.zeros(shape, value.dtype)
                )
                rows = slice(block["row"], block["row"] + block["rows"])
                if value.ndim == 1:
                    target[rows] = value
                else:
                    target[rows, block["column"] : block["column"] + block["columns"]] = value
    dense = safetensors.numpy.load_file(Path(url, body["dense"]["file"]))
    return whole | {name.removeprefix("weights."): value for name, value in dense.items()}


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    wrong = [
        name
        for name in one
        if one[name].shape != other[name].shape or one[name].tobytes() != other[name].tobytes()
    ]
    assert wrong == []


Saved = dict[str, tuple[str, str, dict[str, np.ndarray]]]


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Saved, list[Results]]:
    """URL -> optimizer, plan, contents, for every optimizer and plan; and what 2 ranks read of them."""
    tmp = tmp_path_factory.mktemp("saved")
    cases = {
        folder.checkpoint_url(str(tmp / f"{optimizer}-{plan}"), 3, 1): [optimizer, plan]
        for optimizer, plans in PLANS.items()
        for plan in plans
    }
    call = {"saves": cases, "loads": crossings(cases)}
    results = run_processes(f"{HERE}:save_and_load", 2, tmp / "processes", call)
    return {
        url: (case[0], case[1], assembled(results, f"saved {url}")) for url, case in cases.items()
    }, results


@pytest.fixture(scope="module")
def saved(on_two_ranks: tuple[Saved, list[Results]]) -> Saved:
    return on_two_ranks[0]


def crossings(saved: Mapping[str, Sequence[Any]]) -> list[list[str]]:
    """Every checkpoint (URL -> optimizer, plan, ...) under every plan that its optimizer allows."""
    return [[url, found[0], plan] for url, found in saved.items() for plan in PLANS[found[0]]]


def test_files_hold_what_the_ranks_held(saved: Saved) -> None:
    for url, (optimizer, plan, contents) in saved.items():
        assert_same(as_another_program_reads_it(url), contents)
        states = {name.rsplit("/", 1)[1] for name in contents if "/" in name} - {"weights"}
        assert states == (set() if optimizer == "sgd" else {"sum"}), plan
    starts = {tuple(np.round(each["user/weights"].ravel()[:50], 3)) for _, _, each in saved.values()}
    assert len(starts) > 1, "different optimizers have come to different weights"


def test_replicated_tables_are_in_one_file(saved: Saved) -> None:
    for url, (_, plan, _) in saved.items():
        blocks = {name: len(table.blocks) for name, table in read_manifest(url).tables.items()}
        if plan == "data_parallel":
            assert set(blocks.values()) == {1}
        if plan in ("row_wise", "column_wise"):
            assert blocks["user"] == 2


def test_any_plan_reads_it(on_two_ranks: tuple[Saved, list[Results]]) -> None:
    saved, results = on_two_ranks
    for url, _, plan in crossings(saved):
        assert_same(assembled(results, f"{plan} {url}"), saved[url][2])


@pytest.mark.parametrize(("world_size", "plans"), [(1, ["table_wise"]), (3, ["row_wise", "column_wise"])])
def test_any_number_of_workers_reads_it(
    saved: Saved, world_size: int, plans: list[str], tmp_path: Path
) -> None:
    cases = [case for case in crossings(saved) if case[2] in plans]
    results = run_processes(f"{HERE}:load_plans", world_size, tmp_path, {"cases": cases})
    for url, _, plan in cases:
        assert_same(assembled(results, f"{plan} {url}"), saved[url][2])


def test_names_inside_checkpoints(saved: Saved) -> None:
    """Pinned: every checkpoint there is has them. Another name needs another format version."""
    url = next(url for url, (optimizer, _, _) in saved.items() if optimizer == "adagrad")
    manifest = read_manifest(url)
    narrow_and_wide = ["brand_narrow", "brand_wide"]
    others = ["flag", "item", "only", "price", "scenario", "tags", "user"]
    assert sorted(manifest.tables) == narrow_and_wide + others
    for table in manifest.tables.values():
        assert all(sorted(block.tensors) == ["state.sum", "weights"] for block in table.blocks)
    parameters = [name for name in manifest.dense.tensors if name.startswith("weights.")]
    assert sorted(parameters) == [
        "weights.backbone.first.bias",
        "weights.backbone.first.weight",
        "weights.backbone.gates.weight",
        "weights.backbone.rest.0.bias",
        "weights.backbone.rest.0.weight",
        "weights.backbone.scenario_bias",
        "weights.towers.last.bias",
        "weights.towers.last.weight",
        "weights.towers.layers.0.bias",
        "weights.towers.layers.0.weight",
    ]
    states = [
        f"optimizer.{name[8:]}.{key}" for name in parameters for key in ("step", "exp_avg", "exp_avg_sq")
    ]
    assert sorted(manifest.dense.tensors) == sorted([*parameters, *states])


def fail_on_one_rank(world: Any, urls: list[str]) -> Results:
    """In a worker: save to each URL, with a fault on one rank or another, the last time without.

    In turn waiting for it, and step by step as training does.
    """
    from mtlrec import storage
    from mtlrec.checkpoint.save import Saving
    from mtlrec.distributed import all_reduce_sum
    from mtlrec.job.errors import InputError
    from tests.checkpoint.tables import cut, make_table, meta_of

    table = make_table("user", 30, 4)
    blocks = cut(table, [10, 20])[world.rank : world.rank + 1]

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def denied(url: str) -> None:
        raise InputError(f"{url}: permission denied")

    # (failing rank, module, function, what it does)
    faults: list[tuple[int, Any, str, Any]] = [
        (1, os, "fsync", full),
        (2, storage, "write_stream", denied),
        (0, os, "fsync", full),
        (9, os, "fsync", full),
    ]
    outcomes = []
    for number, (url, (rank, module, function, fault)) in enumerate(zip(urls, 2 * faults, strict=True)):
        with pytest.MonkeyPatch.context() as patch:
            if world.rank == rank:
                patch.setattr(module, function, fault)
            try:
                saving = Saving(url, blocks, {"weights.a": torch.ones(3)}, meta_of([table]), world)
                if number < len(faults):
                    saving.wait()
                while not saving.is_complete:
                    busy = saving.is_busy
                    mine = torch.tensor([busy, not busy and saving.has_failed], dtype=torch.float64)
                    saving.advance(*(bool(signal) for signal in all_reduce_sum(mine, world)))
                outcomes.append(["saved", ""])
            except Exception as error:
                outcomes.append([type(error).__name__, str(error)])
    return {"outcomes": outcomes}


def test_a_failure_of_one_rank_reaches_all_and_leaves_no_checkpoint(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    urls = [folder.checkpoint_url(run, step, 1) for step in range(8)]
    results = run_processes(f"{HERE}:fail_on_one_rank", 3, tmp_path / "processes", {"urls": urls})
    for number, url in enumerate(urls):
        kinds, messages = zip(*(result["outcomes"][number] for result in results), strict=True)
        assert len(set(kinds)) == len(set(messages)) == 1
        if number % 4 == 3:
            assert kinds[0] == "saved"
            continue
        assert not Path(url).exists(), "what was written is removed"
        if number % 4 == 1:
            assert kinds[0] == "InputError" and messages[0].endswith("permission denied")
        else:
            assert kinds[0] == "StorageError" and "the disk is full" in messages[0]
            assert messages[0].startswith(url)
    assert [found.url for found in folder.list_checkpoints(run)] == urls[3::4]
