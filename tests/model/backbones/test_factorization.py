from __future__ import annotations

import pytest
import torch

from mtlrec.model.backbones.factorization import Factorization
from mtlrec.model.dropout import Dropout
from mtlrec.schema import Lookup

LOOKUPS = (
    Lookup("brand", "brand_bias", 0, 4),
    Lookup("item", "q", 4, 8),
    Lookup("item", "other", 12, 12),
    Lookup("item", "item_bias", 24, 4),
    Lookup("user", "p", 28, 8),
)
INPUTS = 36 + 3


def factorization(num_tasks: int, hidden: list[int], biases: list[str]) -> Factorization:
    backbone = Factorization(
        inputs=INPUTS,
        num_tasks=num_tasks,
        num_scenarios=4,
        lookups=LOOKUPS,
        dropout=Dropout(),
        factors=["p", "q"],
        biases=biases,
        hidden=hidden,
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if name == "product":
                assert parameter.shape == (num_tasks, 8)
                assert torch.equal(parameter, torch.ones_like(parameter))
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return backbone


def plainly(
    backbone: Factorization, x: torch.Tensor, scenario: torch.Tensor, biases: list[str]
) -> torch.Tensor:
    """[T, M, 1], a row, a task and a column at a time."""
    named = dict(backbone.named_parameters())
    num_tasks = named["product"].shape[0] if "product" in named else 1
    column = {lookup.table: lookup.start for lookup in LOOKUPS}
    scores = []
    for task in range(num_tasks):
        for row in range(len(x)):
            score = torch.zeros(())
            for d in range(8):
                term = x[row, column["p"] + d] * x[row, column["q"] + d]
                score = score + (named["product"][task, d] * term if "product" in named else term)
            for table in biases:
                score = score + x[row, column[table] + int(scenario[row])]
            if "last.weight" in named:
                free = [each for each in LOOKUPS if each.table not in ("p", "q", *biases)]
                phi = torch.cat(
                    [x[row, each.start : each.start + each.width] for each in free] + [x[row, 36:]]
                )
                for layer in range(2):
                    weight, bias = named[f"mlp.layers.{layer}.weight"], named[f"mlp.layers.{layer}.bias"]
                    phi = torch.relu(weight @ phi + bias)
                score = score + named["last.weight"][task] @ phi
            scores.append(score)
    return torch.stack(scores).view(num_tasks, len(x), 1)


@pytest.mark.parametrize("num_tasks", [1, 3])
@pytest.mark.parametrize("hidden", [[], [6, 5]])
@pytest.mark.parametrize("biases", [[], ["item_bias"], ["item_bias", "brand_bias"]])
def test_the_plain_sum_and_its_gradients(num_tasks: int, hidden: list[int], biases: list[str]) -> None:
    backbone = factorization(num_tasks, hidden, biases)
    assert (backbone.product is None) == (num_tasks == 1 and not hidden)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, INPUTS, generator=generator, requires_grad=True)
    same = x.detach().clone().requires_grad_()
    scenario = torch.randint(4, (9,), generator=generator)
    found, expected = backbone(x, scenario), plainly(backbone, same, scenario, biases)
    assert found.shape == (num_tasks, 9, 1)
    torch.testing.assert_close(found, expected)
    slope = torch.randn(found.shape, generator=generator)
    parameters = list(backbone.parameters())
    one = torch.autograd.grad((found * slope).sum(), [x, *parameters])
    other = torch.autograd.grad((expected * slope).sum(), [same, *parameters])
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_row_reads_the_bias_of_its_scenario_alone() -> None:
    backbone = factorization(1, [], ["item_bias"])
    x = torch.zeros(4, INPUTS)
    x[:, 24:28] = torch.tensor([1.0, 20.0, 300.0, 4000.0])
    scores = backbone(x, torch.arange(4))
    assert scores.flatten().tolist() == [1.0, 20.0, 300.0, 4000.0]
    assert not list(backbone.parameters())
