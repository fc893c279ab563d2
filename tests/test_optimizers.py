from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from mtlrec.distributed import World
from mtlrec.job.errors import InputError
from mtlrec.job.optimizer import Schedule
from mtlrec.optimizers import DenseOptimizer, ReplicatedTables, schedule_factor
from tests.model.example import example_job, single_world

world = pytest.fixture(scope="module")(single_world)


class Small:
    """As much of a model as an optimizer asks for."""

    replicated: ReplicatedTables | None = None

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(5, 3, generator=generator))
        self.bias = nn.Parameter(torch.randn(3, generator=generator))

    def dense_parameters(self) -> dict[str, nn.Parameter]:
        return {"layer.weight": self.weight, "layer.bias": self.bias}

    def loss(self, step: int) -> torch.Tensor:
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(100 + step))
        return (x @ self.weight + self.bias).square().sum()


def optimizer_for(model: Small, world: World, **dense: Any) -> DenseOptimizer:
    return DenseOptimizer(example_job(optimizer={"dense": dense}), model, world)


def train(model: Small, optimizer: DenseOptimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        model.loss(step).backward()
        optimizer.average()
        optimizer.step(step)


KINDS: list[dict[str, Any]] = [
    {"kind": "adam", "lr": 0.01},
    {"kind": "adam", "lr": 0.01, "weight_decay": 0.1, "betas": [0.8, 0.95], "eps": 1e-6},
    {"kind": "adamw", "lr": 0.01, "weight_decay": 0.1},
    {"kind": "sgd", "lr": 0.01},
    {"kind": "sgd", "lr": 0.01, "momentum": 0.9, "weight_decay": 0.1},
]


@pytest.mark.parametrize("dense", KINDS)
def test_steps_are_those_of_torch(world: World, dense: dict[str, Any]) -> None:
    ours, theirs = Small(), Small()
    train(ours, optimizer_for(ours, world, **dense), range(10))
    options = {key: value for key, value in dense.items() if key != "kind"}
    kind: Any = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[dense["kind"]]
    plain = kind(theirs.dense_parameters().values(), foreach=False, fused=False, **options)
    for step in range(10):
        plain.zero_grad()
        theirs.loss(step).backward()
        plain.step()
    torch.testing.assert_close(ours.weight, theirs.weight)
    torch.testing.assert_close(ours.bias, theirs.bias)
    assert not torch.equal(ours.weight, Small().weight)


@pytest.mark.parametrize("dense", KINDS)
def test_ten_steps_are_four_and_six_to_the_bit(world: World, dense: dict[str, Any]) -> None:
    schedule = {"warmup_steps": 3, "decay": "cosine", "decay_steps": 9}
    whole, first, second = Small(), Small(), Small()
    at_once = optimizer_for(whole, world, schedule=schedule, **dense)
    train(whole, at_once, range(10))
    before = optimizer_for(first, world, schedule=schedule, **dense)
    train(first, before, range(4))
    saved = copy.deepcopy(before.state_tensors())
    with torch.no_grad():
        second.weight.copy_(first.weight)
        second.bias.copy_(first.bias)
    after = optimizer_for(second, world, schedule=schedule, **dense)
    after.load(saved)
    train(second, after, range(4, 10))
    assert torch.equal(whole.weight, second.weight)
    assert torch.equal(whole.bias, second.bias)
    for name, value in at_once.state_tensors().items():
        assert torch.equal(value, after.state_tensors()[name]), name


def test_state_is_complete_before_the_first_step(world: World) -> None:
    state = optimizer_for(Small(), world).state_tensors()
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "optimizer.layer.weight.step": (),
        "optimizer.layer.weight.exp_avg": (5, 3),
        "optimizer.layer.weight.exp_avg_sq": (5, 3),
        "optimizer.layer.bias.step": (),
        "optimizer.layer.bias.exp_avg": (3,),
        "optimizer.layer.bias.exp_avg_sq": (3,),
    }
    momentum = optimizer_for(Small(), world, kind="sgd", momentum=0.5).state_tensors()
    assert set(momentum) == {
        "optimizer.layer.weight.momentum_buffer",
        "optimizer.layer.bias.momentum_buffer",
    }
    assert optimizer_for(Small(), world, kind="sgd").state_tensors() == {}


def test_a_state_that_does_not_fit_is_refused(world: World) -> None:
    optimizer = optimizer_for(Small(), world)
    state = copy.deepcopy(optimizer.state_tensors())
    missing = {name: value for name, value in state.items() if name != "optimizer.layer.bias.step"}
    with pytest.raises(InputError, match=r"lacks optimizer\.layer\.bias\.step"):
        optimizer.load(missing)
    with pytest.raises(InputError, match=r"has optimizer\.other\.step that this one has not"):
        optimizer.load({**state, "optimizer.other.step": torch.zeros(())})
    with pytest.raises(InputError, match=r"layer\.bias\.exp_avg is \[4\], here \[3\]"):
        optimizer.load({**state, "optimizer.layer.bias.exp_avg": torch.zeros(4)})


@pytest.mark.parametrize("clip_norm", [0.5, 1e6])
def test_clips_the_global_norm(world: World, clip_norm: float) -> None:
    ours, theirs = Small(), Small()
    train(ours, optimizer_for(ours, world, kind="sgd", lr=0.1, clip_norm=clip_norm), range(1))
    theirs.loss(0).backward()
    parameters = list(theirs.dense_parameters().values())
    norm = nn.utils.clip_grad_norm_(parameters, clip_norm)
    assert 0.5 < norm < 1e6
    torch.optim.SGD(parameters, lr=0.1).step()
    torch.testing.assert_close(ours.weight, theirs.weight)
    torch.testing.assert_close(ours.bias, theirs.bias)


def test_gradients_accumulate_between_zero_grads_and_vanish_after(world: World) -> None:
    model = Small()
    optimizer = optimizer_for(model, world)
    optimizer.zero_grad()
    model.loss(0).backward()
    assert model.bias.grad is not None
    once = model.bias.grad.clone()
    model.loss(0).backward()
    torch.testing.assert_close(model.bias.grad, 2 * once)
    optimizer.zero_grad()
    assert not model.bias.grad.any()


def test_a_replaced_gradient_is_noticed(world: World) -> None:
    model = Small()
    optimizer = optimizer_for(model, world)
    model.weight.grad = None
    model.loss(0).backward()
    with pytest.raises(AssertionError, match="a gradient was replaced"):
        optimizer.average()


@pytest.mark.parametrize(
    ("weight", "bias", "named"),
    [
        (math.nan, 1.0, ["layer.weight"]),
        (1.0, math.inf, ["layer.bias"]),
        (1e25, 1.0, ["layer.weight"]),  # its square is not
        (4e18, 8e18, []),  # nor is the sum of these, together
    ],
)
def test_gradients_that_no_optimizer_can_square_are_not_finite(
    world: World, weight: float, bias: float, named: list[str]
) -> None:
    model = Small()
    optimizer = optimizer_for(model, world)
    for value, expected in ((1e10, True), (weight, False), (1e10, True)):
        optimizer.zero_grad()
        (value * model.weight.sum() + (bias if not expected else 1.0) * model.bias.sum()).backward()
        assert bool(optimizer.average()) == expected
        assert optimizer.not_finite() == ([] if expected else named)


def test_a_witness_that_is_not_finite_is_heard(world: World) -> None:
    optimizer = optimizer_for(Small(), world)
    for value, expected in ((3e38, True), (math.inf, False), (math.nan, False), (0.0, True)):
        optimizer.zero_grad()
        assert bool(optimizer.average([torch.tensor(1.0), torch.tensor(value)])) == expected


def test_schedule_warms_up_and_decays() -> None:
    linear = Schedule(warmup_steps=4, decay="linear", decay_steps=10, floor=0.2)
    factors = [schedule_factor(linear, step) for step in range(20)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[9] == pytest.approx(0.2 + 0.8 * 0.5)
    assert factors[14:] == pytest.approx([0.2] * 6)
    cosine = Schedule(decay="cosine", decay_steps=8)
    assert schedule_factor(cosine, 0) == 1.0
    assert schedule_factor(cosine, 2) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert schedule_factor(cosine, 8) == pytest.approx(0.0)
    assert schedule_factor(cosine, 10**9) == pytest.approx(0.0)
    assert [schedule_factor(Schedule(), step) for step in (0, 1, 10**9)] == [1.0, 1.0, 1.0]


def test_schedule_reaches_the_step(world: World) -> None:
    model = Small()
    before = model.bias.detach().clone()
    optimizer = optimizer_for(model, world, kind="sgd", lr=0.1, schedule={"warmup_steps": 10})
    train(model, optimizer, range(1))
    other = Small()
    other.loss(0).backward()
    assert other.bias.grad is not None
    torch.testing.assert_close(model.bias, before - 0.1 * 0.1 * other.bias.grad)
