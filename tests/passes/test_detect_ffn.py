"""Feed-forward blocks on graphs made by hand; what libraries write is in tests/frontends/test_fx_ffn.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from sparsecomp.blocks import FfnSite
from sparsecomp.ir import IRError, Operation, SparseGraph
from sparsecomp.passes import DetectFfn, DetectLinear, DetectMoe, FuseEpilogue, run_passes

HIDDEN = {"shape": (3, 6)}
ACTIVATION = ("a", "silu", "g", HIDDEN)


def make(*steps: tuple[Any, ...], weights: tuple[tuple[str, tuple[int, int]], ...] = ()) -> SparseGraph:
    """x [3, 4], r [3, 4] and constants, then steps (name, kind, inputs..., fields); values are [3, 4] if not told."""
    graph = SparseGraph()
    attrs = {"index": 0, "why": "an argument"}
    for name in ("x", "r"):
        graph.add(Operation(name, "input", shape=(3, 4), dtype=torch.float32, attrs=attrs))
    default = (("wg", (6, 4)), ("wu", (6, 4)), ("wd", (4, 6)))
    for index, (name, shape) in enumerate(weights or default):
        held = {"value": torch.ones(shape), "index": index, "path": f"layer.mlp.{name}.weight"}
        graph.add(Operation(name, "constant", shape=shape, dtype=torch.float32, attrs=held))
    for name, kind, *rest in steps:
        fields = rest.pop() if isinstance(rest[-1], dict) else {}
        graph.add(Operation(name, kind, tuple(rest), **({"shape": (3, 4), "dtype": torch.float32} | fields)))
    return graph


def detect(graph: SparseGraph) -> list[FfnSite]:
    run_passes(graph, [DetectLinear(), FuseEpilogue(), DetectFfn()])
    return graph.ffns


def scalar(value: float, **fields: Any) -> dict[str, Any]:
    return {**HIDDEN, "attrs": {"scalar": value}, **fields}


GATE, UP = ("g", "linear", "x", "wg", HIDDEN), ("u", "linear", "x", "wu", HIDDEN)
PRODUCT, DOWN = ("h", "mul", "a", "u", HIDDEN), ("d", "linear", "h", "wd")


def test_up_activation_down() -> None:
    graph = make(GATE, ("a", "relu", "g", HIDDEN), ("d", "linear", "a", "wd"), ("o", "add", "r", "d"))
    (block,) = detect(graph)
    assert (block.name, block.activation, block.gated, block.exact_zeros) == ("layer.mlp", "relu", False, True)
    assert block.operations == ("g", "a", "d", "o")
    assert (block.x, block.residual, block.hidden) == ("x", "r", 6)
    assert [linear.name for linear in block.linears] == ["layer.mlp.wg", "layer.mlp.wd"]


@pytest.mark.parametrize("order", [("a", "u"), ("u", "a")])
def test_gated(order: tuple[str, str]) -> None:
    (block,) = detect(make(GATE, ACTIVATION, UP, ("h", "mul", *order, HIDDEN), DOWN))
    assert block.declined is None
    assert block.up is not None
    assert (block.gate.name, block.up.name, block.gated) == ("layer.mlp.wg", "layer.mlp.wu", True)


@pytest.mark.parametrize("first", ["gate", "up"])
def test_gate_and_up_in_one_weight(first: str) -> None:
    parts = {"gate": (0, 6), "up": (6, 6)} if first == "gate" else {"gate": (6, 6), "up": (0, 6)}
    fields = {
        name: HIDDEN | {"aliases": True, "attrs": {"start": start, "length": length}}
        for name, (start, length) in parts.items()
    }
    graph = make(
        ("y", "linear", "x", "wgu", {"shape": (3, 12)}),
        ("c", "opaque", "y", {"shape": (), "dtype": None}),
        ("g", "part", "y", "c", fields["gate"]),
        ("u", "part", "y", "c", fields["up"]),
        ACTIVATION,
        PRODUCT,
        DOWN,
        weights=(("wgu", (12, 4)), ("wd", (4, 6))),
    )
    (block,) = detect(graph)
    assert (block.declined, block.fused, block.up, block.hidden) == (None, first, None, 6)
    assert block.operations == ("y", "c", "g", "u", "a", "h", "d")


def test_square_of_relu() -> None:
    square = ("s", "power", "a", HIDDEN | {"attrs": {"exponent": 2.0}})
    (block,) = detect(make(GATE, ("a", "relu", "g", HIDDEN), square, ("d", "linear", "s", "wd")))
    assert (block.declined, block.activation) == (None, "relu2")


def test_thresholded_activation() -> None:
    cut = ("a", "threshold", "g", HIDDEN | {"attrs": {"threshold": 0.2}})
    (block,) = detect(make(GATE, cut, ("d", "linear", "a", "wd")))
    assert (block.activation, block.floor) == ("relu", 0.2)


def test_tanh_gelu_written_out() -> None:
    steps = (
        ("m", "mul", "g", scalar(0.5)),
        ("p", "power", "g", HIDDEN | {"attrs": {"exponent": 3.0}}),
        ("w", "mul", "p", scalar(0.044715)),
        ("s", "add", "g", "w", HIDDEN),
        ("k", "mul", "s", scalar(math.sqrt(2 / math.pi))),
        ("t", "tanh", "k", HIDDEN),
        ("i", "add", "t", scalar(1.0)),
        ("a", "mul", "m", "i", HIDDEN),
    )
    (block,) = detect(make(GATE, *steps, ("d", "linear", "a", "wd")))
    assert (block.declined, block.activation) == (None, "gelu_tanh")
    other = [(name, kind, *rest) if name != "w" else ("w", "mul", "p", scalar(0.05)) for name, kind, *rest in steps]
    assert detect(make(GATE, *other, ("d", "linear", "a", "wd"))) == []


def test_no_activation_is_no_block() -> None:
    assert detect(make(GATE, ("d", "linear", "g", "wd"))) == []


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ((GATE, ACTIVATION, UP, PRODUCT, DOWN, ("o", "add", "h", "h", HIDDEN)), "its h is also used by o"),
        ((GATE, ACTIVATION, ("u", "linear", "r", "wu", HIDDEN), PRODUCT, DOWN), "reads r and layer.mlp.wg reads x"),
    ],
)
def test_what_cannot_be_rewritten_says_why(steps: tuple[Any, ...], reason: str) -> None:
    (block,) = detect(make(*steps))
    assert block.declined is not None
    assert reason in block.declined


def test_an_operand_that_changes_in_between() -> None:
    change = ("n", "opaque", "x", {"mutates": ("x",), "aliases": True})
    (block,) = detect(make(GATE, change, ("a", "relu", "g", HIDDEN), ("d", "linear", "a", "wd")))
    assert block.declined is not None
    assert "may change an operand" in block.declined


def test_verify_finds_a_broken_block() -> None:
    graph = make(GATE, ("a", "relu", "g", HIDDEN), ("d", "linear", "a", "wd"))
    (block,) = detect(graph)
    block.operations = block.operations[1:]
    with pytest.raises(IRError, match=r"layer\.mlp\.wg is not a site"):
        graph.verify()


def test_experts_are_named() -> None:
    graph = make(
        ("y", "linear", "x", "gate", {"shape": (3, 5), "module": "m.gate", "module_type": "Linear"}),
        ("s", "softmax", "y", {"shape": (3, 5)}),
        ("t", "topk", "s", {"shape": (), "dtype": None, "attrs": {"count": 2}}),
        ("e", "opaque", "x", "t", {"module": "m.experts"}),
        weights=(("gate", (5, 4)),),
    )
    run_passes(graph, [DetectLinear(), DetectMoe()])
    (block,) = graph.moes
    assert (block.name, block.experts, block.picked) == ("m", 5, 2)


def test_a_ranked_classifier_is_no_mixture() -> None:
    graph = make(
        ("y", "linear", "x", "gate", {"shape": (3, 5)}),
        ("t", "topk", "y", {"shape": (), "dtype": None, "attrs": {"count": 1}}),
        weights=(("gate", (5, 4)),),
    )
    run_passes(graph, [DetectLinear(), DetectMoe()])
    assert graph.moes == []
