"""Plans for convolutions and for models that mix them with linears."""

from __future__ import annotations

import copy
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import FakeTarget, compile_model
from torch import Tensor, nn
from torch.nn import functional

import sparsecomp
from sparsecomp import Plan, planning
from sparsecomp.planner import pricing
from sparsecomp.planner.pricing import Pricer
from sparsecomp.pruning.batchnorm import reestimate_batchnorm
from sparsecomp.targets.base import DENSE, DEPTHWISE, Candidate, ConvEpilogue, ConvKernel, Problem, WeightFacts
from sparsecomp.window import Maps, Window, convolve

CONV = Candidate("conv", "unstructured", (("vectors", 4),))
PATTERNS = ("unstructured@0.6", "unstructured@0.75", "unstructured@0.9")


class FakeConvKernel(ConvKernel):
    def __init__(self, weight: Tensor, window: Window) -> None:
        self.weight, self.window, self.runs, self.nbytes = weight.detach().clone(), window, 0, 8

    def run(
        self, x: Tensor, terms: Tensor | None, residual: Tensor | None, epilogue: ConvEpilogue, out: Tensor
    ) -> None:
        self.runs += 1
        assert (residual, epilogue.residual_first) == (None, False)
        value = convolve(x, self.weight, self.window)
        if terms is not None:
            shift, scale = terms.reshape(2, -1, 1, 1)
            value = value * scale + shift
        out.copy_(functional.relu(value) if epilogue.activation == "relu" else value)

    def build(self, maps: Maps, epilogue: ConvEpilogue, residual: bool) -> None:
        pass


class ConvTarget(FakeTarget):
    """Prices convolutions as `FakeTarget` does linears; depthwise ones take 100 us dense and 60 channels first."""

    def __init__(self) -> None:
        super().__init__()
        self.convs: list[FakeConvKernel] = []

    def conv_candidates(
        self, facts: WeightFacts, window: Window, allowed: Collection[str] | None = None
    ) -> list[Candidate]:
        return [DENSE, DEPTHWISE if window.is_depthwise(facts.in_features) else CONV]

    def predict(self, candidate: Candidate, problem: Problem) -> float:
        if problem.window is not None and problem.window.is_depthwise(problem.facts.in_features):
            return 100.0 if candidate.is_dense else 60.0
        return super().predict(candidate, problem)

    def prepare_conv(self, candidate: Candidate, weight: Tensor, window: Window) -> ConvKernel:
        self.convs.append(FakeConvKernel(weight, window))
        return self.convs[-1]


class Mixed(nn.Module):
    """Convolutions with batch norms, a depthwise and a grouped one among them, and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(4, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.depthwise, self.norm2 = nn.Conv2d(16, 16, 3, 2, 1, groups=16, bias=False), nn.BatchNorm2d(16)
        self.grouped, self.norm3 = nn.Conv2d(16, 32, 1, groups=2, bias=False), nn.BatchNorm2d(32)
        self.head = nn.Linear(32, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm1(self.first(x)))
        x = functional.relu(self.norm2(self.depthwise(x)))
        x = functional.relu(self.norm3(self.grouped(x)))
        return self.head(x.mean((2, 3)))


def batches(number: int = 8) -> list[Tensor]:
    return [torch.randn(8, 4, 12, 12) for _ in range(number)]


def mixed() -> nn.Module:
    model = Mixed().eval()
    reestimate_batchnorm(model, batches())
    return model


@pytest.fixture(autouse=True)
def _known_latencies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of 2 ms, of which three sites take 0.5 ms each and the depthwise convolution 0.1 ms."""
    monkeypatch.setattr(planning, "model_us", lambda *_: 2000.0)
    monkeypatch.setattr(planning, "with_gain", lambda options, _: options)
    monkeypatch.setattr(Pricer, "scale", lambda *_: 1.0)


def make(model: nn.Module, calibration: Any = None, **changes: Any) -> Plan:
    options: dict[str, Any] = {"target": ConvTarget(), "patterns": PATTERNS, "criterion": "wanda", **changes}
    return sparsecomp.plan(model, batches() if calibration is None else calibration, **options)


def test_convolutions_and_linears_share_one_budget(tmp_path: Path) -> None:
    model = mixed()
    before = copy.deepcopy(model.state_dict())
    plan = make(model, speedup=1.5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [choice.name for choice in plan] == ["first", "depthwise", "grouped", "head"]
    assert [bool(choice.options) for choice in plan] == [True, False, True, True]
    window = Window((3, 3), (1, 1), (1, 1))
    assert (plan.sites[0].window, plan.sites[0].maps, plan.sites[0].tokens) == (window, Maps(8, 12, 12), 8 * 144)
    assert (plan.sites[2].shape, plan.sites[2].window) == ((32, 8), Window((1, 1), groups=2))
    assert plan.sites[3].window is None
    assert plan.summary is not None
    assert plan.summary.rest_us == 500
    assert plan.summary.speedup >= 1.5

    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    target = ConvTarget()
    names = sparsecomp.sparsify_(model, plan, criterion="wanda", calibration=batches())
    assert names == [choice.name for choice in plan if choice.prune]
    x = batches(1)[0]
    report = sparsecomp.explain(model, x, options={"target": target, "plan": plan})
    assert [choice.chosen for choice in report] == [choice.chosen for choice in plan]
    assert all("the plan says so" in choice.reason for choice in report)
    with torch.no_grad():
        given, expected = compile_model(model, target, plan=plan)(x), model(x)
    assert (given - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert sum(kernel.runs for kernel in target.convs) + target.runs == len(names) + 1  # and the depthwise one


def test_depthwise_convolutions_follow_where_a_convolution_is_sparse() -> None:
    plan = make(mixed(), speedup=1.25, filter_fn=lambda _, name: name == "first")
    (first, depthwise, *_), summary = plan.sites, plan.summary
    assert summary is not None
    assert (first.prune, first.chosen) == ("unstructured@0.9", CONV)
    assert depthwise.chosen == DEPTHWISE
    # 1500 outside, of which 40 less for the depthwise convolution, and a tenth of 1000.
    assert summary.planned_us == pytest.approx(1560, abs=5)
    with pytest.raises(ValueError, match=r"predicted to take 1.56 ms \(1.28 times"):
        plan.replan(speedup=1.4)
    assert plan.pareto().points[0].us == summary.planned_us
    # Where only the linear is pruned, no convolution asks for the layout.
    plan = make(mixed(), speedup=1.1, filter_fn=lambda _, name: name == "head")
    assert [choice.chosen for choice in plan if choice.name == "depthwise"] == [DENSE]
    with pytest.raises(ValueError, match=r"predicted to take 1.6 ms"):
        plan.replan(max_latency="1.58 ms")


def test_a_quality_budget_is_kept_with_batch_norms() -> None:
    model, inputs = mixed(), batches(16)
    plan = make(model, inputs, max_quality_loss=0.02)
    assert plan.summary is not None
    assert plan.summary.measured_loss is not None
    assert 0 < plan.summary.measured_loss <= 0.02
    used = [batch for number, batch in enumerate(inputs) if number % 8]
    pruned = copy.deepcopy(model)
    sparsecomp.sparsify_(pruned, plan, criterion="wanda", calibration=used)
    with torch.no_grad():
        losses = [1 - functional.cosine_similarity(pruned(x), model(x), dim=-1).mean() for x in inputs[::8]]
    assert float(sum(losses)) / len(losses) == pytest.approx(plan.summary.measured_loss, rel=1e-3)


def test_what_batch_norms_make_up_for_is_no_loss() -> None:
    """A layer whose pruned outputs are the dense ones times 0.7 costs nothing behind a batch norm."""
    model = nn.Sequential(nn.Conv2d(1, 8, (1, 4), bias=False), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4))
    with torch.no_grad():
        model[0].weight[:] = torch.tensor([0.7, 0.3, 0.3, 0.3]).reshape(1, 1, 1, 4)
    # All inputs of a patch are the same, so that a row with one weight of 0.7 gives 0.7 / 1.6 of the output.
    inputs = [torch.randn(64, 1, 1, 1).expand(64, 1, 1, 4).contiguous() for _ in range(8)]
    model.eval()
    reestimate_batchnorm(model, inputs)
    plan = make(
        model,
        inputs,
        speedup=1.0,
        patterns=["1:4"],
        criterion="magnitude",
        filter_fn=lambda module, _: isinstance(module, nn.Conv2d),
    )
    (option,) = (option for choice in plan for option in choice.options if option.prune)
    assert option.loss < 1e-5


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "ria", "sparsegpt"])
def test_every_criterion_plans_convolutions(criterion: str) -> None:
    plan = make(mixed(), criterion=criterion, speedup=1.5, patterns=[*PATTERNS, "2:4", "8x1@0.5"])
    offered = {option.prune for choice in plan for option in choice.options}
    assert offered == {"", *PATTERNS}  # FakeTarget's prices go by density: half of the weights do not pay
    for choice in plan:
        losses = [option.loss for option in sorted(choice.options, key=lambda option: option.prune)]
        assert losses == sorted(losses)


def test_kernel_patterns_are_options_of_kernels_of_their_taps() -> None:
    model = mixed()
    plan = make(model, patterns=["8:taps:2:9", "unstructured@0.9"], speedup=1.6)
    offered = {choice.name: sorted(o.prune for o in choice.options) for choice in plan if choice.options}
    assert offered == {
        "first": ["", "8:taps:2:9", "unstructured@0.9"],
        "grouped": ["", "unstructured@0.9"],
        "head": ["", "unstructured@0.9"],
    }


def test_autotune_measures_the_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.Size, Window | None, Maps | None]] = []

    def measured(candidates: Any, weight: Tensor, problem: Problem, _: Any) -> dict[Candidate, float]:
        seen.append((weight.shape, problem.window, problem.maps))
        return {DENSE: 600.0, **dict.fromkeys(candidates, 150.0)}

    monkeypatch.setattr(pricing, "measure", measured)
    plan = make(mixed(), speedup=1.1, autotune=True, filter_fn=lambda _, name: name == "first")
    assert {option.us for choice in plan for option in choice.options} == {150.0, 600.0}
    assert set(seen) == {(torch.Size([16, 4, 3, 3]), Window((3, 3), (1, 1), (1, 1)), Maps(8, 12, 12))}
