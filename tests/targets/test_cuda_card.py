"""Kernels and compiled models on a card: numbers that the emulator and fake tensors can only stand in for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cuda_tools import need_nvrtc
from torch import Tensor, nn
from torch.nn import functional

import sparsecomp
from sparsecomp import backend
from sparsecomp.cuda.driver import Function
from sparsecomp.cuda.library import FFN, KERNELS, UNITS, CudaFfn, CudaKernel
from sparsecomp.cuda.nvrtc import ARCHITECTURES, compile_kernel
from sparsecomp.cuda.rows import pack_ffn
from sparsecomp.kernels.epilogue import ACTIVATIONS
from sparsecomp.runtime.skip_rates import skip_rate_of
from sparsecomp.targets import get_target
from sparsecomp.targets.base import Candidate, WeightFacts
from sparsecomp.targets.cuda.cards import card_here
from sparsecomp.targets.cuda.kernels import CompiledKernel
from sparsecomp.targets.cuda.target import SEMI, CudaTarget

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.int32: 0.0}
PATTERNS = {"two_four": "2:4", "panel_sparse": "64:2:4:8", "panel": "32:2:8", "block": "64x64@0.5"}
SIZES = ((520, 1000, 131), (64, 64, 8), (5, 19, 1))


def card_arch() -> str:
    """The architecture of the card here, that kernels are compiled for."""
    need_nvrtc()
    major, minor = torch.cuda.get_device_capability()
    if f"sm_{major}{minor}" not in ARCHITECTURES:
        pytest.skip(f"no kernel is compiled for sm_{major}{minor}, the card here")
    return f"sm_{major}{minor}"


def pruned(family: str, outputs: int, inputs: int, dtype: torch.dtype) -> Tensor:
    """A weight that a family takes; sizes need not fit the pattern."""
    layer = nn.Linear(-(-inputs // 64) * 64, -(-outputs // 64) * 64, bias=False)
    sparsecomp.sparsify_(layer, PATTERNS.get(family, "unstructured@0.8"))
    weight = layer.weight.detach()[:outputs, :inputs]
    return (weight * (127 / weight.abs().max()) if dtype == torch.int8 else weight).to(dtype).contiguous()


def assert_close(given: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[given.dtype]
    torch.testing.assert_close(given.double().cpu(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_every_kernel_agrees_at_ragged_sizes(kernel: CudaKernel) -> None:
    arch = card_arch()
    for outputs, inputs, tokens in SIZES:
        weight = pruned(kernel.family, outputs, inputs, kernel.dtype)
        packed = CompiledKernel(kernel, weight.cuda(), arch)
        x, bias = torch.randn(min(tokens, kernel.tokens or tokens), inputs), torch.randn(outputs)
        if kernel.dtype == torch.int8:
            x, bias = (20 * x).to(torch.int8), (1000 * bias).to(torch.int32)
        else:
            x, bias = x.to(kernel.dtype), bias.to(kernel.dtype)
        expected = functional.linear(x.double(), weight.double(), bias.double())
        assert_close(packed.product(x.cuda(), bias.cuda()), expected)


@pytest.mark.parametrize("ffn", FFN, ids=lambda ffn: ffn.name)
def test_an_ffn_skips_units_below_the_threshold(ffn: CudaFfn) -> None:
    cubin = compile_kernel(ffn.source, card_arch(), ffn.defines)[0]
    hidden, inputs, outputs = 1500, 700, 450
    gate, up, x = (torch.randn(*size).to(ffn.dtype) / 8 for size in ((hidden, inputs), (hidden, inputs), (inputs,)))
    down = (torch.randn(outputs, hidden) / 8).to(ffn.dtype)
    blocks = -(-hidden // UNITS)
    # Every other unit is far above its threshold or far below: sums in another order decide none.
    threshold = torch.tensor([0.0, 1e6]).repeat(hidden // 2)
    given: dict[str, Tensor | int | None] = {
        **{name: value.cuda() for name, value in pack_ffn(gate, up, down).items()},
        "x": x.cuda(),
        "threshold": threshold.cuda(),
        "gate_bias": None,
        "up_bias": None,
        "bias": None,
        "places": torch.empty(blocks * UNITS, dtype=torch.int32, device="cuda"),
        "hidden_values": torch.empty(blocks * UNITS, device="cuda"),
        "counts": torch.empty(blocks, dtype=torch.int32, device="cuda"),
        "y": torch.empty(outputs, dtype=ffn.dtype, device="cuda"),
        "hidden": hidden,
        "inputs": inputs,
        "outputs": outputs,
        "stride": -(-inputs // 128) * 128,
        "activation": ACTIVATIONS.index("none"),
    }
    for entry, names, launch in (
        (ffn.hidden_entry, ffn.hidden_arguments, ffn.launch_hidden(hidden, inputs)),
        (ffn.down_entry, ffn.down_arguments, ffn.launch_down(outputs)),
    ):
        Function(cubin, entry)(launch, [given[name] for name in names], torch.device("cuda", 0))
    values = (gate.double() @ x.double()) * (up.double() @ x.double())
    y = given["y"]
    assert isinstance(y, Tensor)
    assert_close(y, down.double()[:, ::2] @ values[::2])


class FreeSkips(CudaTarget):
    """The card here, where skipping always wins, so that small blocks take it."""

    def predict_skip(
        self,
        facts: WeightFacts,
        kept: float,
        tokens: int,
        threads: int,
        dtype: torch.dtype = torch.float32,
        by_input: bool = True,
    ) -> float:
        return 1e-3 * super().predict_skip(facts, kept, tokens, threads, dtype, by_input)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_compiled_model_skips_units_that_are_zero(dtype: torch.dtype) -> None:
    card_arch()
    model = nn.Sequential(nn.Linear(700, 1500), nn.ReLU(), nn.Linear(1500, 450)).to(dtype).requires_grad_(False).cuda()
    x, target = torch.randn(1, 700, device="cuda").to(dtype), FreeSkips(card_here())
    with torch.no_grad():
        compiled = torch.compile(model, backend="sparse", options={"target": target, "verify": True})
        given = compiled(x)
        assert backend.compilations()[-1].rewritten == ["ffn"]
        assert_close(given, model(x).double().cpu())
        assert_close(compiled(2 * x), model(2 * x).double().cpu())
    assert 0.2 < (skip_rate_of(model[2].weight) or 0) < 0.8


@pytest.mark.parametrize(
    ("pattern", "candidate", "tokens"),
    [
        ("2:4", SEMI, 13),
        ("64:2:4:8", Candidate("panel_sparse", "64:2:4:8", (("v", 32),)), 100),
        ("32:2:8", Candidate("panel", "32:2:8", (("v", 32),)), 100),
        ("64x64@0.5", Candidate("block", "64x64", (("v", 64),)), 100),
        ("unstructured@0.9", Candidate("rows_token", "unstructured", (("tokens", 1),)), 1),
    ],
    ids=["semi_structured", "panel_sparse", "panel", "block", "rows_token"],
)
def test_a_compiled_model_gives_the_numbers_of_the_model(pattern: str, candidate: Candidate, tokens: int) -> None:
    card_arch()
    if candidate == SEMI and not torch.backends.cusparselt.is_available():
        pytest.skip("PyTorch has no cuSPARSELt here")
    model = nn.Sequential(nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, 512)).half().requires_grad_(False)
    sparsecomp.sparsify_(model, pattern)
    model, x = model.cuda(), torch.randn(tokens, 512, device="cuda").half()
    plan = sparsecomp.Plan(get_target("cuda").name, threads=1)
    plan.add(replace(choice, chosen=candidate) for choice in sparsecomp.explain(model, x))
    with torch.no_grad():
        compiled = torch.compile(model, backend="sparse", options={"plan": plan, "verify": True})
        given = compiled(x)
        assert backend.compilations()[-1].rewritten == ["0", "2"]
        assert_close(given, model(x).double().cpu())
        assert_close(compiled(x), model(x).double().cpu())
