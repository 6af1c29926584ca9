"""Plans choose in which form linears and FFN blocks skip together with what they are pruned to."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from kernel_cases import needs_x86
from torch import Tensor, nn

import sparsecomp
from sparsecomp.planner.skips import SkipForm
from sparsecomp.pruning.calibration import as_calls, calibrating
from sparsecomp.skipping import calibrate_skips, emulate
from sparsecomp.skipping.offers import Offer, offer_skips
from sparsecomp.skipping.sites import find_ffns

FORMS = ("relu", "threshold:0.3", "threshold:0.6", "input:0.3", "input:0.6", "rsparse:0.6", "block:0.5")


class Block(nn.Module):
    def __init__(self, act: nn.Module, width: int = 512) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, 4 * width), act, nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.act(self.fc1(x)))


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(nn.GELU()), Block(nn.ReLU())).eval()


def _batches(count: int = 8, width: int = 512) -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    # Heavy tails, as hidden states have them: most inputs matter little.
    return [torch.randn(64, width, generator=random) ** 3 for _ in range(count)]


@pytest.fixture(scope="module")
def plan() -> sparsecomp.Plan:
    return sparsecomp.plan(
        _model(),
        _batches(),
        max_quality_loss=0.05,
        patterns=["unstructured@0.5"],
        skips=FORMS,
        criterion="magnitude",
        inputs=torch.randn(1, 512),
    )


pytestmark = needs_x86


def test_forms_are_options_alone_and_on_top_of_patterns(plan: sparsecomp.Plan) -> None:
    offered = [{(option.prune, str(option.skip or "")) for option in site.options} for site in plan]
    for options in offered:
        assert {("", ""), ("", "input:0.3"), ("", "input:0.6"), ("", "threshold:0.6")} <= options
    # Only what a ReLU makes is exactly zero.
    assert [("", "relu") in options for options in offered] == [False, False, True, True]
    pruned = {skip for options in offered for prune, skip in options if prune}
    assert not pruned or "threshold:0.6" in pruned


def test_more_skipping_costs_less_time_and_more_loss(plan: sparsecomp.Plan) -> None:
    for site in plan:
        alone = {str(option.skip): option for option in site.options if not option.prune}
        for kind in ("input", "threshold"):
            low, high = alone[f"{kind}:0.3"], alone[f"{kind}:0.6"]
            # A gate is read in full by the forms of blocks.
            assert high.us < low.us or (kind, site.name[2:]) == ("threshold", "fc1")
            assert high.loss > low.loss > 0 or "relu" in alone
        assert "relu" not in alone or alone["relu"].loss == 0


def test_blocks_skip_as_a_whole_in_every_plan(plan: sparsecomp.Plan) -> None:
    budgets = [{"max_quality_loss": loss} for loss in (0.0005, 0.005, 0.5)] + [{"speedup": 1.001}]
    for chosen in (plan, *(point.plan for point in plan.pareto(6)), *(plan.replan(**budget) for budget in budgets)):
        forms = Counter((site.block, site.skip) for site in chosen if site.skip is not None and site.skip.of_block)
        assert set(forms.values()) <= {2}
        assert {(name, form) for name, form in chosen.skips().items() if form.of_block} == set(forms)


def test_the_loss_of_the_plan_is_measured_with_its_skips(plan: sparsecomp.Plan) -> None:
    assert plan.skips()
    assert plan.summary is not None
    assert plan.summary.measured_loss is not None
    assert 0 <= plan.summary.measured_loss <= 0.05
    assert any(str(form) in str(plan) for form in plan.skips().values())


def test_a_plan_with_skips_is_read_back(plan: sparsecomp.Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    read = sparsecomp.Plan.load(tmp_path / "plan.json")
    assert read == plan
    assert read.skips() == plan.skips()
    document = (tmp_path / "plan.json").read_text().replace('"input:0.6"', '"input:1.6"')
    with pytest.raises(sparsecomp.planner.PlanError, match=r"skip: skip form input needs a number from 0 to below 1"):
        sparsecomp.Plan.from_json(document)


def test_the_compiled_model_skips_as_planned(plan: sparsecomp.Plan) -> None:
    model = _model()
    sparsecomp.sparsify_(model, plan)
    skips = calibrate_skips(model, _batches(), plan)
    assert {name: choice.form.kind for name, choice in skips.items()} == {n: f.kind for n, f in plan.skips().items()}
    x = torch.randn(1, 512) ** 3
    with torch.inference_mode(), emulate(model, skips):
        want = model(x)
    with torch.inference_mode():
        got = torch.compile(model, backend="sparse", options={"plan": plan, "skip": skips})(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def _offers(forms: list[str], us: float = 1.0) -> dict[str, list[Offer]]:
    """The offers for a small model; every linear takes 100 us dense, and `us` for every weight that is read."""
    model = nn.Sequential(*(Block(nn.GELU(), 16) for _ in range(5))).eval()
    from sparsecomp.planner import Prediction, SiteChoice
    from sparsecomp.pruning.sites import choose_sites
    from sparsecomp.targets.base import DENSE

    sites = choose_sites(model, None)
    entries = {
        site.name: [SiteChoice(site.name, (1, 1), 1, 1.0, DENSE, "", predictions=(Prediction(DENSE, 100.0, 4),))]
        for site in sites
    }
    calls = as_calls(_batches(2, 16))
    parsed = [SkipForm.parse(form) for form in forms]
    with calibrating(model):
        return offer_skips(
            model,
            calls,
            sites,
            find_ffns(model),
            parsed,
            entries=entries,
            cost=lambda entry, facts, kept, by_input: us * kept * facts.nonzeros / 10,
            loss=lambda: 1.0,
            done=lambda: None,
        )


def test_units_are_read_in_full_by_the_gate_alone() -> None:
    offers = _offers(["threshold:0.5"])
    assert [round(offer.kept, 2) for name in ("0.fc1", "0.fc2") for offer in offers[name]] == [1.0, 0.5]
    # The loss is that of the block, once.
    assert sum(offer.loss for name in ("0.fc1", "0.fc2") for offer in offers[name]) == pytest.approx(1.0)


def test_forms_of_blocks_that_gain_nothing_are_not_offered() -> None:
    assert not any(_offers(["threshold:0.5", "block:0.1"], us=3.0).values())


def test_whole_blocks_are_offered_together_without_the_last() -> None:
    offers = _offers(["block:0.0"])
    taking = {name.partition(".")[0] for name, own in offers.items() if own}
    assert taking == {"0", "1", "2"}
    assert sum(offer.loss for own in offers.values() for offer in own) == pytest.approx(1.0)
    assert [offers[f"{number}.fc1"][0].calls for number in range(3)] == [1.0, 0.0, 1.0]


def test_calls_of_many_tokens_and_bad_forms_are_errors() -> None:
    with pytest.raises(ValueError, match="of one token"):
        sparsecomp.plan(_model(), _batches(), speedup=1.5, skips=["input:0.5"], criterion="magnitude")
    with pytest.raises(ValueError, match=r"skips holds 0\.4: expected forms"):
        sparsecomp.plan(_model(), _batches(), speedup=1.5, skips=[0.4])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"did you mean 'input'"):
        sparsecomp.plan(_model(), _batches(), speedup=1.5, skips=["inptu:0.4"])


def test_plans_of_another_model_are_errors(plan: sparsecomp.Plan) -> None:
    with pytest.raises(ValueError, match="is to skip"):
        calibrate_skips(nn.Sequential(nn.Linear(4, 4)), [torch.randn(2, 4)], plan)
