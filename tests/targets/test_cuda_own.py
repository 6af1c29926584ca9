"""Our CUDA kernels as candidates: what fits a multiprocessor, prices, packing, and products under the emulator."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from cuda_tools import CardOnCpu, kernels_on_cpu, need_nvrtc
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import sparsecomp
from sparsecomp import backend
from sparsecomp.cuda.library import KERNELS, TILE
from sparsecomp.cuda.nvrtc import ARCHITECTURES, compile_kernel, resources
from sparsecomp.patterns import Pattern
from sparsecomp.targets import get_target
from sparsecomp.targets.base import DENSE, Candidate, Problem, WeightFacts
from sparsecomp.targets.cuda import kernels, own
from sparsecomp.targets.cuda.cards import card, card_names
from sparsecomp.targets.cuda.kernels import CompiledKernel
from sparsecomp.targets.cuda.target import CudaTarget

HALF = torch.float16
PATTERNS = ("2:4", "32:2:8", "32:2:4:16", "16x16@0.8", "64x64@0.9", "unstructured@0.9")


def sparse(pattern: str, outputs: int, inputs: int, dtype: torch.dtype = HALF) -> Tensor:
    layer = nn.Linear(inputs, outputs, bias=False)
    sparsecomp.sparsify_(layer, pattern)
    weight = layer.weight.detach()
    return (weight * (127 / weight.abs().max())).to(dtype) if dtype == torch.int8 else weight.to(dtype)


def values(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=dtype) if dtype == torch.int8 else torch.randn(*shape).to(dtype)


@pytest.mark.parametrize(
    ("name", "registers", "shared", "threads", "blocks"),
    [
        ("h100", 64, 13312, 128, 8),  # 2048 registers a warp, 8 of them on a quarter
        ("h100", 65, 13312, 128, 7 * 4 // 4),  # 2304 a warp
        ("a100", 255, 0, 128, 2),
        ("h100", 255, 0, 1024, 0),
        ("rtx-3060", 16, 0, 32, 16),  # blocks, before its 48 warps
        ("rtx-4090", 16, 0, 32, 24),
        ("rtx-3060", 40, 34816, 128, 2),  # 35 KiB each of 100
        ("a100", 40, 34816, 128, 4),
        ("l4", 32, 0, 256, 6),  # 48 warps
    ],
)
def test_blocks_that_a_multiprocessor_holds(name: str, registers: int, shared: int, threads: int, blocks: int) -> None:
    assert own.resident_blocks(card(name), registers, shared, threads) == blocks


def test_what_the_compiler_made_is_known_of_every_kernel() -> None:
    found = own._compiled()
    assert set(found) == set(ARCHITECTURES)
    for taken in found.values():
        assert {kernel.name for kernel in KERNELS} <= set(taken)


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["panel_sparse_v64_f16", "rows_token_t4_bf16"])
def test_what_is_known_is_what_the_compiler_says(name: str) -> None:
    here = need_nvrtc()
    kernel = next(kernel for kernel in KERNELS if kernel.name == name)
    taken = resources(compile_kernel(kernel.source, "sm_90", kernel.defines)[2], kernel.entry)
    registers, shared = own._compiled()["sm_90"][name]
    assert taken.shared == shared
    if not own.compiler().endswith(f" {here}"):
        pytest.skip(f"kernels.json is of {own.compiler()}; registers may differ")
    assert taken.registers == registers


@given(
    st.sampled_from(card_names()),
    st.sampled_from(PATTERNS),
    *(st.integers(1, 40), st.integers(1, 40), st.integers(1, 600)),
)
def test_no_estimate_is_below_the_arithmetic_and_the_bytes(
    name: str, pattern: str, outputs: int, inputs: int, tokens: int
) -> None:
    facts = WeightFacts.assumed(64 * outputs, 64 * inputs, Pattern.parse(pattern))
    found, target = card(name), get_target(f"cuda:{name}")
    for candidate in own.offers(facts):
        us, more = (target.predict(candidate, Problem(facts, t, 1, dtype=HALF)) for t in (tokens, tokens + 1))
        assert us <= more
        rate = found.rate(HALF, sparse=candidate.kernel == "panel_sparse")
        assert us > 2 * facts.nonzeros * tokens / (1e6 * rate)
        if (size := own.packed_bytes(candidate, facts, 2)) > found.l2:
            assert us > size / (1e3 * found.bandwidth)


def test_a_wave_more_shows() -> None:
    facts = WeightFacts.assumed(64 * 132, 8192, Pattern.parse("64x64@0.8"))
    candidate = Candidate("block", "64x64", (("v", 64),))
    turns = [get_target("cuda:h100").predict(candidate, Problem(facts, TILE * n, 1, dtype=HALF)) for n in (7, 8)]
    over = get_target("cuda:h100").predict(candidate, Problem(facts, TILE * 7 + 1, 1, dtype=HALF))
    assert turns[0] < over <= turns[1]
    assert turns[1] - over < 0.2 * (over - turns[0])


def test_where_no_kernel_is_there_is_no_price() -> None:
    facts = WeightFacts.assumed(1024, 1024, Pattern.parse("2:4"))

    def price(name: str, candidate: Candidate, tokens: int = 1, dtype: torch.dtype = HALF) -> float:
        return get_target(name).predict(candidate, Problem(facts, tokens, 1, dtype=dtype))

    few = Candidate("two_four", "2:4", (("tokens", 4),))
    assert price("cuda:h100", few, 4) < math.inf
    assert price("cuda:h100", few, 5) == math.inf
    newer = CudaTarget(replace(card("h100"), arch="sm_120"))  # nothing is compiled for it
    assert newer.predict(few, Problem(facts, 1, 1, dtype=HALF)) == math.inf
    assert price("cuda:h100", Candidate("other", "2:4")) == math.inf


@pytest.mark.parametrize("name", card_names())
def test_every_card_has_prices_of_our_kernels(name: str) -> None:
    facts = WeightFacts.assumed(4096, 4096, Pattern.parse("64x64@0.9"))
    best = {
        c.kernel: get_target(f"cuda:{name}").predict(c, Problem(facts, 1024, 1, dtype=HALF)) for c in own.offers(facts)
    }
    assert best["block"] < get_target(f"cuda:{name}").predict(DENSE, Problem(facts, 1024, 1, dtype=HALF))


def test_a_card_is_offered_our_kernels_by_their_prices() -> None:
    with torch.device("meta"):
        model, x = nn.Linear(8192, 8192).half(), torch.empty(4096, 8192, dtype=HALF)
    (many,) = sparsecomp.explain(model, x, target="cuda:h100", assume="64x64@0.9")
    assert many.chosen.kernel == "block"
    (panels,) = sparsecomp.explain(model, x[:64], target="cuda:h100", assume="64:2:4:16")
    assert str(panels.chosen) == "panel_sparse[64:2:4:16]"
    (one,) = sparsecomp.explain(model, x[:1], target="cuda:h100", assume="unstructured@0.95")
    assert one.chosen.kernel == "rows_token"
    (worse,) = sparsecomp.explain(model, x, target="cuda:h100", assume="unstructured@0.5")
    assert worse.chosen.is_dense


@pytest.mark.parametrize("dtype", [HALF, torch.int8])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_packed_bytes_are_those_of_the_packed_weight(pattern: str, dtype: torch.dtype) -> None:
    weight = sparse(pattern, 128, 512, dtype)
    facts, seen = WeightFacts.of(weight), set()
    for candidate in own.offers(facts):
        kernel = own.kernel_of(candidate, dtype)
        assert kernel is not None
        nbytes = sum(value.numel() * value.element_size() for value in kernel.pack(weight).values())
        # The last step of a panel is filled up, and panels are taken to keep equally many columns.
        assert own.packed_bytes(candidate, facts, dtype.itemsize) == pytest.approx(nbytes, rel=0.2)
        seen.add(candidate.kernel)
    assert {"panel", "rows", "rows_token"} <= seen


@pytest.mark.parametrize("dtype", [torch.float32, HALF, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(
    ("pattern", "shape", "family"),
    [
        ("2:4", (48, 64), "two_four"),
        ("16:2:8", (40, 72), "panel_v16"),
        ("32:2:8", (48, 64), "panel_v32"),
        ("64:2:8", (80, 96), "panel_v64"),
        ("32:2:4:16", (48, 64), "panel_sparse_v32"),
        ("64:2:4:8", (80, 96), "panel_sparse_v64"),
        ("16x16@0.5", (48, 64), "block_v16"),
        ("32x32@0.5", (96, 128), "block_v32"),
        ("64x64@0.5", (128, 192), "block_v64"),
        ("unstructured@0.9", (48, 64), "rows"),
    ],
)
def test_products_of_every_candidate_agree_under_the_emulator(
    pattern: str, shape: tuple[int, int], family: str, dtype: torch.dtype
) -> None:
    weight, target, names = sparse(pattern, *shape, dtype), CardOnCpu(), set()
    tolerance = {torch.float32: 1e-5, HALF: 2e-3, torch.bfloat16: 1.6e-2, torch.int8: 0}[dtype]
    results = torch.int32 if dtype == torch.int8 else dtype
    with kernels_on_cpu():
        for candidate in own.offers(WeightFacts.of(weight)):
            kernel = own.kernel_of(candidate, dtype)
            if kernel is None:
                continue
            names.add(kernel.name)
            x = values(kernel.tokens or 11, shape[1], dtype=dtype)
            bias = values(shape[0], dtype=dtype).to(results)
            packed = target.prepare(candidate, weight)
            assert kernel.entry in packed.source
            for given in (bias, None):
                y = packed.product(x, given)
                assert y.is_contiguous()
                assert y.dtype == results
                expected = functional.linear(x.to(results), weight.to(results), given)
                torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    expected_names = {kernel.name for kernel in KERNELS if kernel.name.startswith(family) and kernel.dtype == dtype}
    assert expected_names <= names


@pytest.mark.parametrize(
    "name", ["panel_v16_f16", "block_v64_f16", "panel_sparse_v32_f16", "rows_f16", "rows_token_t1_f16"]
)
def test_a_weight_of_zeros_leaves_the_bias(name: str) -> None:
    kernel, bias = next(kernel for kernel in KERNELS if kernel.name == name), torch.randn(5).half()
    with kernels_on_cpu():
        y = CompiledKernel(kernel, torch.zeros(5, 19, dtype=HALF), "sm_90").product(torch.ones(1, 19).half(), bias)
    assert torch.equal(y, bias[None])


@pytest.mark.parametrize(
    ("pattern", "candidate", "tokens"),
    [
        ("32:2:8", Candidate("panel", "32:2:8", (("v", 32),)), 9),
        ("2:4", Candidate("panel_sparse", "2:4", (("v", 16),)), 12),
        ("32:2:4:8", Candidate("panel_sparse", "32:2:4:8", (("v", 32),)), 12),
        ("unstructured@0.9", Candidate("rows_token", "unstructured", (("tokens", 1),)), 1),
    ],
    ids=lambda value: str(value) if isinstance(value, Candidate) else None,
)
def test_a_compiled_model_takes_our_kernels(pattern: str, candidate: Candidate, tokens: int) -> None:
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)).half().requires_grad_(False)
    sparsecomp.sparsify_(model, pattern)
    x, target = torch.randn(tokens, 64).half(), CardOnCpu()
    plan = sparsecomp.Plan(target.name, threads=1)
    report = sparsecomp.explain(model, x, options={"target": target})
    plan.add(replace(choice, chosen=candidate) for choice in report)
    with torch.no_grad(), kernels_on_cpu():
        compiled = torch.compile(model, backend="sparse", options={"target": target, "plan": plan, "verify": True})
        given = compiled(x)
        assert backend.compilations()[-1].rewritten == ["0", "2"]
        torch.testing.assert_close(given, model(x), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("pattern", "candidate"),
    [
        ("32:2:8", Candidate("panel", "32:2:8", (("v", 32),))),
        ("2:4", Candidate("panel_sparse", "2:4", (("v", 16),))),
    ],
    ids=str,
)
def test_int8_products_of_a_compiled_model_are_exact(pattern: str, candidate: Candidate) -> None:
    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(sparse(pattern, 96, 128, torch.int8), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch._int_mm(x, self.weight.t()).float() * 0.5

    model, x, target = Quantised(), values(37, 128, dtype=torch.int8), CardOnCpu()
    plan = sparsecomp.Plan(target.name, threads=1)
    plan.add(replace(choice, chosen=candidate) for choice in sparsecomp.explain(model, x, options={"target": target}))
    with torch.no_grad(), kernels_on_cpu():
        compiled = torch.compile(model, backend="sparse", options={"target": target, "plan": plan, "verify": True})
        given = compiled(x)
        assert backend.compilations()[-1].rewritten
        assert torch.equal(given, model(x))


@pytest.mark.parametrize(("name", "tokens"), [("panel_v16_f16", 13), ("rows_token_t4_f16", 3)])
def test_products_keep_shape_type_and_device_of_the_op_that_graphs_see(
    name: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = []
    monkeypatch.setattr(kernels, "function_of", lambda kernel, arch: lambda *call: launched.append(call))
    kernel = next(kernel for kernel in KERNELS if kernel.name == name)
    packed = CompiledKernel(kernel, sparse("unstructured@0.5", 48, 64), "sm_90")
    x = torch.empty(tokens, 64, dtype=HALF, device="meta")
    y = packed.product(x, None)
    op = torch.ops.sparsecomp.linear(x, None, None, 0, 48, "none")
    assert y.shape == op.shape == (tokens, 48)
    assert y.dtype == op.dtype == HALF
    assert y.device == op.device == x.device
    assert y.is_contiguous()
    ((launch, _, device),) = launched
    assert launch == kernel.launch(48, 64, tokens)
    assert device == x.device


def test_sparse_panels_take_what_is_venoms_and_may_be_used() -> None:
    facts = WeightFacts.of(sparse("64:2:4:8", 128, 256))
    labels = {c.pattern for c in own.offers(facts) if c.kernel == "panel_sparse"}
    assert labels == {"64:2:4:8"}
    for allowed, label in ((["16:2:4:8"], "16:2:4:8"), (["2:4", "64:2:4:16"], "2:4"), (["64:2:8"], None)):
        found = {c.pattern for c in own.offers(facts, allowed) if c.kernel == "panel_sparse"}
        assert found == ({label} if label else set())
    few = WeightFacts.of(sparse("8:2:4:8", 128, 256))  # the panels of the kernel have 16 rows
    assert {c.pattern for c in own.offers(few) if c.kernel == "panel_sparse"} == {"2:4"}
    # Without a weight, 2:4 is known to hold only where no four columns lie across two groups.
    for text, inputs, holds in (("64:2:4:8", 256, True), ("64:2:4:8", 254, False), ("64:2:4:10", 260, False)):
        assert own.takes_two_four(WeightFacts.assumed(64, inputs, Pattern.parse(text)), None) == holds


def test_weights_that_no_kernel_takes_are_refused() -> None:
    target, weight = CardOnCpu(), torch.ones(64, 64, dtype=HALF)
    with pytest.raises(ValueError, match="more than two values in four columns"):
        target.prepare(Candidate("two_four", "2:4", (("tokens", 1),)), weight)
    with pytest.raises(ValueError, match=r"has no kernel panel_sparse\[2:4\] for torch.float32"):
        target.prepare(Candidate("panel_sparse", "2:4", (("v", 16),)), weight.float())
