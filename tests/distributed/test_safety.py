"""The step that looks before it moves anything: the same to the bit, and nothing moves where it must not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.distributed.processes import Results, run_processes

HERE = "tests.distributed.test_safety"

CASES: dict[str, dict[str, Any]] = {
    "row_wise": {"run": {"sharding": "row_wise"}},
    "table_wise": {"run": {"sharding": "table_wise"}},
    "data_parallel": {"run": {"sharding": "data_parallel"}},
    "column_wise": {"run": {"sharding": "column_wise"}, "optimizer": {"tables": {"kind": "adagrad"}}},
    "mixed": {
        "run": {"sharding": {"user": "row_wise", "item": "data_parallel", "tags": "table_wise"}},
        "optimizer": {"dense": {"kind": "adamw", "clip_norm": 0.1}},
    },
    "objective": {
        "objective": {"balance": "uncertainty", "embedding_l2": 0.01},
        "optimizer": {"tables": {"kind": "sgd"}, "dense": {"kind": "sgd", "momentum": 0.9}},
        "model": {"dim": 8, "dropout": 0.2},
    },
}
FAULTS = {
    "nan input": ["loss of click, buy", "input of age", "in 1 row(s)"],
    "large input": ["is not finite: loss of", "in 1 row(s)", "their largest input is age with 3e+38"],
    "large label": ["is not finite: loss of rating; in 1 row(s)"],
    "large gradient": ["is not finite: gradient of scenario, user, item and 9 more; in"],
    "nan table": ["loss of click, buy, rating", "input of user"],
    "nan layer": ["is not finite: loss of click, buy, rating; in 96 row(s)"],
}
"""What goes wrong -> what is said of it."""


def work(world: Any, data_url: str, cases: dict[str, dict[str, Any]]) -> Results:
    """In a worker: for each case five steps by `train_step`, before the third of which every fault is tried,
    each with the next one's ids sent ahead; the same with none sent ahead, and where it learns later what was
    not finite ("late", as on CUDA); and the five by one plain backward. Returns all that a checkpoint keeps
    and the losses of each, and what the faults moved and were told.
    """
    import torch

    from mtlrec.data.shards import Dataset
    from mtlrec.lockstep import Totals
    from tests.distributed.training import batches
    from tests.model.example import counts, example_job, example_schema, local

    found: Results = {}
    dataset = Dataset.open(data_url, [])
    for name, changes in cases.items():
        job = example_job(**changes)
        schema = example_schema(job)
        data = [(local(rows, schema, world), counts(rows)) for rows in batches(schema, 5)]
        ours, late, plain = (trainer_of(job, schema, world) for _ in range(3))
        late.looks = False
        losses: dict[str, list[torch.Tensor]] = {"ours": [], "late": [], "plain": []}
        for step, (batch, count) in enumerate(data):
            totals = Totals(count.double(), int(count[-1]), ())
            if step == 2:
                for fault in FAULTS:
                    moved, told = try_fault(ours, schema, dataset, batch, totals, fault)
                    moved_late, told_late = try_fault(late, schema, dataset, batch, totals, fault)
                    assert told_late == told
                    found |= {f"{name}/{fault}/moved": moved + moved_late, f"{name}/{fault}/told": told}
            # A fault that comes between leaves what was sent ahead for another batch.
            upcoming = data[step + 1][0] if step + 1 < len(data) else None
            for path, trainer, ahead in (("ours", ours, upcoming), ("late", late, None)):
                done = trainer.train_step(batch, totals, ahead)
                assert (trainer._ahead is None) == (ahead is None)
                assert done.evidence is None, (name, path, step)
                losses[path].append(done.losses)
            losses["plain"].append(plain_step(plain, batch, count))
        for path, trainer in (("ours", ours), ("late", late), ("plain", plain)):
            found[f"{name}/{path}/losses"] = torch.stack(losses[path]).cpu().numpy()
            kept = contents(trainer).items()
            found |= {f"{name}/{path}/{k}": v.detach().cpu().numpy().copy() for k, v in kept}
    return found


def trainer_of(job: Any, schema: Any, world: Any) -> Any:
    """What `assemble` makes at a run's beginning, without a folder."""
    from mtlrec.assembly import Trainer, _Learnt
    from mtlrec.model.model import build_model
    from mtlrec.objective.objective import build_objective
    from mtlrec.optimizers import DenseOptimizer
    from mtlrec.sharding import initialise_tables, shard

    model = shard(build_model(job, schema, world.device), job, world)
    initialise_tables(model, job.seed, job.model.table_init)
    objective = build_objective(job, schema).to(world.device)
    return Trainer(model, DenseOptimizer(job, _Learnt(model, objective), world), objective, world, 0)


def plain_step(trainer: Any, batch: Any, count: Any) -> Any:
    """The step as it is told in docs/architecture.md: one forward, one backward, one dense step."""
    recommender, device = trainer.model.model, trainer.world.device
    batch, count = batch.to(device), count.to(device)
    x = recommender.trunk_input(batch)
    outputs, embeddings = recommender.dense_part(x, batch), recommender.embeddings(x)
    loss, sums = trainer.objective.loss(outputs, batch, count, trainer.world.world_size, embeddings)
    trainer.optimizer.zero_grad()
    loss.backward()
    trainer.optimizer.average()
    trainer.optimizer.step(trainer.step)
    trainer.step += 1
    return sums.detach()


def contents(trainer: Any) -> dict[str, Any]:
    """All that a checkpoint keeps, live."""
    from mtlrec.sharding import local_blocks

    found = dict(trainer.dense_tensors())
    for block in local_blocks(trainer.model):
        place = f"{block.table}/{block.row}/{block.column}"
        found |= {f"{place}/{key}": value for key, value in block.state.items()}
        found[f"{place}/weights"] = block.weights
    return found


def try_fault(
    trainer: Any, schema: Any, dataset: Any, batch: Any, totals: Any, fault: str
) -> tuple[list[str], str]:
    """One step with a fault, then all as before: which tensors it moved, and what the run would end on."""
    import torch

    from mtlrec.control import Silent
    from mtlrec.job.errors import FinalFailure
    from mtlrec.job.run import RunSection
    from mtlrec.safety import Guard, Skipped

    step, before = trainer.step, batch.position
    with faulty(trainer, batch, fault) as spoilt:
        held = {key: value.detach().clone() for key, value in contents(trainer).items()}
        done = trainer.train_step(spoilt, totals)
        now = contents(trainer).items()
        moved = [key for key, value in now if not torch.equal(value.nan_to_num(7), held[key].nan_to_num(7))]
    assert trainer.step == step + 1, "a skipped step counts"
    trainer.step = step
    guard = Guard(RunSection(), schema, trainer.world, Silent(), Skipped())
    try:
        guard.consider(step + 1, before, totals.rows, dataset, done.evidence)
    except FinalFailure as error:
        return moved, str(error)
    return moved, "nothing"


@contextmanager
def faulty(trainer: Any, batch: Any, fault: str) -> Iterator[Any]:
    """The batch or the model with a fault: of rows on the last rank alone, of dense weights on all alike."""
    import torch

    from mtlrec.sharding import local_blocks

    undo = []
    last = trainer.world.rank == trainer.world.world_size - 1
    dense, labels, valid = batch.dense.clone(), batch.labels.clone(), batch.valid.clone()

    def spoil(tensor: torch.Tensor, value: float) -> None:
        undo.append((tensor, tensor.detach().clone()))
        tensor.fill_(value)

    with torch.no_grad():
        if fault == "nan input" and last:
            dense[3, 0], valid[3] = float("nan"), True
        elif fault == "large input" and last:
            dense[3, 0], valid[3] = 3e38, True
        elif fault == "large label" and last:
            labels[5, 2], valid[5, 2] = 1e30, True
        elif fault == "large gradient":
            # Every loss stays finite, and no gradient can be squared.
            spoil(trainer.model.dense_parameters()["towers.last.weight"], 1e25)
            valid[:, 2] = False
        elif fault == "nan table":
            for block in local_blocks(trainer.model):
                if block.table == "user":
                    spoil(block.weights, float("nan"))
        elif fault == "nan layer":
            spoil(trainer.model.dense_parameters()["towers.last.bias"], float("nan"))
            valid[: batch.num_rows] = True
    yield replace(batch, dense=dense, labels=labels, valid=valid)
    with torch.no_grad():
        for tensor, value in undo:
            tensor.copy_(value)


def write_numbers(folder: Path) -> None:
    """What the rows of a batch are found in: 96 of them, as there are in it."""
    pq.write_table(pa.table({"number": range(96)}), folder / "part-0.parquet", row_group_size=50)


@pytest.fixture(scope="module", params=[1, 2], ids=["1 worker", "2 workers"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    folder: Path = tmp_path_factory.mktemp("safety")
    (folder / "train").mkdir()
    write_numbers(folder / "train")
    arguments = {"data_url": str(folder / "train"), "cases": CASES}
    return run_processes(f"{HERE}:work", request.param, folder / "run", arguments, timeout=400)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("path", ["ours", "late"])
def test_looking_first_changes_no_bit(ranks: list[Results], case: str, path: str) -> None:
    for rank, found in enumerate(ranks):
        ours = {k.split("/", 2)[2]: v for k, v in found.items() if k.startswith(f"{case}/{path}/")}
        plain = {k.split("/", 2)[2]: v for k, v in found.items() if k.startswith(f"{case}/plain/")}
        assert ours.keys() == plain.keys() and any(key.endswith("/weights") for key in ours)
        for key, value in ours.items():
            assert value.tobytes() == plain[key].tobytes(), (rank, key)
        assert np.isfinite(ours["losses"]).all()


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("case", CASES)
def test_a_step_that_is_not_finite_moves_nothing_and_is_told_alike(
    ranks: list[Results], case: str, fault: str
) -> None:
    told = [found[f"{case}/{fault}/told"] for found in ranks]
    assert len(set(told)) == 1, "every rank ends on the same words"
    for words in ["step 3 (epoch 0", "the last checkpoint stands", *FAULTS[fault]]:
        assert words in told[0], words
    for rank, found in enumerate(ranks):
        assert found[f"{case}/{fault}/moved"] == [], rank
