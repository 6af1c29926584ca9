"""An op that skips: which way a call takes, which weights it uses, and what is counted."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from kernel_cases import close, needs_x86
from torch import Tensor
from torch.nn import functional

from sparsecomp.runtime import ffn_site, skip_pays
from sparsecomp.runtime.failures import failures_of
from sparsecomp.runtime.ffn_site import RuntimeSkip, SkipForms
from sparsecomp.runtime.site import RuntimeSite
from sparsecomp.runtime.skip_pays import REST, WINDOW, Times
from sparsecomp.runtime.skip_rates import rest_of, skip_rate_of
from sparsecomp.targets import get_target
from sparsecomp.targets.base import DENSE, WeightFacts
from sparsecomp.targets.skip import FEW_TOKENS, SkipSpec

pytestmark = needs_x86

INPUTS, HIDDEN, OUTPUTS = 24, 40, 20


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def linear(weight: Tensor, transposed: bool = False) -> RuntimeSite:
    def dense(facts: WeightFacts, tokens: int) -> Any:
        return DENSE

    return RuntimeSite("linear", weight, transposed, get_target(None), dense, "none")


class Block:
    """A gated FFN that skips hidden units, and the same in PyTorch."""

    def __init__(self, threshold: float = 0.3, fused: str = "", activation: str = "silu", **forms: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = [(HIDDEN, INPUTS), (HIDDEN, INPUTS), (OUTPUTS, HIDDEN)]
        self.weights = [torch.randn(shape, generator=generator) * 0.3 for shape in shapes]
        self.biases = [torch.randn(shape[0], generator=generator) for shape in shapes]
        self.threshold, self.fused, self.activation = threshold, fused, activation
        spec = SkipSpec(
            "units", (INPUTS, HIDDEN, OUTPUTS), (torch.full((HIDDEN,), threshold),), activation, True, fused
        )
        self.site = RuntimeSkip(
            "mlp", [linear(weight) for weight in self.held()], SkipForms(spec, **forms), get_target(None)
        )

    def held(self) -> list[Tensor]:
        """The weights as the model has them."""
        if not self.fused:
            return self.weights
        if not hasattr(self, "joined"):
            order = self.weights[:2] if self.fused == "gate" else self.weights[1::-1]
            self.joined = torch.cat(order)
        return [self.joined, self.weights[2]]

    def given(self) -> tuple[Tensor | None, ...]:
        """The biases as the op takes them."""
        if not self.fused:
            return tuple(self.biases)
        return torch.cat(self.biases[:2] if self.fused == "gate" else self.biases[1::-1]), None, self.biases[2]

    def expected(self, x: Tensor, *, skip: bool = True) -> Tensor:
        gate, up, down = self.weights
        act: Callable[[Tensor], Tensor] = {"silu": functional.silu, "relu": functional.relu}[self.activation]
        hidden = act(functional.linear(x, gate, self.biases[0]))
        if skip:
            hidden = torch.where(hidden.abs() > self.threshold, hidden, 0.0)
        return functional.linear(hidden * functional.linear(x, up, self.biases[1]), down, self.biases[2])


@pytest.mark.parametrize("fused", ["", "gate", "up"])
@pytest.mark.parametrize("shape", [(1, INPUTS), (2, 3, INPUTS), (FEW_TOKENS, INPUTS)])
def test_few_tokens_skip(shape: tuple[int, ...], fused: str) -> None:
    block, x = Block(fused=fused), torch.randn(shape)
    residual = torch.randn(*shape[:-1], OUTPUTS)
    given = block.site.run(x, block.given(), residual)
    assert given.shape == residual.shape
    close(given, block.expected(x) + residual)


@pytest.mark.parametrize("fused", ["", "gate", "up"])
@pytest.mark.parametrize("shape", [(FEW_TOKENS + 1, INPUTS), (3, 7, INPUTS), (0, INPUTS)])
def test_many_tokens_take_the_dense_way(shape: tuple[int, ...], fused: str) -> None:
    block, x = Block(fused=fused), torch.randn(shape)
    close(block.site.run(x, block.given(), None), block.expected(x, skip=False))


def test_input_that_is_not_contiguous() -> None:
    block, x = Block(), torch.randn(INPUTS, 4).t()
    residual = torch.randn(OUTPUTS, 4).t()
    close(block.site.run(x, block.given(), residual), block.expected(x) + residual)


class TestExactZeros:
    def dead(self, share: float) -> Block:
        """A ReLU block of which a share of the units is never alive."""
        block = Block(0.0, activation="relu", exact=True)
        block.biases[0][: int(share * HIDDEN)] = -1e3
        return block

    @pytest.mark.parametrize("share", [0.9, 0.1])
    @pytest.mark.parametrize("tokens", [1, 5, 30, 600])
    def test_change_nothing(self, tokens: int, share: float) -> None:
        block, x = self.dead(share), torch.randn(tokens, INPUTS)
        residual = torch.randn(tokens, OUTPUTS)
        for _ in range(2):
            close(block.site.run(x, block.given(), residual), block.expected(x, skip=False) + residual)

    def test_many_tokens_skip_units_that_are_dead_for_a_tile(self, monkeypatch: pytest.MonkeyPatch) -> None:
        block, x = self.dead(0.9), torch.randn(300, INPUTS)
        seen: list[tuple[int, ...]] = []
        mm = torch.mm

        def watched(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
            seen.append(tuple(b.shape))
            return mm(a, b, out=out)

        monkeypatch.setattr(ffn_site.torch, "mm", watched)
        block.site.run(x, block.given(), None)
        assert seen == [(4, OUTPUTS), (4, OUTPUTS)]

    def test_do_not_look_again_for_a_while(self, monkeypatch: pytest.MonkeyPatch) -> None:
        block, x = self.dead(0.0), torch.randn(30, INPUTS)
        looked: list[int] = []
        monkeypatch.setattr(RuntimeSkip, "_by_tiles", lambda self, hidden, bias, residual: looked.append(1))
        for _ in range(ffn_site.PATIENCE + 2):
            block.site.run(x, block.given(), None)
        assert len(looked) == 2

    def test_values_up_to_a_floor_are_zero_too(self) -> None:
        """FATReLU: what is not above its floor is zero, at few tokens and at many."""
        block = Block(0.4, activation="relu", exact=True, floor=0.4)
        for tokens in (2, 20):
            x = torch.randn(tokens, INPUTS)
            close(block.site.run(x, block.given(), None), block.expected(x))


class TestWeights:
    def test_changed_in_place(self) -> None:
        block, x = Block(), torch.randn(1, INPUTS)
        block.site.run(x, block.given(), None)
        for weight in block.weights:
            weight.mul_(1.5)
            block.site.refresh(*block.held())
            close(block.site.run(x, block.given(), None), block.expected(x))

    def test_take_turns(self) -> None:
        block, x = Block(), torch.randn(1, INPUTS)
        sets = [block.weights, [weight * 2 for weight in block.weights]]
        for turn in (0, 1, 0, 1):
            block.weights = sets[turn]
            block.site.refresh(*block.held())
            close(block.site.run(x, block.given(), None), block.expected(x))

    def test_stored_by_input(self) -> None:
        weight, x = torch.randn(INPUTS, OUTPUTS), torch.randn(1, INPUTS)
        spec = SkipSpec("inputs", (INPUTS, OUTPUTS), (torch.full((INPUTS,), 0.5),))
        site = RuntimeSkip("linear", [linear(weight, transposed=True)], SkipForms(spec), get_target(None))
        close(site.run(x, (None, None, None), None), torch.where(x.abs() > 0.5, x, 0.0) @ weight)
        assert site.nbytes == 0  # a row for each input is what the model holds

    def test_packed_once_for_two_sites(self) -> None:
        block = Block()
        block.site.prepare(1, False)
        spec = SkipSpec("units", (INPUTS, HIDDEN, OUTPUTS), (torch.zeros(HIDDEN),), "silu", True)
        other = RuntimeSkip("mlp", [linear(weight) for weight in block.weights], SkipForms(spec), get_target(None))
        other.prepare(1, False)
        assert other._rows(other._linears[2], True, None) is block.site._rows(block.site._linears[2], True, None)
        assert block.site.nbytes == 4 * HIDDEN * OUTPUTS


def test_low_rank_makes_up_for_what_is_dropped() -> None:
    weight, x, bias = torch.randn(OUTPUTS, INPUTS), torch.randn(2, INPUTS), torch.randn(OUTPUTS)
    a, b = torch.randn(OUTPUTS, 3), torch.randn(3, INPUTS)
    spec = SkipSpec("inputs", (INPUTS, OUTPUTS), (torch.full((INPUTS,), 0.8),))
    forms = SkipForms(spec, low_rank=(a, b), after="relu")
    site = RuntimeSkip("linear", [linear(weight)], forms, get_target(None))
    kept = torch.where(x.abs() > 0.8, x, 0.0)
    residual = torch.randn(2, OUTPUTS)
    expected = (kept @ weight.T + bias + (x - kept) @ b.T @ a.T).relu() + residual
    close(site.run(x, (bias, None, None), residual), expected)


def test_rates_are_counted_by_weight() -> None:
    block, x = Block(), torch.randn(1, INPUTS)
    assert skip_rate_of(block.weights[0]) is None
    block.site.run(x, block.given(), None)
    hidden = functional.silu(functional.linear(x, block.weights[0], block.biases[0]))
    expected = (hidden.abs() <= block.threshold).float().mean().item()
    for weight in block.weights:
        rate = skip_rate_of(weight)
        assert rate is not None
        assert abs(rate - expected) < 1e-6


def test_a_kernel_that_fails_leaves_the_call_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = Block(), torch.randn(1, INPUTS)

    def broken(*arguments: Any) -> None:
        raise RuntimeError("no kernel today")

    monkeypatch.setattr(RuntimeSkip, "_make", broken)
    close(block.site.run(x, block.given(), None), block.expected(x, skip=False))
    assert "no kernel today" in failures_of(block.weights[2])


class TestTooLittleSkipped:
    @pytest.fixture(autouse=True)
    def _times(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # Skipping pays here where at most half of the rows are read.
        monkeypatch.setattr(skip_pays, "_known", {})
        monkeypatch.setattr(skip_pays, "_measure", lambda ways: Times(10 / skip_pays.MARGIN, 0, 20))

    def test_units_take_the_dense_way_for_a_while(self) -> None:
        block, x = Block(1e-6), torch.randn(1, INPUTS)
        for _ in range(WINDOW):
            close(block.site.run(x, block.given(), None), block.expected(x))
        block.site._kernel = lambda: pytest.fail("it was asked for a kernel")  # type: ignore[method-assign]
        for _ in range(REST):
            block.site.run(x, block.given(), None)
        assert all(rest_of(weight) == pytest.approx(1.0) for weight in block.weights)

    def test_then_they_skip_again_if_that_pays_now(self) -> None:
        block, busy = Block(1e-6), torch.randn(1, INPUTS)
        for _ in range(WINDOW + REST):
            block.site.run(busy, block.given(), None)
        block.biases[0].fill_(-1e9)  # no unit stays
        for _ in range(WINDOW):
            close(block.site.run(busy, block.given(), None), block.expected(busy))
        assert rest_of(block.weights[0]) is None
        assert block.site._here.rest == 0

    def test_inputs_take_the_dense_way(self) -> None:
        weight, x = torch.randn(OUTPUTS, INPUTS), torch.randn(1, INPUTS)
        spec = SkipSpec("inputs", (INPUTS, OUTPUTS), (torch.full((INPUTS,), 0.1),))
        site = RuntimeSkip("linear", [linear(weight)], SkipForms(spec), get_target(None))
        kept = torch.where(x.abs() > 0.1, x, 0.0) @ weight.T
        for _ in range(WINDOW):
            close(site.run(x, (None, None, None), None), kept)
        close(site.run(x, (None, None, None), None), x @ weight.T)
        assert (rest_of(weight) or 0) == pytest.approx((x.abs() > 0.1).float().mean().item(), abs=1e-6)

    def test_enough_skipped_goes_on_skipping(self) -> None:
        block, x = Block(0.5), torch.randn(1, INPUTS)
        for _ in range(3 * WINDOW):
            close(block.site.run(x, block.given(), None), block.expected(x))
        assert rest_of(block.weights[0]) is None

    def test_what_is_measured_is_a_call_of_each_way(self, monkeypatch: pytest.MonkeyPatch) -> None:
        block, x = Block(), torch.randn(1, INPUTS)
        outputs: list[Any] = []
        monkeypatch.setattr(
            skip_pays, "_measure", lambda ways: (outputs.extend(way() for way in ways), Times(1, 1, 1))[1]
        )
        for _ in range(WINDOW):
            block.site.run(x, block.given(), None)
        dense, none, every = outputs
        close(dense, block.expected(x, skip=False))
        close(none, block.biases[2][None])
        close(every, block.expected(x, skip=False))


class TestOps:
    def test_schema_and_fake_tensors_hold(self) -> None:
        block = Block()
        arguments = (torch.randn(2, INPUTS), list(block.given()), None, block.site.handle, OUTPUTS)
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(torch.ops.sparsecomp.skip.default, arguments, test_utils=tests)
        spec = SkipSpec("inputs", (INPUTS, OUTPUTS), (torch.zeros(INPUTS),))
        site = RuntimeSkip("linear", [linear(torch.randn(OUTPUTS, INPUTS))], SkipForms(spec), get_target(None))
        arguments = (torch.randn(2, 3, INPUTS), [None] * 3, torch.randn(2, 3, OUTPUTS), site.handle, OUTPUTS)
        torch.library.opcheck(torch.ops.sparsecomp.skip.default, arguments, test_utils=tests)

    def test_a_released_site_is_explained(self) -> None:
        block = Block()
        handle = block.site.handle
        del block
        gc.collect()
        with pytest.raises(RuntimeError, match=rf"site {handle}, which was released: compile the model again"):
            torch.ops.sparsecomp.skip(torch.randn(1, INPUTS), [None] * 3, None, handle, OUTPUTS)
