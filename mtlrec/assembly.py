"""Job and starting point -> sharded model and optimizers. Everyone who needs a model gets it here.

T tasks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch

from mtlrec import storage
from mtlrec.batch import Batch, carry
from mtlrec.checkpoint.load import load_dense, load_tables
from mtlrec.checkpoint.manifest import Manifest, broken, check_tables
from mtlrec.distributed import World, broadcast_bytes
from mtlrec.job.job import Job
from mtlrec.lockstep import Totals, together
from mtlrec.model.model import build_model
from mtlrec.model.tables import SentIds
from mtlrec.objective.objective import Objective, build_objective
from mtlrec.optimizers import OBJECTIVE, DenseOptimizer, ReplicatedTables
from mtlrec.safety import Evidence, Skipped
from mtlrec.schema import Schema
from mtlrec.sharding import (
    ShardedModel,
    initialise_tables,
    local_blocks,
    set_step,
    shard,
    take_back_step,
)

WEIGHTS = "weights."
"""Dense weights are kept as `weights.<parameter>`, beside the state `optimizer.<parameter>.<state>`."""


@dataclass
class Step:
    """What a step left behind."""

    losses: torch.Tensor
    """[T], on the device: the weighted sum of each task's loss over this rank's rows."""
    fit: torch.Tensor
    """bool [], on the CPU once `written` has passed: whether the step was applied."""
    written: torch.cuda.Event | None
    testify: Callable[[], Evidence] | None
    """Holds what the step computed, until somebody has asked for the evidence."""

    @cached_property
    def evidence(self) -> Evidence | None:
        """Of what was not finite; then nothing has moved, on any rank. None: all is well.

        The first to ask waits until the device has done the step's backward.
        """
        if self.written is not None:
            self.written.synchronize()
        testify, self.testify = self.testify, None
        return None if self.fit or testify is None else testify()


@dataclass(frozen=True)
class _Ahead:
    """The batch that comes next."""

    given: Batch
    """As it was handed in."""
    batch: Batch
    """On the device."""
    ids: SentIds | None


@dataclass
class Trainer:
    """A model with its optimizers, standing at a step."""

    model: ShardedModel
    optimizer: DenseOptimizer
    objective: Objective
    world: World
    step: int
    looks: bool = field(init=False)
    """Each step waits for its own gradients and looks whether they are finite, before anything moves. On CUDA
    it need not: what is not finite is masked there, and whoever asks for the evidence learns it later. But
    the tables' Adam family moves without a gradient too.
    """
    _ahead: _Ahead | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.looks = self.world.device.type == "cpu" or self.model.counts_steps

    def train_step(self, batch: Batch, totals: Totals, upcoming: Batch | None = None) -> Step:
        """One forward; one backward, in two parts; one dense step. A collective.

        The tables are updated in their backward. So the graph is cut behind them: first the backward of
        everything else, and only where all of it is finite on every rank that of the tables. Otherwise
        nothing moves, and the step counts all the same. To the bit it is what one backward would do. Where
        nobody `looks`, the tables get a gradient of zero instead, under which they stay to the bit.

        `totals.amounts`: what `objective.amounts` gave, summed over the ranks. `upcoming`: the batch of the
        next call, if every rank knows it: its ids travel while this step computes.
        """
        batch, ids = self._arrived(batch)
        amounts = carry(totals.amounts.float(), self.world.device)
        model = self.model.model
        looked_up = model.trunk_input(batch, ids)
        if upcoming is not None:
            self._send(upcoming)
        x = looked_up.detach().requires_grad_(looked_up.requires_grad)
        outputs = model.dense_part(x, batch)
        loss, sums = self.objective.loss(outputs, batch, amounts, self.world.world_size, model.embeddings(x))
        self.optimizer.zero_grad()
        if self._ahead is not None and self._ahead.ids is not None:
            self._ahead.ids.go_on()
        loss.backward()
        witnesses = [loss.detach()]
        if x.grad is not None:
            # As for the dense part: the tables' optimizers keep squares too.
            witnesses.append(torch.linalg.vector_norm(x.grad))
        fit = self.optimizer.average(witnesses)
        # The next step's gradients take the place of these.
        norms = None if self.looks else self.optimizer.norms()
        if self.looks and not fit:
            take_back_step(self.model)
        else:
            if x.grad is not None:
                looked_up.backward(x.grad if self.looks else torch.where(fit, x.grad, 0.0))
            self.optimizer.step(self.step, None if self.looks else fit)
        self.step += 1
        outputs = outputs.detach()

        def testify() -> Evidence:
            each = self.objective.row_losses(outputs, batch)
            parameters = self.optimizer.not_finite(norms)
            return Evidence(batch, outputs, each, x.detach(), x.grad, parameters)

        return Step(sums.detach(), *_to_host(fit), testify)

    def _send(self, upcoming: Batch) -> None:
        there = upcoming.to(self.world.device)
        self._ahead = _Ahead(upcoming, there, self.model.model.send_ids(there))

    def _arrived(self, batch: Batch) -> tuple[Batch, SentIds | None]:
        """`batch` on the device, and its ids where they were sent ahead."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead.given is batch:
            return ahead.batch, ahead.ids
        return batch.to(self.world.device), None

    def dense_tensors(self) -> dict[str, torch.Tensor]:
        """All that a checkpoint keeps beside the tables, by name, live."""
        learnt = _Learnt(self.model, self.objective).dense_parameters()
        weights = {WEIGHTS + name: tensor.detach() for name, tensor in learnt.items()}
        return weights | self.optimizer.state_tensors()


def _to_host(flag: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """`flag` on the CPU, once the event, if any, has passed."""
    if flag.device.type == "cpu":
        return flag, None
    there = torch.empty_like(flag, device="cpu", pin_memory=True).copy_(flag, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return there, event


@dataclass
class _Learnt:
    """All that the dense optimizer steps: of the model and of the objective."""

    model: ShardedModel
    objective: Objective | None

    @property
    def replicated(self) -> ReplicatedTables | None:
        return self.model.replicated

    def dense_parameters(self) -> dict[str, torch.nn.Parameter]:
        parameters = self.model.dense_parameters()
        if self.objective is not None:
            parameters |= {OBJECTIVE + name: value for name, value in self.objective.named_parameters()}
        return parameters


def assemble(
    job: Job,
    schema: Schema,
    world: World,
    run_url: str,
    checkpoint: str | None,
    start: Manifest | None,
    forks: bool = False,
    lengths: Mapping[str, float] | None = None,
) -> Trainer:
    """Everything that training needs, from `checkpoint` (which says `start` of itself) or from the seed.

    forks: the checkpoint is another run's, whose job may have balanced its losses otherwise.
    lengths: column of lists -> its mean length, so that a new plan evens out what workers look up.
    For each number of workers that a run has had, the plan is kept in its folder and used again.
    """
    built, plan = build_model(job, schema, world.device), _read_plan(run_url, world)
    model = shard(built, job, world, plan, job.run.saves_beside, _lookups_a_row(schema, lengths or {}))
    objective = build_objective(job, schema).to(world.device)
    optimizer = DenseOptimizer(job, _Learnt(model, objective), world)
    trainer = Trainer(model, optimizer, objective, world, 0)
    if start is None or checkpoint is None:
        initialise_tables(model, job.seed, job.model.table_init)
    else:
        together(world, lambda: _resume(trainer, schema, checkpoint, start, forks))
    if world.rank == 0:
        storage.write(_plan_url(run_url, world), json.dumps(model.plan.to_dict(), indent=1).encode())
    return trainer


def restore(job: Job, schema: Schema, world: World, checkpoint: str, manifest: Manifest) -> ShardedModel:
    """The model of a checkpoint, without its optimizers: for evaluation and prediction."""
    model = shard(build_model(job, schema, world.device), job, world)
    together(world, lambda: _load(_Learnt(model, None), schema, checkpoint, manifest, with_state=False))
    return model


def _lookups_a_row(schema: Schema, lengths: Mapping[str, float]) -> dict[str, float]:
    """Feature -> the ids that a row has of it, of those that are looked up: its mean, at least 1."""
    found = {}
    for feature in schema.id_features:
        mean = max(lengths.get(feature.column, 1.0), 1.0) if feature.source == "id_list" else 1.0
        found[feature.name] = min(mean, feature.max_length or mean)
    return found


def _resume(trainer: Trainer, schema: Schema, checkpoint: str, start: Manifest, forks: bool) -> None:
    learnt = _Learnt(trainer.model, trainer.objective)
    own = trainer.dense_tensors() if forks else None
    rest = _load(learnt, schema, checkpoint, start, with_state=True, own=own)
    trainer.optimizer.load(rest)
    trainer.step = start.meta["step"]
    # The tables' optimizers have seen the steps that were applied.
    set_step(trainer.model, trainer.step - Skipped.from_json(start.meta.get("skipped")).steps)


def _load(
    learnt: _Learnt,
    schema: Schema,
    checkpoint: str,
    manifest: Manifest,
    with_state: bool,
    own: dict[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Fill tables and dense weights in place; returns the other dense tensors of the checkpoint.

    own: of a fork, the dense tensors at their start; what the objective learns stays there where the
    checkpoint's objective learns something else.
    """
    check_tables(checkpoint, manifest, schema.tables)
    load_tables(checkpoint, manifest, local_blocks(learnt.model), strict=with_state)
    saved = load_dense(checkpoint, manifest)
    if own is not None:
        saved = _with_own_objective(saved, own)
    parameters = learnt.dense_parameters()
    weights = {
        name.removeprefix(WEIGHTS): saved.pop(name) for name in list(saved) if name.startswith(WEIGHTS)
    }
    if learnt.objective is None:
        weights = {name: value for name, value in weights.items() if not name.startswith(OBJECTIVE)}
    if {name: tensor.shape for name, tensor in weights.items()} != {
        n: p.shape for n, p in parameters.items()
    }:
        raise broken(checkpoint, "dense.safetensors", "its dense weights are not those of its own job")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    return saved


def _with_own_objective(
    saved: dict[str, torch.Tensor], own: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The checkpoint's dense tensors, those of the objective replaced by `own` unless both have the same."""
    marks = (WEIGHTS + OBJECTIVE, f"optimizer.{OBJECTIVE}")
    ours = {name: tensor for name, tensor in own.items() if name.startswith(marks)}
    theirs = {name for name in saved if name.startswith(marks)}
    if theirs == set(ours):
        return saved
    return {name: tensor for name, tensor in saved.items() if name not in theirs} | ours


def _plan_url(run_url: str, world: World) -> str:
    return storage.join(run_url, "plans", f"{world.world_size}.json")


def _read_plan(run_url: str, world: World) -> dict[str, object] | None:
    """The plan for so many workers, as rank 0 sees it in the run's folder; None where there is none."""
    text = b""
    # Older versions kept one plan, that of the last workers: whether it serves is seen later.
    for url in (_plan_url(run_url, world), storage.join(run_url, "plan.json")):
        if world.rank == 0 and not text:
            try:
                text = storage.read(url)
                json.loads(text)
            except (FileNotFoundError, ValueError):
                text = b""
    text = broadcast_bytes(text, world)
    return json.loads(text) if text else None
