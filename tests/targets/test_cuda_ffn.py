"""The FFN's threshold form on cards: its price, its kernels, and models compiled with it, under the emulator."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace

import models
import pytest
import torch
from cuda_tools import CardOnCpu, kernels_on_cpu
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import sparsecomp
from sparsecomp import backend
from sparsecomp.patterns import Pattern
from sparsecomp.runtime.skip_rates import skip_rate_of
from sparsecomp.skipping import SkipChoice, SkipForm, SkipPlan, calibrate_skips, emulate
from sparsecomp.targets import get_target
from sparsecomp.targets.base import WeightFacts
from sparsecomp.targets.cuda import ffn
from sparsecomp.targets.cuda.cards import card, card_names
from sparsecomp.targets.cuda.ffn import CudaRows, FfnThreshold
from sparsecomp.targets.cuda.target import CudaTarget
from sparsecomp.targets.skip import SkipRows, SkipSpec

HALF = torch.float16
TOLERANCE = {torch.float32: 1e-5, HALF: 4e-3, torch.bfloat16: 3e-2}
SIZES = (70, 150, 45)


class Mlp(nn.Module):
    """A gated block as language models have it, `x + down(silu(gate(x)) * up(x))`."""

    def __init__(self, width: int = 64, hidden: int = 136) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, hidden), nn.Linear(width, hidden, bias=False)
        self.down_proj, self.act_fn = nn.Linear(hidden, width), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Model(nn.Module):
    def __init__(self, **sizes: int) -> None:
        super().__init__()
        self.mlp = Mlp(**sizes)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., width]` to the same."""
        y: Tensor = self.mlp(x)
        return y


class FreeSkips(CardOnCpu):
    """A card where skipping always wins, so that small blocks take it; it remembers the kernels that it made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: weakref.WeakSet[FfnThreshold] = weakref.WeakSet()

    def prepare_skip(self, spec: SkipSpec, rows: Sequence[SkipRows]) -> FfnThreshold:
        kernel = super().prepare_skip(spec, rows)
        self.made.add(kernel)
        return kernel

    def predict_skip(
        self,
        facts: WeightFacts,
        kept: float,
        tokens: int,
        threads: int,
        dtype: torch.dtype = torch.float32,
        by_input: bool = True,
    ) -> float:
        us = super().predict_skip(facts, kept, tokens, threads, dtype, by_input)
        return us and us * 1e-3


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def skips(threshold: float | Tensor = 0.1, form: str = "threshold:0.5", site: str = "mlp") -> SkipPlan:
    return SkipPlan.of([SkipChoice(site, SkipForm.parse(form), threshold)])


def facts(outputs: int, inputs: int) -> WeightFacts:
    return WeightFacts.assumed(outputs, inputs, Pattern("dense"))


@given(st.sampled_from(card_names()), st.integers(1, 300), st.integers(1, 100), st.booleans(), st.floats(0, 1))
def test_no_estimate_is_below_what_is_read_and_less_is_never_dearer(
    name: str, outputs: int, inputs: int, by_input: bool, kept: float
) -> None:
    target, own = get_target(f"cuda:{name}"), facts(64 * outputs, 64 * inputs)
    us, full = (target.predict_skip(own, share, 1, 1, HALF, by_input) for share in (kept, 1.0))
    assert 0 < us <= full < math.inf
    nbytes = 2 * own.out_features * own.in_features * kept
    if nbytes > card(name).l2:
        assert us > nbytes / (1e3 * card(name).bandwidth)


def test_what_no_kernel_takes_has_no_price() -> None:
    target = get_target("cuda:h100")
    assert target.predict_skip(facts(512, 512), 0.5, 1, 1, torch.bfloat16, True) < math.inf
    assert target.predict_skip(facts(512, 512), 0.5, 2, 1, HALF, True) == math.inf
    assert target.predict_skip(facts(512, 512), 0.5, 1, 1, torch.int8, False) == math.inf
    assert target.predict_skip(facts(512, 1 << 20), 0.5, 1, 1, HALF, False) == math.inf  # x in shared memory
    newer = CudaTarget(replace(card("h100"), arch="sm_120"))
    assert newer.predict_skip(facts(512, 512), 0.5, 1, 1, HALF, True) == math.inf


def test_a_measured_factor_scales_the_price() -> None:
    plain, twice = CudaTarget(card("h100")), CudaTarget(card("h100"), {"ffn_threshold": 2.0})
    one, two = (target.predict_skip(facts(512, 512), 0.5, 1, 1, HALF, True) for target in (plain, twice))
    assert two == 2 * one


def definition(weights: list[Tensor], biases: list[Tensor | None], spec: SkipSpec, x: Tensor) -> tuple[Tensor, int]:
    """What the kernels compute, in float64, and the units that stay."""
    gate, *up, down = (weight.double() for weight in weights)
    first, second, last = (None if bias is None else bias.double() for bias in biases)
    value = functional.linear(x.double(), gate, first)
    value = functional.silu(value) if spec.activation == "silu" else functional.relu(value)
    stays = value.abs() > spec.thresholds[0]
    value = torch.where(stays, value, 0.0)
    if up:
        value = value * functional.linear(x.double(), up[0], second)
    return functional.linear(value, down, last), int(stays.sum())


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("activation", "fused"), [("silu", ""), ("silu", "gate"), ("silu", "up"), ("relu", None)])
def test_the_kernels_agree_with_the_definition(dtype: torch.dtype, activation: str, fused: str | None) -> None:
    inputs, hidden, outputs = SIZES
    gated = fused is not None
    generator = torch.Generator().manual_seed(1)
    shapes = [(hidden, inputs), *([(hidden, inputs)] if gated else []), (outputs, hidden)]
    weights = [(torch.randn(shape, generator=generator) / 4).to(dtype) for shape in shapes]
    biases = [torch.randn(size, generator=generator).to(dtype) for size in (hidden, hidden, outputs)]
    thresholds = torch.rand(hidden, generator=generator)
    spec = SkipSpec("units", SIZES, (thresholds,), activation, gated, fused or "")
    given: list[Tensor | None] = [biases[0], biases[1] if gated else None, biases[2]]
    x = torch.randn(1, inputs, generator=generator).to(dtype)
    expected, kept = definition(weights, given, spec, x)
    if fused:
        given = [torch.cat(biases[:2] if fused == "gate" else biases[1::-1]), None, biases[2]]
    with kernels_on_cpu():
        kernel = FfnThreshold(spec, [CudaRows(w) for w in (*weights[:-1], weights[-1].t())], "sm_90")
        assert kernel.counted() == (0, 0)
        y = kernel.run(x, given)
    assert y.dtype == dtype
    assert y.is_contiguous()
    torch.testing.assert_close(y.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert 0 < kept < hidden
    assert kernel.counted() == (kept, hidden)


def test_weights_that_lie_as_the_kernels_want_them_are_not_copied() -> None:
    spec = SkipSpec("units", (128, 40, 24), (torch.zeros(40),), "silu", True)
    gate, up, down = torch.randn(40, 128), torch.randn(40, 128), torch.randn(40, 24)
    with kernels_on_cpu():
        rows = [CudaRows(value) for value in (gate, up, down)]
        assert FfnThreshold(spec, rows, "sm_90").nbytes == sum(row.nbytes for row in rows) == 0
        wide = [CudaRows(value) for value in (gate[:, :100], up[:, :100].contiguous(), down.t().contiguous().t())]
        assert [row.nbytes for row in wide] == [4 * 40 * 100, 0, 4 * 40 * 24]
        assert FfnThreshold(replace(spec, sizes=(100, 40, 24)), wide, "sm_90").nbytes == 2 * 4 * 40 * 128
        # Four values are read at once: a weight that is not aligned for that is copied.
        odd = CudaRows(torch.randn(40 * 128 + 1)[1:].view(40, 128))
        assert FfnThreshold(spec, [odd, *rows[1:]], "sm_90").nbytes == 4 * 40 * 128


def test_the_op_that_graphs_see_has_the_shape_type_and_device_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[tuple[object, ...]] = []
    monkeypatch.setattr(ffn, "functions_of", lambda *_: 2 * (lambda *call: launched.append(call),))
    inputs, hidden, outputs = SIZES
    spec = SkipSpec("units", SIZES, (torch.zeros(hidden, device="meta"),), "relu")
    rows = [CudaRows(torch.empty(hidden, size, dtype=HALF, device="meta")) for size in (inputs, outputs)]
    x = torch.empty(1, inputs, dtype=HALF, device="meta")
    y = FfnThreshold(spec, rows, "sm_90").run(x, [None, None, None])
    op = torch.ops.sparsecomp.skip(x, [None, None, None], None, 0, outputs)
    assert (y.shape, y.dtype, y.device) == (op.shape, op.dtype, op.device) == ((1, outputs), HALF, x.device)
    assert [call[2] for call in launched] == [x.device] * 2


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_a_compiled_model_does_what_its_emulation_does(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Model().to(dtype), torch.randn(1, 1, 64).to(dtype)
    plan = skips(torch.linspace(0.0, 0.3, 136))
    with emulate(model.float(), plan) as rates:
        expected = model(x.float())
    model.to(dtype)
    with kernels_on_cpu():
        options = {"target": FreeSkips(), "skip": plan, "verify": True}
        compiled = torch.compile(model, backend="sparse", fullgraph=True, options=options)
        torch.testing.assert_close(compiled(x).float(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        done = backend.compilations()[-1]
        assert (done.rewritten, done.reasons) == (["mlp"], [])
        # Weights may change in place.
        model.mlp.down_proj.weight.mul_(2)
        with emulate(model.float(), plan):
            expected = model(x.float())
        model.to(dtype)
        torch.testing.assert_close(compiled(x).float(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        report = sparsecomp.explain(compiled, x)
    chosen = {site.name: str(site.chosen) for site in report}
    assert set(chosen.values()) == {"skip_threshold[dense]"}
    assert f"{rates.rate('mlp'):.0%} skipped so far" in report.plan.sites[0].reason


def test_many_tokens_stay_dense_with_the_reason() -> None:
    model, x = Model().half(), torch.randn(2, 64).half()
    with kernels_on_cpu():
        compiled = torch.compile(model, backend="sparse", options={"target": FreeSkips(), "skip": skips()})
        torch.testing.assert_close(compiled(x), model(x), rtol=4e-3, atol=4e-3)
    done = backend.compilations()[-1]
    assert done.rewritten == []
    assert all("2 tokens together keep nearly everything; up to 1 skip" in site.reason for site in done.plan)


def test_exact_zeros_are_skipped_without_a_plan_where_the_price_says_so() -> None:
    model = nn.Sequential(nn.Linear(64, 136), nn.ReLU(), nn.Linear(136, 64)).half()
    x = torch.randn(1, 64).half()
    with kernels_on_cpu():
        for target, rewritten in ((FreeSkips(), ["ffn"]), (CardOnCpu(), [])):
            torch._dynamo.reset()
            compiled = torch.compile(model, backend="sparse", options={"target": target})
            torch.testing.assert_close(compiled(x), model(x), rtol=4e-3, atol=4e-3)
            assert backend.compilations()[-1].rewritten == rewritten


def test_other_forms_are_declined_by_name() -> None:
    plan = SkipPlan.of([SkipChoice("mlp.up_proj", SkipForm.parse("input:0.5"), 0.1)])
    report = sparsecomp.explain(Model().half(), torch.randn(1, 64).half(), options={"skip": plan}, target="cuda:h100")
    reasons = {site.name: site.reason for site in report}
    assert "does not skip input:0.5: target cuda:h100 skips relu and threshold alone" in reasons["mlp.up_proj"]


@pytest.mark.parametrize(
    ("name", "width", "hidden", "wins"),
    [("l4", 4096, 14336, True), ("h100", 4096, 14336, True), ("h100", 576, 1536, False)],
)
def test_the_price_decides_also_for_a_model_that_nobody_has(name: str, width: int, hidden: int, wins: bool) -> None:
    with torch.device("meta"):
        model, x = Model(width=width, hidden=hidden).half(), torch.empty(1, width, dtype=HALF)
    report = sparsecomp.explain(model, x, options={"skip": skips()}, target=f"cuda:{name}")
    for site in report:
        assert site.chosen.kernel == ("skip_threshold" if wins else "dense")
        assert ("does not skip threshold:0.5: predicted " in site.reason) != wins


def test_what_was_counted_keeps_no_kernel_alive() -> None:
    model, x, target = Model().half(), torch.randn(1, 64).half(), FreeSkips()
    with kernels_on_cpu():
        compiled = torch.compile(model, backend="sparse", options={"target": target, "skip": skips()})
        compiled(x)
    assert len(target.made) == 1
    assert 0 < (skip_rate_of(model.mlp.down_proj.weight) or 0) < 1
    del compiled
    torch._dynamo.reset()
    gc.collect()
    assert not target.made


def test_a_plan_for_a_card_chooses_forms_and_takes_their_prices() -> None:
    torch.manual_seed(0)
    model = Model(width=256, hidden=1024)
    batches = [torch.randn(16, 256) ** 3 for _ in range(2)]
    wanted = {"patterns": ["unstructured@0.05"], "criterion": "magnitude", "inputs": torch.randn(1, 256)}
    plan = sparsecomp.plan(
        model, batches, target="cuda:orin", skips=("threshold:0.5", "input:0.5"), max_quality_loss=0.9, **wanted
    )
    offered = {str(option.skip) for site in plan for option in site.options if option.skip is not None}
    assert offered == {"threshold:0.5"}
    assert {name: str(form) for name, form in plan.skips().items()} == {"mlp": "threshold:0.5"}
    found = calibrate_skips(model, batches, plan)
    report = sparsecomp.explain(model, torch.randn(1, 256), options={"skip": found}, target="cuda:orin")
    assert {site.chosen.kernel for site in report} == {"skip_threshold"}
    with pytest.raises(ValueError, match=r"cuda:orin has kernels of relu and threshold"):
        sparsecomp.plan(model, batches, target="cuda:orin", skips=["input:0.5"], max_quality_loss=0.9, **wanted)


@pytest.mark.slow
def test_a_block_of_a_language_model_skips_what_its_thresholds_were_calibrated_to() -> None:
    model, tokenizer = models.smollm2()
    texts = models.windows(tokenizer, models.lee("lee_background"), 48, most=3)
    block, seen = Model(width=8, hidden=8), []
    block.mlp = model.model.layers[10].mlp
    hook = block.mlp.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, 1)))
    model.model.layers = model.model.layers[:11]
    model.model(texts, use_cache=False)
    hook.remove()
    found = calibrate_skips(block, [seen[0][:112]], "threshold:0.5", layerwise=False)
    with kernels_on_cpu():
        half = copy.deepcopy(block).half()
        compiled = torch.compile(half, backend="sparse", options={"target": FreeSkips(), "skip": found})
        for x in seen[0][112::16, None]:
            with emulate(block, found) as rates:
                expected = block(x)
            error = (compiled(x.half()).float() - expected).norm() / expected.norm()
            # A unit at its threshold may fall on the other side in half precision.
            assert error < 0.01
            assert skip_rate_of(half.mlp.down_proj.weight) == pytest.approx(rates.mean(), abs=0.01)
            assert 0.3 < rates.mean() < 0.7
