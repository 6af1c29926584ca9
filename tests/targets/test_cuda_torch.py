"""`torch.compile(backend="sparse")` for a card, on the CPU: graphs, packing, padding, choices, changed weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from cuda_tools import CardOnCpu, cusparselt_on_cpu
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

import sparsecomp
from sparsecomp import backend
from sparsecomp.patterns import Pattern
from sparsecomp.targets import get_target
from sparsecomp.targets.base import DENSE, WeightFacts
from sparsecomp.targets.cuda.kernels import SemiStructured
from sparsecomp.targets.cuda.target import SEMI


@pytest.fixture(autouse=True)
def _cusparselt() -> Iterator[None]:
    with cusparselt_on_cpu():
        yield


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[fx.Graph]:
    """The graphs that Inductor would get, run as they are: what it makes of them is for one test to see."""
    found: list[fx.Graph] = []

    def keep(gm: fx.GraphModule, inputs: Any) -> Any:
        found.append(gm.graph)
        return gm.forward

    monkeypatch.setattr(backend, "_inductor", keep)
    return found


class Ffn(nn.Module):
    """An FFN block with a residual."""

    def __init__(self, width: int = 512, inner: int = 1024) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., width]` to the same."""
        down: Tensor = self.down(functional.gelu(self.up(x)))
        return x + down


def two_four(weight: Tensor) -> Tensor:
    return weight * torch.tensor([1, 0, 0, 1]).repeat(weight.shape[1] // 4)


def pruned(dtype: torch.dtype = torch.bfloat16, **sizes: int) -> Ffn:
    model = Ffn(**sizes).to(dtype).requires_grad_(False)
    for linear in (model.up, model.down):
        linear.weight.copy_(two_four(linear.weight))
    return model


def compiled(model: nn.Module, **options: Any) -> Any:
    wanted = {"target": CardOnCpu(), "plan": two_four_plan(), **options}
    return torch.compile(model, backend="sparse", options={key: value for key, value in wanted.items() if value})


def two_four_plan() -> sparsecomp.Plan:
    """2:4 everywhere: at the sizes of tests no card gains by it."""
    with torch.device("meta"):
        model, x = Ffn().half(), torch.empty(4096, 512, dtype=torch.half)
    report = sparsecomp.explain(model, x, target="cuda:h100", assume="2:4")
    plan = sparsecomp.Plan("cuda:h100", threads=1)
    plan.add(replace(choice, chosen=SEMI, tokens=0, shape=(0, 0)) for choice in report)
    return plan


@pytest.mark.parametrize(("dtype", "shape"), [(torch.float16, (2, 16, 512)), (torch.bfloat16, (3, 512))])
def test_two_four_runs_in_the_model_that_inductor_compiles(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    model, x = pruned(dtype), torch.randn(shape).to(dtype)
    with torch.no_grad():
        expected, given = model(x), compiled(model, verify=True)(x)
    assert backend.compilations()[-1].rewritten == ["up", "down"]
    assert given.is_contiguous()
    assert given.dtype == dtype
    torch.testing.assert_close(given, expected, rtol=2e-2, atol=2e-2)


def test_what_follows_a_product_is_left_to_inductor(graphs: list[fx.Graph]) -> None:
    with torch.no_grad():
        compiled(pruned())(torch.randn(8, 512).bfloat16())
    (graph,) = graphs
    names = [getattr(node.target, "__name__", str(node.target)) for node in graph.nodes if node.op == "call_function"]
    assert names == ["linear.default", "gelu", "linear.default", "add"]
    for node in graph.find_nodes(op="call_function", target=torch.ops.sparsecomp.linear.default):
        assert node.args[2] is None
        assert node.args[5] == "none"


@pytest.mark.usefixtures("graphs")
def test_changed_weights_are_packed_anew() -> None:
    model = pruned()
    fast, x = compiled(model), torch.randn(8, 512).bfloat16()
    with torch.no_grad():
        fast(x)
        model.up.weight.copy_(two_four(torch.randn_like(model.up.weight)).roll(1, dims=1))
        torch.testing.assert_close(fast(x), model(x), rtol=2e-2, atol=2e-2)


@pytest.mark.usefixtures("graphs")
def test_a_weight_that_lost_its_pattern_runs_dense() -> None:
    model = pruned()
    fast, x = compiled(model), torch.randn(8, 512).bfloat16()
    with torch.no_grad():
        fast(x)
        model.up.weight.normal_()
        torch.testing.assert_close(fast(x), model(x), rtol=2e-2, atol=2e-2)


def test_few_tokens_run_dense_in_the_model_that_runs_sparse_with_many() -> None:
    model = pruned(width=2048, inner=4096)
    target = CardOnCpu("a100")
    report = sparsecomp.explain(model, torch.zeros(4096, 2048).bfloat16(), options={"target": target})
    assert [choice.chosen for choice in report] == [SEMI, SEMI]
    few = sparsecomp.explain(model, torch.zeros(1, 2048).bfloat16(), options={"target": target})
    assert all("against dense" in choice.reason for choice in few)


@pytest.mark.usefixtures("graphs")
def test_int8_products_are_exact() -> None:
    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            weight = two_four(torch.randint(-127, 128, (512, 256), dtype=torch.int8)).to(torch.int8)
            self.linear = nn.Parameter(weight, requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch._int_mm(x, self.linear.t()).float() * 0.5

    model, x = Quantised(), torch.randint(-127, 128, (37, 256), dtype=torch.int8)
    report = sparsecomp.explain(model, x, options={"target": CardOnCpu()})
    assert SEMI in [item.candidate for choice in report for item in choice.predictions]
    plan = sparsecomp.Plan("cuda:h100", threads=1)
    plan.add(replace(choice, chosen=SEMI) for choice in report)
    with torch.no_grad():
        given = compiled(model, plan=plan, verify=True)(x)
        assert backend.compilations()[-1].rewritten
        assert torch.equal(given, model(x))


@pytest.mark.parametrize(("dtype", "tokens"), [(torch.float16, 13), (torch.bfloat16, 8), (torch.int8, 1)])
def test_products_keep_shape_type_and_device_under_fake_tensors_of_a_card(dtype: torch.dtype, tokens: int) -> None:
    def packed_shape(weight: Tensor) -> Tensor:
        return weight.new_empty(weight.shape[0], weight.shape[1] * 9 // 16)

    with torch.library._scoped_library("aten", "IMPL") as library, FakeTensorMode():
        library.impl("_cslt_compress", packed_shape, "Meta")
        kernel = SemiStructured(torch.empty(256, 128, dtype=dtype, device="cuda"))
        x = torch.empty(tokens, 128, dtype=dtype, device="cuda")
        y = kernel.product(x, None)
        op = torch.ops.sparsecomp.linear(x, None, None, 0, 256, "none")
    assert y.shape == op.shape == (tokens, 256)
    assert y.dtype == op.dtype == (torch.int32 if dtype == torch.int8 else dtype)
    assert y.device == op.device == torch.device("cuda", 0)
    assert y.is_contiguous()
    assert op.is_contiguous()


def test_weights_of_another_pattern_are_refused() -> None:
    target = CardOnCpu()
    with pytest.raises(ValueError, match="needs a weight of the pattern 2:4"):
        target.prepare(SEMI, torch.ones(64, 64, dtype=torch.half))
    with pytest.raises(ValueError, match="has no kernel dense"):
        target.prepare(DENSE, torch.ones(64, 64, dtype=torch.half))


def test_a_model_on_a_card_that_is_not_here_has_to_name_it() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card here")
    with FakeTensorMode():
        x = torch.empty(4, 8, device="cuda")
    with pytest.raises(ValueError, match="sees no NVIDIA GPU here; name a card, such as 'cuda:h100'"):
        sparsecomp.explain(nn.Identity(), x)


def test_two_four_goes_to_our_kernels_where_the_card_is_here_without_cusparselt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    facts = WeightFacts.assumed(512, 512, Pattern.parse("2:4"))
    with_it = CardOnCpu()
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    without = CardOnCpu()
    assert [found for found in with_it.candidates(facts) if found != SEMI] == without.candidates(facts)
    assert "panel_sparse" in {found.kernel for found in without.candidates(facts)}
    assert "PyTorch has no cuSPARSELt here" in without.description
    assert "cuSPARSELt" not in with_it.description
    assert SEMI in get_target("cuda:h100").candidates(facts)
