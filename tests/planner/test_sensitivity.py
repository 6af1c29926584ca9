from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsecomp.patterns import Pattern
from sparsecomp.planner.sensitivity import Estimate, estimate
from sparsecomp.pruning.calibration import Call, calibrating
from sparsecomp.pruning.criterion import criterion_named
from sparsecomp.pruning.sites import Site, choose_sites

PATTERNS = [Pattern.parse(text) for text in ("unstructured@0.25", "2:4", "unstructured@0.75")]


class Blocks(nn.Module):
    """Blocks that matter more from one to the next, and a head outside of them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(3))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = x + 3.0**number * block(x)
        return self.head(x)


def run(model: nn.Module, calls: list[Call], criterion: str = "magnitude") -> dict[str, list[Estimate]]:
    with calibrating(model):
        dense = [call.run(model) for call in calls]

        def loss() -> float:
            pairs = zip(calls, dense, strict=True)
            return float(sum((call.run(model) - want).square().sum() for call, want in pairs))

        return estimate(
            model,
            calls,
            choose_sites(model, None),
            PATTERNS,
            criterion_named(criterion),
            loss=loss,
            wanted=lambda *_: True,
            done=lambda: None,
        )


def inputs() -> list[Call]:
    """Rows of one length, which all count the same."""
    return [Call((functional.normalize(torch.randn(32, 16)),), {}) for _ in range(2)]


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "sparsegpt"])
def test_of_a_linear_model_every_estimate_is_the_measured_loss(criterion: str) -> None:
    model, calls = nn.Sequential(nn.Linear(16, 24)), inputs()
    before = model[0].weight.clone()
    found = run(model, calls, criterion)["0"]
    assert torch.equal(model[0].weight, before)
    x = torch.cat([call.args[0] for call in calls])
    energy = (x @ before.T).square().sum().item()
    # Here the loss is the squared error of the one layer's output, to which all patterns' losses are proportional.
    for item in found:
        assert item.loss == pytest.approx(item.error * energy, rel=1e-3)
    assert [item.error for item in found] == sorted(item.error for item in found)
    if criterion == "magnitude":
        pruned = Pattern.parse("2:4").project(before)
        error = (x @ (pruned - before).T).square().sum().item() / energy
        assert next(item for item in found if item.prune == "2:4").error == pytest.approx(error, rel=1e-4)


def test_sites_in_blocks_and_outside_are_measured_each_on_its_own() -> None:
    model, calls = Blocks(), inputs()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = run(model, calls)
    assert list(found) == ["blocks.0", "blocks.1", "blocks.2", "head"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    losses = [found[f"blocks.{number}"][1].loss for number in range(3)]
    assert losses[0] < losses[2]


def test_a_pattern_that_is_not_wanted_is_no_option() -> None:
    model, calls = Blocks(), inputs()
    asked: list[tuple[str, str]] = []

    def wanted(site: Site, prune: str, weight: Tensor) -> bool:
        asked.append((site.name, prune))
        assert Pattern.parse(prune).check(weight)
        return site.name == "head" and prune != "2:4"

    measured: list[int] = []
    with calibrating(model):
        found = estimate(
            model,
            calls,
            choose_sites(model, None),
            PATTERNS,
            criterion_named("wanda"),
            loss=lambda: float(len(measured.append(1) or measured)),
            wanted=wanted,
            done=lambda: None,
        )
    assert len(asked) == 4 * len(PATTERNS)
    assert [item.prune for item in found["head"]] == ["unstructured@0.25", "unstructured@0.75"]
    assert found["blocks.0"] == []
    assert len(measured) == 1  # one pass for a site, whatever its patterns


def test_the_weight_comes_back_when_the_loss_fails() -> None:
    model = nn.Sequential(nn.Linear(16, 8))
    before = model[0].weight.clone()

    def fail() -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), calibrating(model):
        estimate(
            model,
            inputs(),
            choose_sites(model, None),
            PATTERNS,
            criterion_named("magnitude"),
            loss=fail,
            wanted=lambda *_: True,
            done=lambda: None,
        )
    assert torch.equal(model[0].weight, before)
