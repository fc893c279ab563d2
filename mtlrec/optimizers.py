"""Optimizers of everything that is not fused into a table's backward, and the learning rate's schedule.

D embedding dim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from mtlrec.distributed import World
from mtlrec.job.errors import InputError
from mtlrec.job.job import Job
from mtlrec.job.optimizer import DenseOptimizer as DenseSection
from mtlrec.job.optimizer import Schedule, TablesOptimizer

_ALIGNMENT = 16
"""Each gradient starts at a multiple of so many floats (64 bytes, a cache line)."""

OBJECTIVE = "objective."
"""Begins the names of parameters that the objective learns; weight decay leaves them out."""

REPLICATED_KINDS = ("rowwise_adagrad", "adagrad", "sgd")
"""Table optimizers that leave a row without a gradient in place, and so may run over a whole table."""


class Trainable(Protocol):
    """What an optimizer asks of a model."""

    @property
    def replicated(self) -> ReplicatedTables | None: ...

    def dense_parameters(self) -> dict[str, nn.Parameter]: ...


@dataclass(frozen=True)
class ReplicatedTable:
    """A table that every rank holds whole, as a slice of the flat parameter that autograd knows."""

    name: str
    parameter: nn.Parameter
    """1-D; holds this table and perhaps others."""
    offset: int
    weights: torch.Tensor
    """[rows, D], a view of `parameter` from `offset` on."""


class ReplicatedTables:
    """The optimizer of the data-parallel tables, which no kernel fuses: the same formula as the fused one."""

    def __init__(self, section: TablesOptimizer, tables: Sequence[ReplicatedTable]) -> None:
        assert tables and section.kind in REPLICATED_KINDS
        self._tables = {table.name: table for table in tables}
        self._slices = {table.name: nn.Parameter(table.weights) for table in tables}
        slices = list(self._slices.values())
        self._optimizer: torch.optim.Optimizer
        if section.kind == "rowwise_adagrad":
            self._optimizer = RowWiseAdagrad(slices, lr=section.lr, eps=section.eps)
        elif section.kind == "adagrad":
            self._optimizer = torch.optim.Adagrad(slices, lr=section.lr, eps=section.eps)
        else:
            self._optimizer = torch.optim.SGD(slices, lr=section.lr)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._tables)

    def parameters(self) -> list[nn.Parameter]:
        """What autograd gives a gradient to."""
        return list({id(table.parameter): table.parameter for table in self._tables.values()}.values())

    def bind_gradients(self) -> None:
        """Point each table at its part of its parameter's gradient, which must not be replaced after."""
        for name, table in self._tables.items():
            gradient = table.parameter.grad
            assert gradient is not None
            part = gradient[table.offset : table.offset + table.weights.numel()]
            self._slices[name].grad = part.view_as(table.weights)

    def step(self) -> None:
        self._optimizer.step()

    def state(self, table: str) -> dict[str, torch.Tensor]:
        """Views, named as the fused optimizers name theirs: "sum", [rows] or [rows, D]; nothing for SGD."""
        found = self._optimizer.state[self._slices[table]].get("sum")
        if found is None:
            return {}
        return {"sum": found.view(-1) if isinstance(self._optimizer, RowWiseAdagrad) else found}


class DenseOptimizer:
    """Adam, AdamW or SGD over everything that is not a table; also steps the data-parallel tables.

    All gradients live in one flat buffer: first the dense ones, with a slot for the workers' word on whether
    theirs are fit to be applied; then those of the data-parallel tables. One all-reduce averages each part:
    the second is there only after the tables' backward, which must wait for that word. Clipping and schedule
    are for the dense part; tables have a constant learning rate.
    """

    def __init__(self, job: Job, model: Trainable, world: World) -> None:
        """Takes the `.grad` of all dense parameters and data-parallel tables of `model` into its keeping."""
        self._section = job.optimizer.dense
        self._world = world
        self._tables = model.replicated
        self._parameters = model.dense_parameters()
        dense = list(self._parameters.values())
        tables = self._tables.parameters() if self._tables else []
        dense_starts, slot = _places(dense, 0)
        table_starts, size = _places(tables, slot + _ALIGNMENT)
        self._gradient = torch.zeros(size, device=world.device)
        self._dense_gradient, self._table_gradient = (
            self._gradient[:slot],
            self._gradient[slot + _ALIGNMENT :],
        )
        self._averaged, self._slot = self._gradient[: slot + 1], self._gradient[slot]
        self._norm: torch.Tensor | None = None
        self._views = [
            (parameter, self._gradient[start : start + parameter.numel()].view_as(parameter))
            for parameter, start in zip([*dense, *tables], [*dense_starts, *table_starts], strict=True)
        ]
        for parameter, view in self._views:
            parameter.grad = view
        if self._tables:
            self._tables.bind_gradients()
        self._optimizer = _dense_optimizer(self._section, self._parameters)

    def zero_grad(self) -> None:
        """Before every backward."""
        self._gradient.zero_()
        self._norm = None

    def average(self, witnesses: Sequence[torch.Tensor] = ()) -> torch.Tensor:
        """Average the dense gradients over the workers; bool [], on the device and the same on every worker:
        whether they and every worker's `witnesses`, scalars, are finite. A collective.

        Gradients so large that the sum of their squares is not finite count as not finite: every optimizer
        but SGD keeps squares, and would never let such a weight move again.
        """
        assert all(parameter.grad is view for parameter, view in self._views), "a gradient was replaced"
        for witness in witnesses:
            # 0 where it is finite, NaN where not, which any sum keeps.
            self._slot += witness * 0.0
        self._average(self._averaged)
        self._norm = torch.linalg.vector_norm(self._dense_gradient)
        return torch.isfinite(self._norm + self._slot)

    def norms(self) -> list[torch.Tensor]:
        """Of the gradient of each dense parameter, on the device: after `average`, before `step`."""
        gradients = [parameter.grad for parameter in self._parameters.values() if parameter.grad is not None]
        return list(torch._foreach_norm(gradients))

    def not_finite(self, norms: Sequence[torch.Tensor] | None = None) -> list[str]:
        """Names of the dense parameters whose gradient is not finite by itself: by its norm of now, or that
        of `norms`, which were taken then.
        """
        of = zip(self._parameters, norms or self.norms(), strict=True)
        return [name for name, norm in of if not torch.isfinite(norm)]

    def step(self, step: int, fit: torch.Tensor | None = None) -> None:
        """Apply the gradients, after `average`. `step`: how many were taken before. A collective.

        fit: what `average` gave, where nobody has looked at it yet: if it is not so, weights and state of the
        dense part stay as they are, and so do the data-parallel tables if their gradient is zero.
        """
        assert self._norm is not None, "gradients are averaged first"
        optimizer: Any = self._optimizer
        # torch's fused optimizers ask for this on the device, and so does its own GradScaler tell them.
        optimizer.found_inf = None if fit is None else (~fit).float()
        if self._tables:
            self._average(self._table_gradient)
        if self._section.clip_norm is not None:
            # As torch.nn.utils.clip_grad_norm_ has it; a factor of 1 where the norm is small enough.
            self._dense_gradient *= (self._section.clip_norm / (self._norm + 1e-6)).clamp(max=1.0)
        for group in self._optimizer.param_groups:
            group["lr"] = self._section.lr * schedule_factor(self._section.schedule, step)
        optimizer.step()
        if self._tables:
            self._tables.step()

    def _average(self, gradient: torch.Tensor) -> None:
        if self._world.world_size > 1:
            dist.all_reduce(gradient)
            gradient /= self._world.world_size

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """The dense optimizer's state, live: "optimizer.<parameter>.<state>"; there from the start."""
        return {
            f"optimizer.{name}.{key}": value
            for name, parameter in self._parameters.items()
            for key, value in self._optimizer.state[parameter].items()
        }

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy in place a state that `state_tensors` gave. Raises InputError where names or shapes differ."""
        mine = self.state_tensors()
        if mine.keys() != tensors.keys():
            only_mine, only_theirs = mine.keys() - tensors.keys(), tensors.keys() - mine.keys()
            raise InputError(
                f"the saved dense optimizer is another: it lacks {_some(only_mine)}, and has "
                f"{_some(only_theirs)} that this one has not"
            )
        for name, value in mine.items():
            if value.shape != tensors[name].shape:
                saved = list(tensors[name].shape)
                raise InputError(
                    f"the saved dense optimizer does not fit: {name} is {saved}, here {list(value.shape)}"
                )
        with torch.no_grad():
            for name, value in mine.items():
                value.copy_(tensors[name])


def _places(parameters: Sequence[nn.Parameter], start: int) -> tuple[list[int], int]:
    """Where each begins in the flat buffer, from `start` on, and where the last ends."""
    starts = []
    for parameter in parameters:
        starts.append(start)
        start += -(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT
    return starts, start


def schedule_factor(schedule: Schedule, step: int) -> float:
    """Factor of the learning rate at `step`, counted from 0: a pure function, so a resume needs no state.

    Step s of a warm-up over w steps has (s + 1) / w, so that no step is taken with 0.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.decay == "none":
        return 1.0
    assert schedule.decay_steps is not None
    progress = min((step - schedule.warmup_steps) / schedule.decay_steps, 1.0)
    left = 1.0 - progress if schedule.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return schedule.floor + (1.0 - schedule.floor) * left


def _dense_optimizer(section: DenseSection, named: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """torch's optimizer with every state tensor in place.

    torch makes them at the first step, and until then loading a state does nothing, in silence.
    """
    parameters = list(named.values())
    groups: list[dict[str, Any]] = [
        {"params": [each for name, each in named.items() if not name.startswith(OBJECTIVE)]},
        # What balances losses is no weight of the model: decay would pull the balance back to its start.
        {"params": [each for name, each in named.items() if name.startswith(OBJECTIVE)], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if section.kind == "sgd":
        sgd = torch.optim.SGD(
            groups,
            lr=section.lr,
            momentum=section.momentum,
            weight_decay=section.weight_decay,
            fused=True,
        )
        for parameter in parameters:
            # A zero buffer takes the first step as torch's own empty one does: 0 * momentum + gradient.
            if section.momentum:
                sgd.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
        return sgd
    kinds: dict[str, Any] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    adam: torch.optim.Optimizer = kinds[section.kind](
        groups,
        lr=section.lr,
        betas=section.betas,
        eps=section.eps,
        weight_decay=section.weight_decay,
        fused=True,
    )
    for parameter in parameters:
        adam.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return adam


def _some(names: set[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "") or "nothing"
