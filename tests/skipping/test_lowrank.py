"""R-Sparse is chosen where a few directions carry what is dropped, and not elsewhere."""

from __future__ import annotations

import torch
from torch import nn

from sparsecomp.skipping import SkipPlan, emulate
from sparsecomp.skipping.lowrank import with_low_rank
from sparsecomp.skipping.scores import input_scores
from sparsecomp.skipping.sites import InputGroup


def _site(low_rank: bool):
    torch.manual_seed(0)
    linears = (nn.Linear(64, 96, bias=False), nn.Linear(64, 64, bias=False))
    sample = torch.randn(512, 64)
    if low_rank:
        # Three inputs are large, and the others follow two directions.
        sample = 0.3 * torch.randn(512, 2) @ torch.randn(2, 64)
        sample[:, :3] += 5 * torch.randn(512, 3)
    return linears, sample, input_scores(InputGroup(("0", "1"), linears), sample, 0.5)


def test_it_is_chosen_where_the_dropped_inputs_have_few_directions() -> None:
    linears, sample, site = _site(low_rank=True)
    choices = with_low_rank(site, 0.5)
    assert [choice.form.kind for choice in choices] == ["rsparse", "rsparse"]
    a, b = choices[0].low_rank
    assert a.shape[0] == 96
    assert choices[1].low_rank[1].equal(b)
    # As many bytes as without: what the factors take is skipped more.
    assert choices[0].expected > 0.5
    model = nn.ModuleList(linears)
    want = linears[0](sample).detach()
    errors = []
    for plan in (SkipPlan.of(choices), SkipPlan.of(site.choices(0.5))):
        with emulate(model, plan):
            errors.append(float((linears[0](sample) - want).square().sum()))
    assert errors[0] < 0.5 * errors[1]


def test_it_is_not_chosen_for_inputs_without_structure() -> None:
    _, _, site = _site(low_rank=False)
    assert [choice.form.kind for choice in with_low_rank(site, 0.3)] == ["input", "input"]
