"""Sums over what goes into a site."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparsecomp.pruning.calibration import Call
from sparsecomp.pruning.sites import choose_sites
from sparsecomp.pruning.statistics import Statistics, balanced, collect, stages


class Attention(nn.Module):
    """Two sites of one input, one behind them, and one that is called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(6, 6)
        self.key = nn.Linear(6, 6)
        self.out = nn.Linear(6, 5)
        self.last = nn.Linear(5, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(input=self.out(self.query(x) * self.key(x)))


def used(module: nn.Module, name: str) -> bool:
    return name != "unused"


@pytest.mark.parametrize("gram", [False, True])
def test_sums_are_those_of_all_rows(gram: bool) -> None:
    model = Attention()
    batches = [torch.randn(4, 7, 6), torch.randn(3, 6)]
    rows = balanced(torch.cat([batch.reshape(-1, 6) for batch in batches]).double())
    sites = choose_sites(model, used)
    with torch.no_grad():
        known = collect(model, [Call((batch,), {}) for batch in batches], sites, gram=gram)
    for site in sites[:2]:
        statistics = known[id(site.weight)]
        assert statistics.rows == len(rows) == 31
        torch.testing.assert_close(statistics.sums, rows.sum(0), atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(statistics.norms, rows.norm(dim=0), atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(statistics.means, rows.mean(0), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(statistics.variances, rows.var(0, correction=0), atol=1e-4, rtol=1e-4)
        if gram:
            torch.testing.assert_close(statistics.gram.double(), rows.T @ rows, atol=1e-3, rtol=1e-4)
        else:
            assert statistics.gram is None
    # Sites of the same input do not share what later changes.
    assert known[id(sites[0].weight)].sums is not known[id(sites[1].weight)].sums
    assert known[id(model.last.weight)].rows == 31


def test_a_shared_weight_adds_up_all_its_inputs() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    x = torch.randn(5, 4)
    with torch.no_grad():
        known = collect(model, [Call((x,), {})], choose_sites(model, None), gram=False)
        hidden = model[1](model[0](x))
    assert list(known) == [id(model[0].weight)]
    assert known[id(model[0].weight)].rows == 10
    torch.testing.assert_close(known[id(model[0].weight)].sums, (balanced(x).sum(0) + balanced(hidden).sum(0)).double())


def test_rows_weigh_as_much_as_they_are_long() -> None:
    rows = balanced(torch.tensor([[4.0, 4.0], [400.0, -400.0], [0.0, 0.0]]))
    torch.testing.assert_close(rows, torch.tensor([[2.0, 2.0], [20.0, -20.0], [0.0, 0.0]]))
    assert rows.square().sum(1).tolist() == [8.0, 800.0, 0.0]


@pytest.mark.parametrize("value", [1e30, 1e-30])
def test_squares_of_balanced_rows_stay_in_range(value: float) -> None:
    rows = balanced(torch.full((2, 4), value))
    torch.testing.assert_close(rows.square(), torch.full((2, 4), value), rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_tails_are_of_rows_of_one_length(scale: float) -> None:
    rows = torch.randn(50, 6) * torch.logspace(-3, 3, 50).unsqueeze(1)
    found = Statistics.of(balanced(scale * rows), gram=False)
    unit = rows / rows.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(
        found.tail_norms, torch.linalg.vector_norm(unit.double(), 9 / 4, dim=0), rtol=1e-5, atol=0
    )
    known = found.copy()
    known.add(found)
    torch.testing.assert_close(known.tail_norms, 2 ** (4 / 9) * found.tail_norms)


def test_without_tails_their_norms_are_the_euclidean_ones() -> None:
    found = Statistics.of(torch.randn(5, 3), gram=True)
    assert torch.equal(found.tail_norms, found.norms)


def test_sixteen_bit_inputs_are_summed_in_float32() -> None:
    model = nn.Linear(1, 1).half()
    with torch.no_grad():
        known = collect(model, [Call((torch.full((70_000, 1), 1.0).half(),), {})], choose_sites(model, None), gram=True)
    statistics = known[id(model.weight)]
    assert float(statistics.sums) == float(statistics.squares) == float(statistics.gram) == 70_000


def test_sites_of_one_input_are_one_stage() -> None:
    model = Attention()
    groups, once = stages(model, Call((torch.randn(2, 6),), {}), choose_sites(model, used))
    assert [[site.name for site in group] for group in groups] == [["query", "key"], ["out"], ["last"]]
    assert once
    groups, once = stages(model, Call((torch.randn(2, 6),), {}), choose_sites(model, None))
    assert [site.name for site in groups[-1]] == ["unused"]
    assert not once


def test_a_site_that_runs_twice_is_known() -> None:
    linear = nn.Linear(3, 3)
    model = nn.Sequential(linear, linear)
    sites = choose_sites(model, None)[:1]
    groups, once = stages(model, Call((torch.randn(2, 3),), {}), sites)
    assert ([len(group) for group in groups], once) == ([1], False)


def test_what_follows_the_last_site_need_not_run() -> None:
    model = Attention()
    ran = []
    model.last.register_forward_hook(lambda *_: ran.append(1))
    calls = [Call((torch.randn(2, 6),), {})] * 3
    first = choose_sites(model, lambda module, name: name in ("query", "key"))
    with torch.no_grad():
        known = collect(model, calls, first, gram=False, once=True)
    assert not ran
    assert {statistics.rows for statistics in known.values()} == {6}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_the_module(value: float) -> None:
    model = Attention()
    with torch.no_grad():
        model.query.weight[0, 0] = value
        with pytest.raises(ValueError, match="module 'out' has NaN or infinity"):
            collect(model, [Call((torch.randn(2, 6),), {})], choose_sites(model, used), gram=True)


def test_a_site_that_is_never_called_is_an_error() -> None:
    model = Attention()
    with torch.no_grad(), pytest.raises(ValueError, match=r"module 'unused' \(Linear\) was not called"):
        collect(model, [Call((torch.randn(2, 6),), {})], choose_sites(model, None), gram=False)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
