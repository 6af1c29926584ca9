"""Plans choose what linears skip together with what they are pruned to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sparsecomp
from sparsecomp.skipping import emulate


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512)).eval()


def _batches(count: int = 8) -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    # Heavy tails, as hidden states have them: most inputs matter little.
    return [torch.randn(64, 512, generator=random) ** 3 for _ in range(count)]


@pytest.fixture(scope="module")
def plan() -> sparsecomp.Plan:
    return sparsecomp.plan(
        _model(),
        _batches(),
        max_quality_loss=0.05,
        patterns=["unstructured@0.5"],
        skips=[0.3, 0.6],
        criterion="magnitude",
        inputs=torch.randn(1, 512),
    )


def test_skips_are_options_alone_and_on_top_of_patterns(plan: sparsecomp.Plan) -> None:
    offered = {(option.prune, str(option.skip)) for site in plan for option in site.options}
    assert {("", "None"), ("", "input:0.3"), ("", "input:0.6")} <= offered
    for site in plan:
        alone = {option.skip.rate: option for option in site.options if option.skip and not option.prune}
        assert alone[0.6].us < alone[0.3].us < site.options[0].us
        assert alone[0.6].loss > alone[0.3].loss > 0


def test_the_loss_of_the_plan_is_measured_with_its_skips(plan: sparsecomp.Plan) -> None:
    assert len(plan.skips()) > 0
    assert plan.summary is not None
    assert 0 < plan.summary.measured_loss <= 0.05
    assert "input:" in str(plan)


def test_a_plan_with_skips_is_read_back(plan: sparsecomp.Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    read = sparsecomp.Plan.load(tmp_path / "plan.json")
    assert read == plan
    strict = read.replan(max_quality_loss=1e-4 + min(o.loss for s in plan for o in s.options if o.loss))
    assert strict.summary.estimated_loss < plan.summary.estimated_loss
    document = (tmp_path / "plan.json").read_text().replace('"rate": 0.6', '"rate": 1.6')
    with pytest.raises(sparsecomp.planner.PlanError, match=r"skip.rate: expected a share below 1"):
        sparsecomp.Plan.from_json(document)


def test_the_compiled_model_skips_as_emulated(plan: sparsecomp.Plan) -> None:
    model = _model()
    sparsecomp.sparsify_(model, plan)
    x = torch.randn(1, 512) ** 3
    with torch.inference_mode(), emulate(model, plan.skips()):
        want = model(x)
    with torch.inference_mode():
        got = torch.compile(model, backend="sparse", options={"plan": plan, "skip": plan.skips()})(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, model(x), rtol=1e-3, atol=1e-3)


def test_calls_of_many_tokens_and_bad_rates_are_errors() -> None:
    with pytest.raises(ValueError, match="of one token"):
        sparsecomp.plan(_model(), _batches(), speedup=1.5, skips=[0.5], criterion="magnitude")
    with pytest.raises(ValueError, match=r"skips holds 1\.2"):
        sparsecomp.plan(_model(), _batches(), speedup=1.5, skips=[1.2])
