"""A model whose tables are spread over the workers. The only file that touches TorchRec's private names.

M rows of the model, T tasks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torchrec.distributed.batched_embedding_kernel import BaseBatchedEmbeddingBag
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder, ShardedEmbeddingBagCollection
from torchrec.distributed.sharding.dp_sharding import DpSparseFeaturesDist
from torchrec.distributed.types import (
    EnumerableShardingSpec,
    ParameterSharding,
    ShardingEnv,
    ShardMetadata,
)
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from mtlrec import watchdog
from mtlrec.batch import Batch
from mtlrec.checkpoint.tensors import TableBlock
from mtlrec.distributed import World, all_gather_bytes
from mtlrec.job.job import Job
from mtlrec.job.optimizer import TablesOptimizer
from mtlrec.model.model import Recommender
from mtlrec.model.starting import BLOCK_ROWS, table_rows
from mtlrec.optimizers import ReplicatedTable, ReplicatedTables
from mtlrec.plan import Plan, TablePlan, make_plan
from mtlrec.quiet import quiet_libraries

_FUSED = {
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "sgd": EmbOptimType.EXACT_SGD,
    "adam": EmbOptimType.ADAM,
    "partial_rowwise_adam": EmbOptimType.PARTIAL_ROWWISE_ADAM,
    "lamb": EmbOptimType.LAMB,
}
_ADAM_FAMILY = ("adam", "partial_rowwise_adam", "lamb")
"""Their step depends on how many steps came before."""

TABLES = "tables"
"""Name of the collection in the model: the dense parameters are all that do not begin with it."""


class ShardedModel(nn.Module):
    """A `Recommender` whose tables lie where `plan` says. Batch -> [M, T] float32, as the model itself.

    The dense part is whole on every rank, without DistributedDataParallel: `DenseOptimizer` averages its
    gradients. The tables are updated in the backward, but the data-parallel ones, which `replicated` steps.
    """

    def __init__(
        self, model: Recommender, plan: Plan, replicated: ReplicatedTables | None, optimizer: str
    ) -> None:
        super().__init__()
        self.model = model
        self.plan = plan
        self.replicated = replicated
        self.counts_steps = optimizer in _ADAM_FAMILY
        """Its step depends on how many steps came before, and it moves rows that have no gradient."""

    def forward(self, batch: Batch) -> torch.Tensor:
        outputs: torch.Tensor = self.model(batch)
        if not torch.is_grad_enabled():
            take_back_step(self)
        return outputs

    def dense_parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of all that is not a table, in the model's order; checkpoints use these names."""
        return {
            name: parameter
            for child, module in self.model.named_children()
            if child != TABLES
            for name, parameter in module.named_parameters(prefix=child)
        }

    def plan_table(self) -> list[dict[str, Any]]:
        """For people, a row a table: table, kind, rows, dim, ranks, bytes (weights and state, all ranks)."""
        found = []
        for table in self.plan.tables:
            shards, everyone = table.shards, list(range(self.plan.world_size))
            copies = self.plan.world_size if table.kind == "data_parallel" else 1
            weights, per_row = 4 * table.rows * table.dim, 4 * table.rows
            state = {
                "sgd": 0,
                "rowwise_adagrad": per_row,
                "adagrad": weights,
                "partial_rowwise_adam": weights + per_row,
            }.get(self.plan.optimizer, 2 * weights)
            found.append(
                {
                    "table": table.name,
                    "kind": table.kind,
                    "rows": table.rows,
                    "dim": table.dim,
                    "ranks": sorted({shard.rank for shard in shards if shard.rows}) or everyone,
                    "bytes": (weights + state) * copies,
                }
            )
        return found


def shard(
    model: Recommender,
    job: Job,
    world: World,
    plan: dict[str, Any] | None = None,
    copied: bool = False,
    lookups: Mapping[str, float] | None = None,
) -> ShardedModel:
    """Spread the tables of `model` over the workers; their weights are not set yet. A collective.

    `plan`: what `ShardedModel.plan.to_dict()` gave in an earlier run; used where it was made for the same
    tables, workers and wishes, so that a resume is the same to the bit, and left aside otherwise.
    copied: checkpoints will be written from a copy of the rows in host memory; a new plan leaves room for it.
    lookups: feature -> ids that a row has of it, on average; a new plan evens out what workers look up.
    Raises InputError where `run.sharding` cannot be granted or memory does not suffice.
    """
    quiet_libraries()
    section = job.optimizer.tables
    tables = model.tables
    if tables is None:
        empty = Plan(world.world_size, world.device.type, section.kind, job.run.sharding, ())
        return ShardedModel(model, empty, None, section.kind)
    assert isinstance(tables, EmbeddingBagCollection)
    sharder = _Sharder(fused_params=_fused_params(section))
    saved = _read(plan)
    if saved is None or not saved.serves(job, tables, world):
        saved = make_plan(job, tables, sharder, world, copied, lookups or {})
    group = dist.group.WORLD
    assert group is not None
    devices = [device.decode() for device in all_gather_bytes(str(world.device).encode(), world)]
    sharded = sharder.shard(
        tables,
        {table.name: _parameter_sharding(table, devices) for table in saved.tables},
        ShardingEnv.from_process_group(group),
        world.device,
    )
    model.tables = sharded
    replicated = _replicated_tables(sharded)
    result = ShardedModel(
        model, saved, ReplicatedTables(section, replicated) if replicated else None, section.kind
    )
    _assert_all_have_an_optimizer(result, section.kind)
    return result


def local_blocks(model: ShardedModel) -> Iterator[TableBlock]:
    """Every rectangle of a table that lies on this rank, in the plan's order of tables, by row and column."""
    order = {table.name: index for index, table in enumerate(model.plan.tables)}
    blocks = [block for lookup in _lookups(model) for block in _blocks_of(lookup, model)]
    yield from sorted(blocks, key=lambda block: (order[block.table], block.row, block.column))


def initialise_tables(model: ShardedModel, seed: int, scale: float) -> None:
    """Set the rows on this rank to their start, uniform in [-scale, scale). Their optimizer states stay.

    A function of (seed, table, row of the table) alone: the same for any plan and number of workers.
    """
    dims = {table.name: table.dim for table in model.plan.tables}
    for block in local_blocks(model):
        dim, weights = dims[block.table], block.weights.detach()
        columns = slice(block.column, block.column + block.columns)
        # Drawn straight into their place, where that is in this memory and has all columns.
        place = weights.numpy() if weights.device.type == "cpu" and block.columns == dim else None
        row = 0
        while row < block.rows:
            start = block.row + row
            count = min(block.rows - row, BLOCK_ROWS - start % BLOCK_ROWS)
            rows = slice(row, row + count)
            if place is not None:
                table_rows(seed, block.table, start, count, dim, scale, out=place[rows])
            else:
                values = table_rows(seed, block.table, start, count, dim, scale)
                weights[rows].copy_(torch.from_numpy(values[:, columns]))
            watchdog.alive("starting weights")
            row += count


def set_step(model: ShardedModel, step: int) -> None:
    """Tell the table optimizers how many steps were taken: after loading. Only the Adam family minds."""
    if model.counts_steps:
        for module in _fused_modules(model):
            module.iter.fill_(step)
            module.iter_cpu.fill_(step)


def take_back_step(model: ShardedModel) -> None:
    """After a forward of the tables that no backward follows, which moves nothing.

    fbgemm counts every forward as a step of the optimizer. Only the Adam family minds.
    """
    if model.counts_steps:
        for module in _fused_modules(model):
            module.iter.add_(-1)
            module.iter_cpu.add_(-1)


class _Undistributed(nn.Module):
    """Stands where TorchRec puts DistributedDataParallel around the lookup of data-parallel tables."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> Any:
        return self.module(*args)


class _Tables(ShardedEmbeddingBagCollection):
    def _create_input_dist(self, input_feature_names: list[str]) -> None:
        """As TorchRec does; but one worker keeps its ids, instead of sending them to itself.

        That costs several copies, and on CUDA the host waits for the device in each step.
        """
        super()._create_input_dist(input_feature_names)
        if self._env.world_size == 1:
            self._input_dists: list[nn.Module] = [DpSparseFeaturesDist() for _ in self._feature_splits]

    def init_data_parallel(self) -> None:
        """Leave the gradients of data-parallel tables to the one all-reduce of everything dense."""
        for index, sharding in enumerate(self._sharding_types):
            if sharding == "data_parallel":
                self._lookups[index] = _Undistributed(self._lookups[index])


class _Sharder(EmbeddingBagCollectionSharder):
    def sharding_types(self, compute_device_type: str) -> list[str]:
        """With row_wise on the CPU too, which TorchRec leaves out there though it works."""
        return ["data_parallel", "table_wise", "column_wise", "row_wise"]

    def shard(
        self,
        module: EmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> _Tables:
        with _left_unset():
            return _Tables(
                module, params, env, fused_params=self.fused_params, device=device, module_fqn=module_fqn
            )


@contextmanager
def _left_unset() -> Iterator[None]:
    """Within it, new tables are left as they are: TorchRec would fill them, and all are set afterwards."""
    fill = BaseBatchedEmbeddingBag.init_parameters
    BaseBatchedEmbeddingBag.init_parameters = lambda tables: None
    try:
        yield
    finally:
        BaseBatchedEmbeddingBag.init_parameters = fill


def _fused_params(section: TablesOptimizer) -> dict[str, Any]:
    params: dict[str, Any] = {"optimizer": _FUSED[section.kind]}
    params |= {"learning_rate": section.lr, "eps": section.eps}
    if section.kind in _ADAM_FAMILY:
        params |= {"beta1": section.betas[0], "beta2": section.betas[1]}
    return params


def _read(plan: dict[str, Any] | None) -> Plan | None:
    try:
        return Plan.from_dict(plan) if plan is not None else None
    except (KeyError, TypeError, ValueError):
        return None


def _parameter_sharding(table: TablePlan, devices: list[str]) -> ParameterSharding:
    """`devices`: each rank's own, such as "cpu" or "cuda:1"."""
    if table.kind == "data_parallel":
        return ParameterSharding("data_parallel", "dense", ranks=list(range(len(devices))))
    shards = []
    for each in table.shards:
        place = f"rank:{each.rank}/{devices[each.rank]}"
        shards.append(ShardMetadata([each.row, each.column], [each.rows, each.columns], place))
    ranks = [each.rank for each in table.shards]
    return ParameterSharding(table.kind, "fused", ranks=ranks, sharding_spec=EnumerableShardingSpec(shards))


def _lookups(model: ShardedModel) -> Iterator[Any]:
    """TorchRec's groups of tables on this rank, each one kernel: fused, or dense for data-parallel tables."""
    if isinstance(model.model.tables, ShardedEmbeddingBagCollection):
        yield from _groups(model.model.tables)


def _groups(tables: ShardedEmbeddingBagCollection) -> Iterator[Any]:
    for lookup in tables._lookups:
        inner: Any = lookup.module if isinstance(lookup, _Undistributed) else lookup
        yield from inner._emb_modules


def _is_fused(group: Any) -> bool:
    return hasattr(group, "fused_optimizer")


def _fused_modules(model: ShardedModel) -> Iterator[Any]:
    yield from (group.emb_module for group in _lookups(model) if _is_fused(group))


def _blocks_of(group: Any, model: ShardedModel) -> Iterator[TableBlock]:
    configs, weights = group.config.embedding_tables, group.emb_module.split_embedding_weights()
    if not _is_fused(group):
        assert model.replicated is not None
        for config, values in zip(configs, weights, strict=True):
            state = model.replicated.state(config.name)
            yield TableBlock(config.name, 0, len(values), 0, values.shape[1], values, state, True)
        return
    # SGD has no state, and its list of states is empty.
    states = group.emb_module.get_optimizer_state() or [{} for _ in configs]
    for config, values, state in zip(configs, weights, states, strict=True):
        rows, columns = values.shape
        row, column = config.local_metadata.shard_offsets
        assert (rows, columns) == (config.local_rows, config.local_cols)
        if rows:
            yield TableBlock(config.name, row, rows, column, columns, values, dict(state), False)


def _replicated_tables(tables: ShardedEmbeddingBagCollection) -> list[ReplicatedTable]:
    found = []
    for group in _groups(tables):
        if _is_fused(group):
            continue
        flat, module = group.emb_module.weights, group.emb_module
        offsets = [int(offset) for offset in module.weights_physical_offsets]
        for config, offset, values in zip(
            group.config.embedding_tables, offsets, module.split_embedding_weights(), strict=False
        ):
            found.append(ReplicatedTable(config.name, flat, offset, values))
    return found


def _assert_all_have_an_optimizer(model: ShardedModel, kind: str) -> None:
    """A table without one would stay at its start, in silence."""
    stepped = set(model.replicated.names) if model.replicated else set()
    for table in model.plan.tables:
        assert (table.kind == "data_parallel") == (table.name in stepped), table.name
    for group in _lookups(model):
        names = {config.name for config in group.config.embedding_tables}
        if _is_fused(group):
            assert group.emb_module.optimizer == _FUSED[kind], names
        else:
            assert names <= stepped, f"no optimizer for {names - stepped}"
