"""The FX front end and the passes together, on what Dynamo hands a backend; rewritten graphs are run and compared."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fx_cases import Captured, capture, ensure_op
from torch import Tensor, nn
from torch.nn.utils import prune

from sparsecomp.ir import LinearSite

TOKENS = torch.arange(6 * 8, dtype=torch.float32).reshape(2, 3, 8).sin()
WEIGHT, BIAS, PARAMETER = torch.randn(5, 8), torch.randn(5), nn.Parameter(torch.randn(5, 8))


@pytest.fixture(autouse=True)
def _op() -> Iterator[None]:
    library = ensure_op()
    yield
    if library is not None:
        library._destroy()


def check(function: Callable[..., Any], *args: Any, **options: Any) -> list[Captured]:
    """The captured graphs, after the rewritten function has been found to agree with the original."""
    with torch.no_grad():
        expected = function(*[arg.clone() if isinstance(arg, Tensor) else arg for arg in args])
    graphs, result = capture(function, *args, **options)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    return graphs


def check_one(function: Callable[..., Any], *args: Any, **options: Any) -> LinearSite:
    """The one site of the one graph."""
    (captured,) = check(function, *args, **options)
    (site,) = captured.sites
    return site


def summary(site: LinearSite) -> tuple[str, bool, str, bool]:
    return site.name, site.bias is not None, site.activation, site.residual is not None


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(8, 16), nn.Linear(16, 8), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(F.gelu(self.up(x), approximate="tanh")))


def test_residual_block() -> None:
    (captured,) = check(Residual().eval(), TOKENS)
    assert [summary(site) for site in captured.sites] == [
        ("up", True, "gelu_tanh", False),
        ("down", True, "none", True),
    ]
    assert captured.sites[1].operations == tuple(
        operation.name for operation in captured.graph if operation.name in captured.sites[1].operations
    )
    assert captured.kinds(captured.sites[1]) == ["linear", "identity", "add"]
    assert [site.tokens for site in captured.sites] == [6, 6]


def test_weight_index_is_the_graph_input() -> None:
    model = Residual().eval()
    (captured,) = check(model, TOKENS)
    names = [node.name for node in captured.gm.graph.nodes if node.op == "placeholder"]
    for site in captured.sites:
        assert names[site.weight_index] == site.weight_op
    assert captured.sites[0].weight is model.up.weight


@pytest.mark.parametrize(
    ("function", "transposed", "bias"),
    [
        (lambda x: F.linear(x, WEIGHT), False, False),
        (lambda x: F.linear(input=x, weight=PARAMETER, bias=BIAS), False, True),
        (lambda x: F.linear(x, WEIGHT.t().contiguous().t(), BIAS), False, True),
        (lambda x: x @ WEIGHT.t(), False, False),
        (lambda x: x @ WEIGHT.T + BIAS, False, True),
        (lambda x: BIAS + x.matmul(WEIGHT.mT), False, True),
        (lambda x: torch.matmul(x, WEIGHT.transpose(0, 1)), False, False),
        (lambda x: torch.matmul(x, WEIGHT.transpose(-1, -2)), False, False),
        (lambda x: torch.matmul(x, other=WEIGHT.permute(1, 0)), False, False),
        (lambda x: x @ WEIGHT.permute([1, 0]).detach(), False, False),
        (lambda x: x @ WEIGHT.data.t().clone(), False, False),
        (lambda x: torch.addmm(BIAS, x[0], WEIGHT.t()), False, True),
        (lambda x: BIAS.addmm(x[0], WEIGHT.t()), False, True),
        (lambda x: torch.mm(x[0], WEIGHT.t()) + 1, False, False),
        (lambda x: x[0].mm(WEIGHT.t()).add(BIAS), False, True),
    ],
)
def test_forms_of_a_product(function: Callable[[Tensor], Tensor], transposed: bool, bias: bool) -> None:
    site = check_one(function, TOKENS)
    assert site.declined is None
    assert (site.transposed, site.bias is not None) == (transposed, bias)
    assert (site.in_features, site.out_features) == (8, 5)


def test_forms_with_the_weight_stored_by_input() -> None:
    stored = WEIGHT.t().contiguous()
    for function in (
        lambda x: x @ stored,
        lambda x: F.linear(x, stored.t()),
        lambda x: torch.addmm(BIAS, x[0], stored),
    ):
        site = check_one(function, TOKENS)
        assert site.declined is None
        assert site.transposed
        assert (site.in_features, site.out_features) == (8, 5)


def test_buffers_attributes_globals_and_closures_are_constant() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.randn(8, 8))
            self.plain = torch.randn(8, 8)
            self.inner = nn.Module()
            self.inner.w1 = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.linear(F.linear(x, self.table), self.plain), self.inner.w1) @ WEIGHT.t()

    (captured,) = check(Holder(), TOKENS)
    assert [site.declined for site in captured.sites] == [None] * 4
    assert [site.name for site in captured.sites[:3]] == ["table", "plain", "inner.w1"]

    closure, held = torch.randn(8, 8), [torch.randn(8, 8)]
    (captured,) = check(lambda x: F.linear(F.linear(x, closure), held[0]), TOKENS)
    assert [site.declined for site in captured.sites] == [None] * 2
    assert captured.sites[0].name == "closure"


def test_weights_given_to_the_call_are_declined() -> None:
    site = check_one(lambda x, w: F.linear(x, w), TOKENS, torch.randn(5, 8))
    assert site.declined == "its weight is an argument of the compiled call, not a constant of the program"
    assert site.weight.is_meta
    assert site.out_features == 5
    assert check_one(lambda x, w: F.linear(x, w), TOKENS, PARAMETER).declined is None
    # two activations are attention, not a linear
    assert check(lambda x, y: x @ y, TOKENS, torch.randn(8, 8))[0].sites == []


def test_attention_is_no_site() -> None:
    assert check(lambda x: (x @ x.mT).softmax(-1) @ x, TOKENS)[0].sites == []


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: F.linear(x, WEIGHT * 2), "computed from .*at each call"),
        (lambda x: F.linear(x, WEIGHT[:3]), r"\(getitem\)"),
        (lambda x: F.linear(x, torch.ones(5, 8)), "computed at each call"),
        (lambda x: F.linear(x[0, 0], WEIGHT), "at least two dimensions"),
        (lambda x: F.linear(x.double(), WEIGHT.double()), r"computed from .*\(double_1\)"),
        (lambda x: WEIGHT @ x.mT, "on the left"),
        (lambda x: torch.addmm(torch.ones(1, 5), x[0], WEIGHT.t()), r"bias has shape \[1, 5\]"),
        (lambda x: F.linear(x, WEIGHT.reshape(8, 5).t()), "at each call"),
    ],
)
def test_declined_with_a_reason(function: Callable[[Tensor], Tensor], reason: str) -> None:
    site = check_one(function, TOKENS)
    assert site.declined is not None
    assert re.search(reason, site.declined), site.declined


def test_types_without_kernels_are_declined() -> None:
    site = check_one(nn.Linear(8, 8).double(), TOKENS.double())
    assert "float64" in str(site.declined)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats_are_accepted(dtype: torch.dtype) -> None:
    (captured,) = capture(Residual().eval().to(dtype), TOKENS.to(dtype))[0]
    assert [site.declined for site in captured.sites] == [None, None]
    assert captured.sites[0].dtype == dtype


def test_autocast_mixes_types() -> None:
    model = Residual().eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (captured,) = capture(model, TOKENS)[0]
    assert all("mixes types as under autocast" in str(site.declined) for site in captured.sites)

    def inside(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x)

    (captured,) = capture(inside, TOKENS)[0]
    assert all("mixes types as under autocast" in str(site.declined) for site in captured.sites)


def test_weights_shared_and_modules_called_twice() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.first(F.silu(self.second(F.relu(self.first(x)))))

    (captured,) = check(Shared(), TOKENS)
    assert [site.name for site in captured.sites] == ["first", "second", "first#2"]
    assert len({id(site.weight) for site in captured.sites}) == 1
    assert len({site.weight_index for site in captured.sites}) == 1
    assert [site.activation for site in captured.sites] == ["relu", "silu", "none"]


def test_names_of_several_modules_in_a_function() -> None:
    left, right = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8))
    (captured,) = check(lambda x: left(x) * right(x), TOKENS)
    assert [site.name for site in captured.sites] == ["left", "right.0"]
    (captured,) = check(lambda x: right(x) * 2, TOKENS)
    assert [site.name for site in captured.sites] == ["0"]


def test_in_place_operations() -> None:
    layer = nn.Linear(8, 8)

    def added_to_value(x: Tensor) -> Tensor:
        y = layer(x)
        y += x
        return y

    def added_to_other(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 2
        z = y.view(-1)
        y += layer(x)
        return y, z

    def statement(x: Tensor) -> Tensor:
        y = layer(x)
        y.relu_()
        return y + x

    def operand_changed(x: Tensor) -> Tensor:
        h = x * 2
        y = layer(h)
        h.mul_(3)
        return F.relu(y) + h

    def operand_view_changed(x: Tensor) -> Tensor:
        h = x * 2
        v = h.view(-1)
        y = layer(h)
        v[0] = 100.0
        return F.relu(y)

    def argument_changed(x: Tensor) -> Tensor:
        y = layer(x)
        x.zero_()
        return F.relu(y)

    def input_mutated_before(x: Tensor) -> Tensor:
        h = x * 2
        h.add_(1)
        return F.relu(layer(h))

    def residual_changed_after(x: Tensor) -> tuple[Tensor, Tensor]:
        h = x * 2
        y = layer(x) + h
        h.zero_()
        return y, h

    assert check_one(added_to_value, TOKENS).residual is not None
    assert check_one(added_to_other, TOKENS).residual is None
    assert summary(check_one(statement, TOKENS))[2:] == ("none", False)
    assert summary(check_one(operand_changed, TOKENS))[2:] == ("none", False)
    assert summary(check_one(operand_view_changed, TOKENS))[2:] == ("none", False)
    assert summary(check_one(argument_changed, TOKENS.clone()))[2:] == ("none", False)
    assert summary(check_one(input_mutated_before, TOKENS))[2:] == ("relu", False)
    assert check_one(residual_changed_after, TOKENS).residual is not None


def test_a_weight_changed_in_the_graph_is_declined() -> None:
    weight = torch.randn(8, 8)

    def change(x: Tensor) -> Tensor:
        y = F.linear(x, weight)
        weight.view(-1).mul_(1.0)
        return y

    def change_copy(x: Tensor) -> Tensor:
        copy = weight.clone()
        copy.mul_(2)
        return F.linear(x, copy)

    for function in (change, change_copy):
        site = check_one(function, TOKENS)
        assert site.declined is not None
        assert "changed inside the graph" in site.declined


def test_values_used_elsewhere_are_not_fused() -> None:
    layer = nn.Linear(8, 8)

    def twice(x: Tensor) -> tuple[Tensor, Tensor]:
        y = layer(x)
        return F.relu(y), y

    def with_itself(x: Tensor) -> Tensor:
        y = layer(x)
        return y + y

    for function in (twice, with_itself):
        assert summary(check_one(function, TOKENS)) == ("linear", True, "none", False)


@pytest.mark.parametrize(
    "function",
    [
        lambda y, x: y + 1,
        lambda y, x: torch.add(y, x, alpha=2),
        lambda y, x: y + x[:1],
        lambda y, x: x.mT.contiguous().mT + y,
        lambda y, x: y[None] + x,
        lambda y, x: y + x.double(),
        lambda y, x: F.dropout(y, 0.0, training=True),
        lambda y, x: F.gelu(y.double()),
    ],
)
def test_what_does_not_fit_is_not_fused(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    layer = nn.Linear(8, 8)
    site = check_one(lambda x: function(layer(x), x), TOKENS)
    assert site.declined is None
    assert len(site.operations) == 1


def test_two_products_added() -> None:
    left, right = nn.Linear(8, 8), nn.Linear(8, 8)
    (captured,) = check(lambda x: F.silu(left(x)) + right(x), TOKENS)
    assert [summary(site)[2:] for site in captured.sites] == [("silu", False), ("none", True)]
    (captured,) = check(lambda x: right(x) + F.relu(left(x)), TOKENS)
    assert [summary(site)[2:] for site in captured.sites] == [("none", False), ("relu", True)]


def test_dynamic_shapes() -> None:
    model = Residual().eval()
    (captured,) = check(model, TOKENS, dynamic=True)
    assert [summary(site) for site in captured.sites] == [
        ("up", True, "gelu_tanh", False),
        ("down", True, "none", True),
    ]
    assert all(site.dynamic and site.tokens == 6 for site in captured.sites)

    # both happen to have 3 rows now, which says nothing about the next call
    layer = nn.Linear(8, 8)
    site = check_one(lambda x, y: layer(x).flatten(0, 1) + y, TOKENS, torch.ones(6, 8), dynamic=True)
    assert site.declined is None

    graphs: list[Captured] = []
    torch._dynamo.reset()

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(Captured(gm, inputs))
        return gm.forward

    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        compiled(TOKENS)
        compiled(torch.randn(2, 5, 8))
    assert [site.dynamic for captured in graphs for site in captured.sites] == [False, False, True, True]


def test_a_closure_whose_shape_may_change_is_declined() -> None:
    weight = torch.randn(5, 8)
    site = check_one(lambda x: F.linear(x, weight), TOKENS, dynamic=True)
    assert site.declined is None or "shape may change" in site.declined


def test_sizes_that_depend_on_data() -> None:
    layer = nn.Linear(8, 8)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        site = check_one(lambda x: F.relu(layer(x[x.sum(-1) > 0])), TOKENS)
    assert site.declined is None
    assert site.dynamic
    assert site.activation == "relu"


def test_graph_breaks() -> None:
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)

    def broken(x: Tensor) -> Tensor:
        y = first(x)
        torch._dynamo.graph_break()
        return second(F.relu(y)) + x

    graphs = check(broken, TOKENS)
    assert [[site.declined for site in captured.sites] for captured in graphs] == [[None], [None]]
    assert graphs[1].sites[0].residual is not None


def test_a_tensor_from_before_a_graph_break_is_not_constant() -> None:
    def broken(x: Tensor) -> Tensor:
        weight = x[0, :, :].t() @ x[0]
        torch._dynamo.graph_break()
        return F.linear(x, weight)

    graphs = check(broken, TOKENS)
    assert graphs[-1].sites[0].declined is not None


def test_vmap_is_declined() -> None:
    layer = nn.Linear(8, 8)
    site = check_one(lambda x: torch.vmap(layer)(x), TOKENS)
    assert site.declined is not None
    assert "vmap" in site.declined


def test_inference_mode() -> None:
    model = Residual().eval()
    with torch.inference_mode():
        expected = model(TOKENS)
        (captured,), result = capture(model, TOKENS)
    torch.testing.assert_close(result, expected)
    assert [site.declined for site in captured.sites] == [None, None]


def test_control_flow_is_left_alone() -> None:
    layer = nn.Linear(8, 8)

    def branch(x: Tensor) -> Tensor:
        return layer(torch.cond(x.sum() > 0, lambda v: F.linear(v, layer.weight), lambda v: v * 2, (x,)))

    (captured,) = check(branch, TOKENS)
    (site,) = captured.sites
    assert site.declined is not None
    assert "may be changed" in site.declined


def test_embedding_ties() -> None:
    class Tied(nn.Module):
        def __init__(self, **options: Any) -> None:
            super().__init__()
            self.embed = nn.Embedding(8, 8, **options)
            self.head = nn.Linear(8, 8, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x))

    tokens = torch.arange(6).reshape(2, 3)
    site = check_one(Tied(), tokens)
    assert (site.name, site.declined) == ("head", None)


def test_a_graph_without_shapes_is_declined() -> None:
    gm = torch.fx.symbolic_trace(lambda x: F.linear(x, WEIGHT))
    captured = Captured(gm, [TOKENS])
    assert [site.declined for site in captured.sites] == [
        "the shape and type of its input are not known, as of nested tensors"
    ]


def test_nested_tensors_are_declined() -> None:
    layer = nn.Linear(8, 8)
    nested = torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)], layout=torch.jagged)
    graphs, _ = capture(lambda x: F.relu(layer(x)) + x, nested)
    (site,) = graphs[0].sites
    assert site.declined == "the shape and type of its input are not known, as of nested tensors"


def test_pruning_that_is_not_made_permanent_says_how() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    prune.l1_unstructured(model[0], "weight", 0.5)
    site = check_one(model, TOKENS)
    assert site.name == "0"
    assert "prune.remove" in str(site.declined)
    prune.remove(model[0], "weight")
    assert check_one(model, TOKENS).declined is None


def test_sites_are_found_on_the_meta_device() -> None:
    layer = nn.Linear(8, 8, device="meta")
    (captured,) = capture(layer, TOKENS.to("meta"))[0]
    (site,) = captured.sites
    assert site.declined is None
    assert site.weight.is_meta
