"""The pass on graphs made by hand; what Dynamo really hands over is tested with the front end."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparsecomp.ir import IRError, Operation, SparseGraph
from sparsecomp.passes import DetectLinear, FuseEpilogue, run_passes

ARGUMENT = {"index": 0, "why": "an argument of the compiled call"}


def make(*steps: tuple[Any, ...], linear: str = "matmul") -> SparseGraph:
    """y = x @ w with x [3, 4] and w [4, 6], beside r [3, 6] and b [6], then steps (name, kind, inputs..., fields)."""
    graph = SparseGraph()
    for name, shape in (("x", (3, 4)), ("r", (3, 6)), ("b", (6,))):
        graph.add(Operation(name, "input", shape=shape, dtype=torch.float32, attrs=ARGUMENT))
    weight = torch.ones(4, 6)
    attrs = {"value": weight, "index": 3, "path": "w"}
    graph.add(Operation("w", "constant", shape=(4, 6), dtype=torch.float32, attrs=attrs))
    graph.add(Operation("y", linear, ("x", "w"), shape=(3, 6), dtype=torch.float32))
    for name, kind, *rest in steps:
        fields = rest.pop() if isinstance(rest[-1], dict) else {}
        graph.add(Operation(name, kind, tuple(rest), **({"shape": (3, 6), "dtype": torch.float32} | fields)))
    return graph


def fuse(graph: SparseGraph) -> tuple[Any, ...]:
    """(operations, bias, activation, residual) of the first site."""
    run_passes(graph, [DetectLinear(), FuseEpilogue()])
    site = graph.sites[0]
    return site.operations, site.bias, site.activation, site.residual


IN_PLACE = {"mutates": ("y",), "aliases": True}


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_everything_in_its_order(activation: str) -> None:
    graph = make(("s", "add", "y", "b"), ("a", activation, "s"), ("o", "add", "r", "a"), ("output", "output", "o"))
    assert fuse(graph) == (("y", "s", "a", "o"), "b", activation, "r")


def test_identities_go_only_with_what_follows() -> None:
    graph = make(("d", "identity", "y", {"aliases": True}), ("o", "add", "d", "r"), ("e", "identity", "o"))
    assert fuse(graph) == (("y", "d", "o"), None, "none", "r")


def test_bias_after_activation_is_no_bias() -> None:
    graph = make(("a", "relu", "y"), ("s", "add", "a", "b"))
    assert fuse(graph) == (("y", "a"), None, "relu", None)


def test_nothing_after_the_residual() -> None:
    graph = make(("o", "add", "y", "r"), ("a", "relu", "o"))
    assert fuse(graph) == (("y", "o"), None, "none", "r")


@pytest.mark.parametrize("kind", ["sigmoid", "mul", "layer_norm", "opaque", "reshape"])
def test_other_kinds_stop(kind: str) -> None:
    assert fuse(make(("a", kind, "y")))[0] == ("y",)


def test_a_second_user_stops() -> None:
    assert fuse(make(("a", "relu", "y"), ("t", "mul", "y", "a")))[0] == ("y",)
    assert fuse(make(("a", "relu", "y"), ("output", "output", "y", "a")))[0] == ("y",)


def test_a_value_added_to_itself_stops() -> None:
    assert fuse(make(("o", "add", "y", "y")))[0] == ("y",)


@pytest.mark.parametrize(
    "fields", [{"dtype": torch.float64}, {"shape": (3, 3, 6)}, {"contiguous": False}, {"attrs": {"scalar": 1}}]
)
def test_other_type_shape_or_layout_stops(fields: dict[str, Any]) -> None:
    assert fuse(make(("o", "add", "y", "r", fields)))[0] == ("y",)


def test_other_size_of_the_same_hint_stops() -> None:
    graph = SparseGraph()
    for name, sizes in (("x", ("s0", 4)), ("r", ("s1", 6))):
        shape = (3, int(sizes[1]))
        graph.add(Operation(name, "input", shape=shape, sizes=sizes, dtype=torch.float32, attrs=ARGUMENT))
    attrs = {"value": torch.ones(4, 6), "index": 2, "path": "w"}
    graph.add(Operation("w", "constant", shape=(4, 6), dtype=torch.float32, attrs=attrs))
    for name, kind, inputs in (("y", "matmul", ("x", "w")), ("o", "add", ("y", "r"))):
        graph.add(Operation(name, kind, inputs, shape=(3, 6), sizes=("s0", 6), dynamic=True, dtype=torch.float32))
    assert fuse(graph)[0] == ("y",)
    assert graph.sites[0].dynamic


def test_in_place_on_the_value_is_taken() -> None:
    assert fuse(make(("a", "relu", "y", IN_PLACE), ("o", "add", "a", "r")))[0] == ("y", "a", "o")
    assert fuse(make(("o", "add", "y", "r", IN_PLACE))) == (("y", "o"), None, "none", "r")


def test_in_place_on_the_other_side_stops() -> None:
    assert fuse(make(("o", "add", "r", "y", {"mutates": ("r",), "aliases": True})))[0] == ("y",)


def test_an_operand_changed_in_between_stops() -> None:
    change = ("c", "relu", "x", {"shape": (3, 4), "mutates": ("x",), "aliases": True})
    assert fuse(make(change, ("a", "relu", "y")))[0] == ("y",)
    # r and x are both arguments, so they may be the same memory
    assert fuse(make(("c", "relu", "r", {"mutates": ("r",), "aliases": True}), ("a", "relu", "y")))[0] == ("y",)


def test_a_change_of_something_else_does_not_stop() -> None:
    other = ("n", "mul", "r", "r")
    change = ("c", "relu", "n", {"mutates": ("n",), "aliases": True})
    assert fuse(make(other, change, ("a", "relu", "y")))[0] == ("y", "a")


def test_of_two_products_the_later_takes_the_sum() -> None:
    graph = make(("z", "matmul", "x", "w"), ("a", "relu", "y"), ("o", "add", "a", "z"))
    run_passes(graph, [DetectLinear(), FuseEpilogue()])
    first, second = graph.sites
    assert (first.operations, first.residual) == (("y", "a"), None)
    assert (second.operations, second.residual) == (("z", "o"), "a")


def test_declined_sites_are_left_alone_and_notes_say_why() -> None:
    graph = make(("a", "relu", "y"), ("t", "mul", "a", "r"))
    results = run_passes(graph, [DetectLinear(), FuseEpilogue()])
    assert results[1].changed
    assert results[1].notes == ("w: takes a; stops because t (mul) is not part of an epilogue",)
    graph = make(("a", "relu", "y"))
    run_passes(graph, [DetectLinear()])
    graph.sites[0].declined = "a reason"
    assert run_passes(graph, [FuseEpilogue()])[0].changed is False


def test_runs_once() -> None:
    graph = make(("a", "relu", "y"))
    fuse(graph)
    with pytest.raises(IRError, match="already has an epilogue"):
        run_passes(graph, [FuseEpilogue()])
