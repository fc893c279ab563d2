"""Which rows and columns of each table lie on which worker: asked of TorchRec's planner, kept as plain data.

W workers, D embedding dim.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.proposers import GreedyProposer, UniformProposer
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError, ShardingOption
from torchrec.distributed.sharding_plan import MIN_CW_DIM
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from mtlrec.distributed import World, all_gather_bytes, broadcast_bytes
from mtlrec.doctor import read_memory
from mtlrec.job.errors import InputError
from mtlrec.job.job import Job

KINDS = ("table_wise", "row_wise", "column_wise", "data_parallel")
"""What a table can be; of two that the planner finds equal, the earlier is taken."""

ELEMENTWISE = ("sgd", "adagrad", "adam")
"""Table optimizers whose state, if any, is one number per weight, so that columns may part ways."""

_SMALL = 0.125
"""On a CPU, a table with at most this part of a worker's even share of all weights lies whole on one."""

_ALL_WHOLE = 256 * 2**20
"""On a CPU, bytes of all tables together up to which each lies whole on one worker."""

_RESERVED = 0.2
"""Share of a device's memory that is left to batches, activations and the process itself."""


@dataclass(frozen=True)
class Shard:
    """A rectangle of a table, and the rank that owns it."""

    row: int
    column: int
    rows: int
    columns: int
    rank: int


@dataclass(frozen=True)
class TablePlan:
    name: str
    kind: str
    """One of KINDS."""
    rows: int
    dim: int
    shards: tuple[Shard, ...]
    """Empty for data_parallel: every rank holds the whole table."""


@dataclass(frozen=True)
class Plan:
    """The plan for all tables, with what it was made for."""

    world_size: int
    device: str
    optimizer: str
    requested: Any
    """`run.sharding`, as the job has it."""
    tables: tuple[TablePlan, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, from which `Plan.from_dict` makes the plan again."""
        data: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Raises KeyError, TypeError or ValueError where `data` is not what `to_dict` gave."""
        tables = []
        for table in data["tables"]:
            shards = tuple(Shard(**{k: int(v) for k, v in shard.items()}) for shard in table["shards"])
            rows, dim = int(table["rows"]), int(table["dim"])
            plan = TablePlan(str(table["name"]), str(table["kind"]), rows, dim, shards)
            area = sum(shard.rows * shard.columns for shard in shards)
            if plan.kind != "data_parallel" and area != plan.rows * plan.dim:
                raise ValueError(f"the shards of table {plan.name} do not make up the table")
            if not all(0 <= shard.rank < int(data["world_size"]) for shard in shards):
                raise ValueError(f"the shards of table {plan.name} lie on workers that there are not")
            tables.append(plan)
        header = (int(data["world_size"]), str(data["device"]), str(data["optimizer"]), data["requested"])
        return cls(*header, tuple(tables))

    def serves(self, job: Job, tables: EmbeddingBagCollection, world: World) -> bool:
        """Whether it was made for these tables, this many workers and this job's wishes."""
        return (
            self.world_size == world.world_size
            and self.device == world.device.type
            and self.optimizer == job.optimizer.tables.kind
            and self.requested == job.run.sharding
            and [(table.name, table.rows, table.dim) for table in self.tables]
            == [(name, rows, dim) for name, rows, dim in _shapes(tables)]
        )


def make_plan(
    job: Job,
    tables: EmbeddingBagCollection,
    sharder: EmbeddingBagCollectionSharder,
    world: World,
    copied: bool,
    lookups: Mapping[str, float],
) -> Plan:
    """The planner's choice within the job's wishes: made on rank 0 and handed to all. A collective.

    copied: each worker's host memory is to hold a copy of its rows too.
    lookups: feature -> ids that a row has of it, on average; 1 for those that are not there.
    Raises InputError on every rank where a wish cannot be granted or the tables do not fit into memory.
    """
    allowed = allowed_kinds(job, tables, world.world_size)
    memory = [json.loads(part) for part in all_gather_bytes(json.dumps(_memory(world)).encode(), world)]
    answer: dict[str, Any] = {}
    if world.rank == 0:
        # The smallest machine decides: the planner knows only one kind.
        host, device = (min(each[place] for each in memory) for place in ("host", "device"))
        if copied and world.device.type == "cpu":
            host //= 2
        elif copied:
            device = min(device, host)
        try:
            plan = _ask_planner(job, tables, sharder, world, allowed, lookups, host, device)
            answer = {"plan": plan.to_dict()}
        except PlannerError as error:
            answer = {"error": _refusal(tables, world, host, device, copied, str(error))}
    answer = json.loads(broadcast_bytes(json.dumps(answer).encode(), world))
    if "error" in answer:
        raise InputError(answer["error"])
    return Plan.from_dict(answer["plan"])


def _memory(world: World) -> dict[str, int]:
    """Bytes for this worker's tables, on the host and on its device."""
    # All that there is rather than what is free just now, so that the plan does not depend on the moment.
    host = read_memory()[0] // world.local_world_size
    device = torch.cuda.get_device_properties(world.device).total_memory if world.device.type == "cuda" else 0
    return {"host": host, "device": device}


def allowed_kinds(job: Job, tables: EmbeddingBagCollection, world_size: int) -> dict[str, list[str]]:
    """Table -> the kinds of sharding that the planner may choose from."""
    optimizer, wishes = job.optimizer.tables.kind, job.run.sharding
    by_table = wishes if isinstance(wishes, dict) else {}
    names = [name for name, _, _ in _shapes(tables)]
    for name in by_table:
        if name not in names:
            raise InputError(f"run.sharding.{name}: there is no such table; tables: {', '.join(names)}")
    found: dict[str, list[str]] = {}
    total = sum(rows * dim for _, rows, dim in _shapes(tables))
    for name, rows, dim in _shapes(tables):
        wish = wishes if isinstance(wishes, str) else by_table.get(name, "auto")
        if wish == "data_parallel" and optimizer not in ("rowwise_adagrad", "adagrad", "sgd"):
            raise InputError(
                f"run.sharding: data_parallel is not for {optimizer}, which would move rows that no batch "
                "touched; use row_wise, table_wise or auto"
            )
        if wish == "column_wise" and optimizer not in ELEMENTWISE:
            raise InputError(
                f"run.sharding: column_wise is not for {optimizer}, but for {', '.join(ELEMENTWISE)}"
            )
        # Left to itself, the planner makes small tables data_parallel, which no kernel updates, and takes
        # column_wise with any optimizer. It never cuts columns below MIN_CW_DIM.
        automatic = ["table_wise"]
        if world_size > 1:
            automatic.append("row_wise")
        if world_size > 1 and optimizer in ELEMENTWISE and dim > MIN_CW_DIM:
            automatic.append("column_wise")
        if world_size > 1 and job.run.device == "cpu":
            # The planner's costs are those of GPUs with a fast link, under which rows would always part ways.
            # Under gloo that moves three times the bytes: its reduce-scatter is an all-reduce. So it is for
            # the tables that would not let the workers hold alike, where that matters: each kind of sharding
            # has exchanges of its own, so that one kind for all is cheaper than two.
            whole = 4 * total <= _ALL_WHOLE or rows * dim <= _SMALL * total / world_size
            automatic.remove("row_wise" if whole else "table_wise")
        kinds = automatic if wish == "auto" else [str(wish)]
        if "row_wise" in kinds and -(-rows // world_size) * (world_size - 1) >= rows:
            # The last rank would get no row at all, and fbgemm's backward does not bear an empty table.
            kinds = ["table_wise", *(kind for kind in kinds if kind not in ("row_wise", "table_wise"))]
        found[name] = kinds
    return found


class _Enumerator(EmbeddingEnumerator):
    """Lists the options in one order: TorchRec's is that of a set, which changes by process."""

    def enumerate(self, *args: Any, **kwargs: Any) -> list[ShardingOption]:
        options: list[ShardingOption] = super().enumerate(*args, **kwargs)
        return sorted(options, key=lambda option: (option.name, KINDS.index(option.sharding_type)))


def _ask_planner(
    job: Job,
    tables: EmbeddingBagCollection,
    sharder: EmbeddingBagCollectionSharder,
    world: World,
    allowed: dict[str, list[str]],
    lookups: Mapping[str, float],
    host: int,
    device: int,
) -> Plan:
    topology = Topology(
        world_size=world.world_size,
        compute_device=world.device.type,
        local_world_size=world.local_world_size,
        ddr_cap=int(host * (1 - _RESERVED)),
        hbm_cap=device,
    )
    features = {each.name: each.feature_names for each in tables.embedding_bag_configs()}
    constraints = {
        name: ParameterConstraints(
            sharding_types=allowed[name],
            compute_kernels=["dense" if allowed[name] == ["data_parallel"] else "fused"],
            pooling_factors=[lookups.get(feature, 1.0) for feature in features[name]],
            # Asked for, columns are spread over all workers, in multiples of the 4 that the kernels want.
            min_partition=4 * -(-dim // (4 * world.world_size)) if allowed[name] == ["column_wise"] else None,
        )
        for name, _, dim in _shapes(tables)
    }
    rows_per_worker = -(-job.data.batch_size // world.world_size)
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=rows_per_worker,
        enumerator=_Enumerator(topology, batch_size=rows_per_worker, constraints=constraints),
        storage_reservation=FixedPercentageStorageReservation(percentage=_RESERVED),
        proposer=[GreedyProposer(), GreedyProposer(use_depth=False), UniformProposer()],
        constraints=constraints,
        stats=[],
    )
    chosen = planner.plan(tables, [sharder]).get_plan_for_module("")
    planned = []
    for name, rows, dim in _shapes(tables):
        shards = [
            Shard(
                shard.shard_offsets[0],
                shard.shard_offsets[1],
                shard.shard_sizes[0],
                shard.shard_sizes[1],
                shard.placement.rank(),
            )
            for shard in (chosen[name].sharding_spec.shards if chosen[name].sharding_spec else [])
        ]
        planned.append(TablePlan(name, chosen[name].sharding_type, rows, dim, tuple(shards)))
    return Plan(
        world.world_size, world.device.type, job.optimizer.tables.kind, job.run.sharding, tuple(planned)
    )


def _shapes(tables: EmbeddingBagCollection) -> list[tuple[str, int, int]]:
    return [(each.name, each.num_embeddings, each.embedding_dim) for each in tables.embedding_bag_configs()]


def _refusal(
    tables: EmbeddingBagCollection, world: World, host: int, device: int, copied: bool, detail: str
) -> str:
    needed = sum(4 * rows * dim for _, rows, dim in _shapes(tables)) / 2**30
    memory = (device or host) / 2**30
    beside = ", with room for the copy that asynchronous checkpoints are written from" if copied else ""
    return (
        f"the embedding tables ({needed:.2f} GiB of weights, optimizer state beside) find no place on "
        f"{world.world_size} worker(s) with {memory:.2f} GiB each{beside}, as run.sharding has it: use fewer "
        f"rows, a smaller model.dim, more workers, {'run.checkpoint.mode sync, ' if copied else ''}"
        f"or run.sharding row_wise ({detail.splitlines()[0]})"
    )
