from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import Block, FakeTarget, compile_model, same
from torch import Tensor, nn

import sparsecomp
from sparsecomp import Plan, planning
from sparsecomp.planner import pricing
from sparsecomp.planner.pricing import Pricer, model_us, planned_us
from sparsecomp.targets.base import DENSE, Candidate

PATTERNS = ("unstructured@0.6", "unstructured@0.75", "unstructured@0.9")


class Stack(nn.Module):
    """Four blocks of one type."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def batches(number: int = 8) -> list[Tensor]:
    return [torch.randn(4, 16, 32) for _ in range(number)]


@pytest.fixture(autouse=True)
def _known_latencies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of 5 ms, of which FakeTarget's 8 sites take 0.5 ms each: tests are not about time."""
    monkeypatch.setattr(planning, "model_us", lambda *_: 5000.0)
    monkeypatch.setattr(planning, "with_gain", lambda options, _: options)
    monkeypatch.setattr(Pricer, "scale", lambda *_: 1.0)


def make(model: nn.Module, calibration: Any = None, **changes: Any) -> Plan:
    options: dict[str, Any] = {"target": FakeTarget(), "patterns": PATTERNS, "criterion": "wanda", **changes}
    return sparsecomp.plan(model, batches() if calibration is None else calibration, **options)


def test_a_speed_budget_is_kept_in_the_prediction_and_the_model_is_left_alone() -> None:
    model = Stack().train()
    before = copy.deepcopy(model.state_dict())
    plan = make(model, speedup=2.0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert plan.summary is not None
    assert plan.summary.rest_us == 1000
    assert 2.0 <= plan.summary.speedup < 2.2
    assert {choice.prune for choice in plan} <= {"", *PATTERNS}
    assert plan.summary.quality == "1 - mean cosine of the output"
    assert plan.summary.measured_loss is None
    slower = make(model, max_latency="4 ms").summary
    assert slower is not None
    assert 3500 < slower.planned_us <= 4000
    assert slower.estimated_loss < plan.summary.estimated_loss


def test_a_quality_budget_is_kept_as_measured() -> None:
    model = Stack()
    inputs = batches(16)
    plan = make(model, inputs, max_quality_loss=0.01)
    assert plan.summary is not None
    assert plan.summary.measured_loss is not None
    assert 0.005 < plan.summary.measured_loss <= 0.01
    assert plan.summary.estimated_loss > 0
    assert plan.summary.planned_us < 5000
    # What was measured is what the user gets from the same calibration.
    pruned = copy.deepcopy(model)
    used = [batch for number, batch in enumerate(inputs) if number % 8]
    sparsecomp.sparsify_(pruned, plan, criterion="wanda", calibration=used)
    with torch.no_grad():
        losses = [
            1 - nn.functional.cosine_similarity(pruned(batch), model(batch), dim=-1).mean() for batch in inputs[::8]
        ]
    assert float(sum(losses)) / len(losses) == pytest.approx(plan.summary.measured_loss, rel=1e-3)


def test_a_quality_budget_is_kept_where_losses_do_not_add_up() -> None:
    def steep(dense: Tensor, pruned: Tensor) -> float:
        return float((dense - pruned).square().mean() / dense.square().mean()) ** 3

    plan = make(Stack(), max_quality_loss=1e-4, quality=steep)
    assert plan.summary is not None
    assert plan.summary.measured_loss is not None
    assert 0 < plan.summary.measured_loss <= 1e-4
    assert plan.summary.quality == "steep"
    # The options' losses were corrected by what was measured, so that the front agrees with it.
    chosen = [next(o for o in c.options if o.prune == c.prune) for c in plan]
    assert sum(option.loss for option in chosen) == pytest.approx(plan.summary.measured_loss, rel=1e-6)


def test_a_loss_that_only_dense_keeps_names_the_least_that_pruning_loses() -> None:
    def changed(dense: Tensor, pruned: Tensor) -> float:
        return float(not torch.equal(dense, pruned))

    with pytest.raises(ValueError) as error:
        make(Stack(), max_quality_loss=0.1, quality=changed)
    message = str(error.value)
    assert "a loss of at most 0.1 is not kept by any plan that prunes" in message
    assert "to unstructured@0.6) loses 1 as measured, for 4.9 ms instead of 5 ms" in message
    with pytest.raises(ValueError, match="is not kept by any plan that prunes"):
        make(Stack(), max_quality_loss=0)


def test_a_budget_that_one_layer_just_keeps_prunes_that() -> None:
    """Where the search for the sum of the estimates ends without a plan, the mildest one is tried."""

    def steep(dense: Tensor, pruned: Tensor) -> float:
        error = float((dense - pruned).square().mean() / dense.square().mean())
        return error if error < 0.01 else 100 * error

    plan = make(Stack(), max_quality_loss=0.01, quality=steep)
    assert any(choice.prune for choice in plan)
    assert plan.summary is not None
    assert plan.summary.measured_loss is not None
    assert 0 < plan.summary.measured_loss <= 0.01


def test_the_backend_follows_the_plan_of_a_pruned_model(tmp_path: Path) -> None:
    model, target = Stack().eval(), FakeTarget()
    plan = make(model, target=target, criterion="sparsegpt", speedup=1.5)
    plan.save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    names = sparsecomp.sparsify_(model, plan, criterion="sparsegpt", calibration=batches())
    assert names == [choice.name for choice in plan if choice.prune]
    x = batches(1)[0]
    report = sparsecomp.explain(model, x, options={"target": target, "plan": plan})
    assert [choice.chosen for choice in report] == [choice.chosen for choice in plan]
    reasons = [choice.reason.partition(": ")[2] for choice in report]
    assert all(reason.startswith("the plan says so") for reason in reasons)
    with torch.no_grad():
        same(compile_model(model, target, plan=plan)(x), model(x))
    assert target.runs == len(names)


def test_only_what_the_filter_accepts_is_planned() -> None:
    plan = make(Stack(), speedup=1.1, filter_fn=lambda _, name: name.endswith("up"))
    assert {choice.name for choice in plan if choice.options} == {f"blocks.{number}.up" for number in range(4)}
    assert len(plan) == 8


def test_a_module_that_runs_twice_is_pruned_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.block(x))

    model = Twice()
    plan = make(model, speedup=1.2)
    assert [choice.name for choice in plan] == ["block.up", "block.down", "block.up#2", "block.down#2"]
    assert plan.sites[0].prune == plan.sites[2].prune
    assert plan.sites[0].options == plan.sites[2].options
    assert plan.summary is not None
    assert plan.summary.rest_us == 3000
    pruned = sparsecomp.sparsify_(model, plan)
    assert pruned == [choice.name for choice in plan.sites[:2] if choice.prune]


def test_weights_that_others_share_are_left_alone() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(40, 32)
            self.block = Block()
            self.head = nn.Linear(32, 40, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.block(self.table(ids)))

    plan = make(Tied(), [torch.randint(0, 40, (2, 8)) for _ in range(3)], speedup=1.1)
    assert {choice.name for choice in plan if choice.options} == {"block.up", "block.down"}
    block = Block()
    plan = make(nn.Sequential(block, Block(), block), speedup=1.1)
    assert {choice.name for choice in plan if choice.options} == {"1.up", "1.down"}


def test_autotune_takes_measured_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(candidates: Iterable[Candidate], *_: Any) -> dict[Candidate, float]:
        return {DENSE: 600.0, **dict.fromkeys(candidates, 150.0)}

    monkeypatch.setattr(pricing, "measure", measured)
    plan = make(Stack(), speedup=1.1, autotune=True)
    # Predicted are 500 for dense, and for the patterns 1000 times their density.
    assert {option.us for choice in plan for option in choice.options if option.prune} == {150.0}
    assert {choice.options[0].us for choice in plan} == {600.0}
    assert plan.summary is not None
    assert plan.summary.rest_us == 5000 - 8 * 600


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "exactly one of"),
        ({"speedup": 2.0, "max_latency": 1.0}, "exactly one of"),
        ({"speedup": 100.0}, "cannot be reached: with the fastest option everywhere"),
        ({"speedup": 2.0, "patterns": ["unstructured"]}, "does not say how much to prune"),
        ({"speedup": 2.0, "patterns": []}, "holds nothing to prune to"),
        ({"speedup": 2.0, "patterns": ["2:4", "16:taps:4:9"]}, "no site takes '16:taps:4:9'"),
        ({"speedup": 2.0, "patterns": ["3:2"]}, "N must be from 1 to M"),
        ({"speedup": 2.0, "criterion": "sparsgpt"}, "did you mean 'sparsegpt'"),
        ({"speedup": 2.0, "target": "x68"}, "did you mean"),
        ({"speedup": 2.0, "filter_fn": lambda *_: False}, "filter_fn rejected every module"),
        ({"speedup": 2.0, "calibration": []}, "holds no batch"),
        ({"speedup": 2.0, "calibration": [torch.full((2, 8, 32), float("nan"))]}, "NaN"),
        ({"speedup": 2.0, "patterns": ["unstructured@0.1"]}, "no pattern is predicted to make any layer faster"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(changes: dict[str, Any], message: str) -> None:
    model = Stack()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError) as error:
        make(model, **changes)
    assert message in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_without_sites_says_so() -> None:
    with pytest.raises(ValueError, match="no module that can be pruned"):
        make(nn.Sequential(nn.ReLU()), speedup=2.0)
    with pytest.raises(ValueError, match="float64"):
        make(Stack().double(), [batch.double() for batch in batches()], speedup=2.0)


def test_the_latency_of_a_model_is_measured() -> None:
    from sparsecomp.pruning.calibration import Call

    assert 0 < model_us(Block().eval(), Call((torch.randn(4, 32),), {"scale": 2.0})) < 1e6


def test_the_latency_of_a_plan_is_measured_on_a_pruned_copy() -> None:
    from sparsecomp.pruning.calibration import Call

    model = Stack().eval()
    chosen = make(model, speedup=2.0)
    before = copy.deepcopy(model.state_dict())
    assert 0 < planned_us(model, Call((torch.randn(4, 16, 32),), {}), chosen, FakeTarget()) < 1e6
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_of_a_target_that_is_not_here_only_layers_are_priced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(planning, "model_us", lambda *_: pytest.fail("nothing of it can be measured here"))
    monkeypatch.setattr(pricing, "measure", lambda *_: pytest.fail("nothing of it can be measured here"))
    plan = make(Stack(), target="arm:cortex-a72", speedup=1.05)
    assert plan.target == "arm:cortex-a72"
    assert plan.summary is not None
    assert plan.summary.rest_us == 0
    assert plan.summary.dense_us == pytest.approx(sum(choice.dense_us or 0.0 for choice in plan))
    assert plan.summary.speedup >= 1.05
    assert {choice.chosen.kernel for choice in plan if choice.prune} <= {"rows", "panel"}
    with pytest.raises(ValueError, match="cannot be measured here"):
        make(Stack(), target="arm:cortex-a72", speedup=1.05, autotune=True)
