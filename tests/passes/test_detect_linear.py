"""The pass on graphs made by hand; what Dynamo really hands over is tested with the front end."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from sparsecomp.ir import LinearSite, Operation, SparseGraph
from sparsecomp.passes import DetectLinear, run_passes

FLOAT = torch.float32


def operation(name: str, kind: str, *inputs: str, shape: tuple[int, ...] = (3, 6), **fields: Any) -> Operation:
    return Operation(name, kind, inputs, shape=shape, dtype=fields.pop("dtype", FLOAT), **fields)


def graph_with(weight: torch.Tensor, *operations: Operation) -> SparseGraph:
    """x [3, 4], a constant w, a bias b [6], and what is given."""
    graph = SparseGraph()
    graph.add(operation("x", "input", shape=(3, 4), attrs={"index": 0, "why": "an argument of the compiled call"}))
    attrs = {"value": weight, "index": 1, "path": "fc.weight"}
    graph.add(operation("w", "constant", shape=tuple(weight.shape), dtype=weight.dtype, attrs=attrs))
    graph.add(operation("b", "constant", shape=(6,), attrs={"value": torch.ones(6), "index": 2, "path": "fc.bias"}))
    for added in operations:
        graph.add(added)
    return graph


def detect(graph: SparseGraph) -> list[LinearSite]:
    run_passes(graph, [DetectLinear()])
    return graph.sites


def test_linear_with_bias() -> None:
    (site,) = detect(graph_with(torch.ones(6, 4), operation("y", "linear", "x", "w", "b", module="fc")))
    assert site.declined is None
    assert (site.name, site.bias, site.weight_index, site.transposed) == ("fc", "b", 1, False)
    assert (site.in_features, site.out_features, site.tokens) == (4, 6, 3)
    assert site.operations == ("y",)


@pytest.mark.parametrize("kind", ["matmul", "addmm"])
def test_right_side_is_stored_by_input(kind: str) -> None:
    inputs = ("x", "w") if kind == "matmul" else ("b", "x", "w")
    (site,) = detect(graph_with(torch.ones(4, 6), operation("y", kind, *inputs)))
    assert site.declined is None
    assert site.transposed
    assert site.bias == (None if kind == "matmul" else "b")
    assert (site.in_features, site.out_features) == (4, 6)


@pytest.mark.parametrize("kind", ["matmul", "linear"])
def test_a_transpose_turns_it_round(kind: str) -> None:
    weight = torch.ones(6, 4) if kind == "matmul" else torch.ones(4, 6)
    turn = operation("t", "transpose", "w", shape=(4, 6), attrs={"permutation": (1, 0)}, aliases=True)
    copy = operation("c", "identity", "t", shape=(4, 6), aliases=True)
    (site,) = detect(graph_with(weight, turn, copy, operation("y", kind, "x", "c")))
    assert site.declined is None
    assert site.transposed is (kind == "linear")
    assert site.weight_op == "w"


def test_names_repeat_with_a_number() -> None:
    calls = [operation(name, "linear", "x", "w", module="fc") for name in ("y", "z")]
    assert [site.name for site in detect(graph_with(torch.ones(6, 4), *calls))] == ["fc", "fc#2"]


def test_addmm_with_a_whole_matrix_has_a_residual() -> None:
    other = operation("m", "input", attrs={"index": 3, "why": "an argument of the compiled call"})
    (site,) = detect(graph_with(torch.ones(4, 6), other, operation("y", "addmm", "m", "x", "w")))
    assert site.declined is None
    assert (site.bias, site.residual) == (None, "m")


def test_attention_is_no_candidate() -> None:
    assert detect(graph_with(torch.ones(6, 4), operation("y", "matmul", "x", "x", shape=(3, 3)))) == []


@pytest.mark.parametrize(
    ("weight", "fields", "reason"),
    [
        (torch.ones(6, 4, dtype=torch.float64), {}, "float64; there are kernels for float32, bfloat16, float16"),
        (torch.ones(6, 4, dtype=torch.int8), {}, "int8"),
        (torch.ones(6, 4, dtype=torch.bfloat16), {}, "mixes types as under autocast"),
        (torch.ones(6, 4), {"dtype": torch.bfloat16}, "output bfloat16"),
        (torch.ones(2, 6, 4), {}, "a matrix is expected"),
        (torch.ones(0, 4), {}, "no elements"),
        (torch.ones(6, 4).to_sparse(), {}, "layout torch.sparse_coo"),
        (torch.ones(6, 4), {"contiguous": False}, "row by row"),
        (torch.ones(6, 4), {"shape": (2, 6)}, r"output has shape \[2, 6\], expected \[..., 6\]"),
    ],
)
def test_declined_with_a_reason(weight: torch.Tensor, fields: dict[str, Any], reason: str) -> None:
    (site,) = detect(graph_with(weight, operation("y", "linear", "x", "w", **fields)))
    assert site.declined is not None
    assert re.search(reason, site.declined)


def test_subclasses_are_declined() -> None:
    class Quantised(torch.Tensor):
        pass

    weight = torch.ones(6, 4).as_subclass(Quantised)
    (site,) = detect(graph_with(weight, operation("y", "linear", "x", "w")))
    assert site.declined == "its weight is a Quantised, not a plain tensor"


def test_weights_that_are_not_constant_are_declined() -> None:
    part = operation("part", "opaque", "w", shape=(6, 4), aliases=True)
    calls = [
        operation("y", "linear", "x", "part"),
        operation("z", "linear", "x", "x", shape=(3, 3)),
        operation("l", "matmul", "w", "x", shape=(6, 4)),
    ]
    derived, argument, left = detect(graph_with(torch.ones(6, 4), part, *calls))
    assert derived.declined is not None
    assert "computed from fc.weight at each call (part)" in derived.declined
    assert derived.weight.is_meta
    assert argument.declined == "its weight is an argument of the compiled call, not a constant of the program"
    assert left.declined is not None
    assert left.declined.startswith("the constant is on the left")


def test_a_weight_changed_in_the_graph_is_declined() -> None:
    view = operation("v", "reshape", "w", shape=(24,), aliases=True)
    write = operation("zero", "opaque", "v", shape=(24,), mutates=("v",), aliases=True)
    (site,) = detect(graph_with(torch.ones(6, 4), operation("y", "linear", "x", "w"), view, write))
    assert site.declined == "its weight is or may be changed inside the graph by zero"


def test_biases_that_do_not_fit_are_declined() -> None:
    wide = operation("wide", "input", shape=(1, 6), attrs={"index": 3, "why": "an argument of the compiled call"})
    half = operation("half", "identity", "b", shape=(6,), dtype=torch.bfloat16)
    calls = [operation("y", "addmm", "wide", "x", "w"), operation("z", "addmm", "half", "x", "w")]
    sites = detect(graph_with(torch.ones(4, 6), wide, half, *calls))
    assert sites[0].declined == "its bias has shape [1, 6]; a vector of 6 values is expected"
    assert sites[1].declined == "its bias is bfloat16 and its output float32"


def test_vector_input_is_declined() -> None:
    graph = graph_with(torch.ones(6, 4))
    graph.add(operation("v", "input", shape=(4,), attrs={"index": 3, "why": "an argument of the compiled call"}))
    graph.add(operation("y", "linear", "v", "w", shape=(6,)))
    (site,) = detect(graph)
    assert site.declined == "its input has shape [4]; at least two dimensions are expected"


def test_transforms_decline_everything() -> None:
    graph = graph_with(torch.ones(6, 4), operation("y", "linear", "x", "w"))
    graph.add(Operation("vmap", "transform"))
    (site,) = detect(graph)
    assert site.declined is not None
    assert "vmap" in site.declined
