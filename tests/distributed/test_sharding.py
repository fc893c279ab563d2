"""Any plan on any number of workers is the same training: it starts alike, goes alike and predicts alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.processes import run_processes
from tests.distributed.training import PRESENT, batches
from tests.model.example import example_job, example_schema, global_rows
from tests.model.reference import PlainModel, train_plainly

pytestmark = pytest.mark.distributed

WORLD_SIZES = (1, 2, 3)
ADAGRAD = {"tables": {"kind": "adagrad"}}
PLE = {"kind": "ple", "levels": 2, "task_experts": 1, "hidden": [10, 8], "scenario_gates": True}
NEUMF = {
    "kind": "factorization",
    "factors": ["user", "flag"],
    "biases": ["brand_narrow"],
    "hidden": [12, 8],
}
CASES: dict[str, dict[str, Any]] = {
    "row_wise": {"run": {"sharding": "row_wise"}},
    "table_wise": {"run": {"sharding": "table_wise"}},
    "data_parallel": {"run": {"sharding": "data_parallel"}},
    "auto": {"run": {"sharding": "auto"}},
    "column_wise adagrad": {"run": {"sharding": "column_wise"}, "optimizer": ADAGRAD},
    "data_parallel adagrad": {"run": {"sharding": "data_parallel"}, "optimizer": ADAGRAD},
    "mixed sgd": {
        "run": {"sharding": {"user": "row_wise", "item": "data_parallel", "tags": "table_wise"}},
        "model": {"dim": 8, "backbone": {"kind": "shared_bottom", "hidden": [12]}, "tower": {"hidden": []}},
        "optimizer": {"tables": {"kind": "sgd", "lr": 0.5}},
    },
    "ple": {"run": {"sharding": "row_wise"}, "model": {"dim": 8, "backbone": PLE}},
    "factorization": {
        "run": {
            "sharding": {"user": "row_wise", "brand_wide": "table_wise", "brand_narrow": "data_parallel"}
        },
        "model": {"dim": 8, "backbone": NEUMF},
    },
    "dropout": {"model": {"dim": 8, "backbone": PLE, "dropout": 0.3}},
}
STEPS = {case: 16 if case in ("ple", "factorization", "dropout") else 50 for case in CASES}
FAMILIES = {
    "row_wise": ("row_wise", "table_wise", "data_parallel", "auto"),
    "column_wise adagrad": ("column_wise adagrad", "data_parallel adagrad"),
    "mixed sgd": ("mixed sgd",),
    "ple": ("ple",),
    "factorization": ("factorization",),
    "dropout": ("dropout",),
}
"""Cases that are one training: what they are compared with -> their names."""


class Run:
    """One case on so many workers, put together from what its ranks returned."""

    def __init__(self, ranks: list[dict[str, Any]], case: str) -> None:
        self.ranks = [
            {key.removeprefix(f"{case}/"): value for key, value in rank.items() if key.startswith(f"{case}/")}
            for rank in ranks
        ]
        self.losses: np.ndarray = self.ranks[0]["losses"]
        self.kinds: dict[str, str] = self.ranks[0]["kinds"]

    def tables(self, when: str) -> dict[str, np.ndarray]:
        shapes = {table.name: (table.rows, table.dim) for table in SCHEMA.tables}
        found = {name: np.full(shape, np.nan, dtype=np.float32) for name, shape in shapes.items()}
        for rank in self.ranks:
            for key, values in rank.items():
                if key.startswith(f"{when}/table/"):
                    name, row, column, _ = key.split("/")[2:]
                    rows, columns = values.shape
                    found[name][int(row) : int(row) + rows, int(column) : int(column) + columns] = values
        return found

    def dense(self, when: str, rank: int = 0) -> dict[str, np.ndarray]:
        prefix = f"{when}/dense/"
        return {
            key.removeprefix(prefix): value
            for key, value in self.ranks[rank].items()
            if key.startswith(prefix)
        }

    def predictions(self, when: str) -> np.ndarray:
        rows = np.concatenate([rank[f"{when}/rows"] for rank in self.ranks])
        outputs = np.concatenate([rank[f"{when}/outputs"] for rank in self.ranks])
        return outputs[np.argsort(rows)]


SCHEMA = example_schema(example_job())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Run]:
    found = {}
    for world_size in WORLD_SIZES:
        folder = tmp_path_factory.mktemp("processes") / str(world_size)
        arguments = {"cases": CASES, "steps": STEPS}
        ranks = run_processes("tests.distributed.training:train", world_size, folder, arguments)
        found.update({(case, world_size): Run(ranks, case) for case in CASES})
        for rank in range(world_size):
            said = (folder / f"{rank}.log").read_text()
            assert said == "", f"rank {rank} of {world_size} said what no user can act upon"
    return found


EVERY = [(case, world_size) for case in CASES for world_size in WORLD_SIZES]


@pytest.mark.parametrize(("case", "world_size"), EVERY)
def test_starts_from_identical_weights(runs: dict[tuple[str, int], Run], case: str, world_size: int) -> None:
    one, other = runs["row_wise", 1], runs[case, world_size]
    for name, values in one.tables("start").items():
        assert not np.isnan(values).any()
        np.testing.assert_array_equal(values, other.tables("start")[name], err_msg=name)
        assert values.min() >= -0.05 and values.max() < 0.05
    same_model = runs[next(first for first, members in FAMILIES.items() if case in members), 1]
    for rank in range(world_size):
        assert same_model.dense("start").keys() == other.dense("start", rank).keys()
        for name, values in same_model.dense("start").items():
            np.testing.assert_array_equal(values, other.dense("start", rank)[name], err_msg=name)


@pytest.mark.parametrize(("case", "world_size"), EVERY)
def test_losses_agree(runs: dict[tuple[str, int], Run], case: str, world_size: int) -> None:
    first = next(first for first, members in FAMILIES.items() if case in members)
    expected, losses = runs[first, 1].losses, runs[case, world_size].losses
    assert losses.shape == (STEPS[case], len(SCHEMA.tasks))
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


@pytest.mark.parametrize("case", [case for case in FAMILIES if case != "dropout"])
def test_losses_are_those_of_plain_pytorch(runs: dict[tuple[str, int], Run], case: str) -> None:
    torch.set_num_threads(1)
    job = example_job(**CASES[case])
    schema = example_schema(job)
    run = runs[case, 1]
    tables = {name: torch.from_numpy(values) for name, values in run.tables("start").items()}
    dense = {name: torch.from_numpy(values) for name, values in run.dense("start").items()}
    plain = PlainModel(job, schema, tables, dense)
    losses = train_plainly(plain, batches(schema, STEPS[case]))
    np.testing.assert_allclose(run.losses, losses, rtol=1e-4)
    probe = global_rows(schema, 96, 10**6, 5)
    with torch.no_grad():
        expected = plain.forward(probe).numpy()[probe.present]
    np.testing.assert_allclose(run.predictions("last"), expected, atol=2e-4)


@pytest.mark.parametrize(("case", "world_size"), EVERY)
def test_predictions_agree(runs: dict[tuple[str, int], Run], case: str, world_size: int) -> None:
    first = next(first for first, members in FAMILIES.items() if case in members)
    expected, found = runs[first, 1], runs[case, world_size]
    np.testing.assert_allclose(found.predictions("first"), expected.predictions("first"), atol=1e-6)
    np.testing.assert_allclose(found.predictions("last"), expected.predictions("last"), atol=1e-4)


@pytest.mark.parametrize(("case", "world_size"), EVERY)
def test_every_touched_row_moved_and_no_other(
    runs: dict[tuple[str, int], Run], case: str, world_size: int
) -> None:
    run = runs[case, world_size]
    before, after = run.tables("start"), run.tables("end")
    for table in SCHEMA.tables:
        touched = np.zeros(table.rows, dtype=bool)
        for rows in batches(SCHEMA, STEPS[case]):
            for feature in table.features:
                touched[rows.values[feature]] = True
        moved = (before[table.name] != after[table.name]).any(axis=1)
        assert touched.any()
        assert not (moved & ~touched).any(), table.name
        # A row seen only where no label was valid has nothing to learn from, nor one half of a product whose
        # other half was never there.
        half = case == "factorization" and table.name in NEUMF["factors"]
        assert moved.sum() >= (0.9 if half else 0.98) * touched.sum(), table.name


@pytest.mark.parametrize(("case", "world_size"), EVERY)
def test_ranks_agree_on_what_all_of_them_hold(
    runs: dict[tuple[str, int], Run], case: str, world_size: int
) -> None:
    ranks = runs[case, world_size].ranks
    for key, value in ranks[0].items():
        copied = key.startswith("end/table/") and key.endswith("/1")
        if copied or key.startswith("end/dense/") or key == "losses":
            for other in ranks[1:]:
                np.testing.assert_array_equal(value, other[key], err_msg=key)


def test_plans_are_what_was_asked(runs: dict[tuple[str, int], Run]) -> None:
    names = [table.name for table in SCHEMA.tables]
    for world_size in WORLD_SIZES:
        for kind in ("table_wise", "data_parallel"):
            assert runs[kind, world_size].kinds == dict.fromkeys(names, kind)
        rows = {table.name: table.rows for table in SCHEMA.tables}
        # No rank is left with an empty part of a table: three parts of 4 rows would be 2, 2 and 0.
        small = {name for name in names if rows[name] < world_size or (rows[name], world_size) == (4, 3)}
        expected = {name: "table_wise" if name in small else "row_wise" for name in names}
        assert runs["row_wise", world_size].kinds == expected
        assert runs["column_wise adagrad", world_size].kinds == dict.fromkeys(names, "column_wise")
        # Small tables are not left to a kind that no kernel updates.
        assert set(runs["auto", world_size].kinds.values()) <= {"row_wise", "table_wise"}
        mixed = runs["mixed sgd", world_size].kinds
        assert (mixed["user"], mixed["item"], mixed["tags"]) == ("row_wise", "data_parallel", "table_wise")
    held = [key for key in runs["row_wise", 3].ranks[1] if key.startswith("start/table/user/")]
    assert held == ["start/table/user/1667/0/0"]
    wide = [key for key in runs["column_wise adagrad", 2].ranks[0] if key.startswith("start/table/user/")]
    assert wide in (["start/table/user/0/0/0"], ["start/table/user/0/4/0"])


def test_dropout_drops_alike_on_any_number_of_workers(runs: dict[tuple[str, int], Run]) -> None:
    one = runs["dropout", 1].losses
    for world_size in WORLD_SIZES[1:]:
        np.testing.assert_allclose(runs["dropout", world_size].losses[0], one[0], rtol=1e-6)
    # It does drop: the first loss of the same weights and rows is another.
    assert (one[0] != runs["ple", 1].losses[0]).all()


def test_the_data_has_short_steps_and_masked_labels() -> None:
    """What makes the agreement above worth something."""
    assert min(PRESENT) < max(PRESENT)
    rows = batches(SCHEMA, 1)[0]
    assert 0 < rows.valid[:, 2].sum() < rows.valid[:, 0].sum()
