"""The layouts of a graph of convolutions, and the conversions between them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecomp.ir import Operation, SparseGraph
from sparsecomp.planner.layouts import FIRST, LAST, SiteCosts, choose_layouts

INF = float("inf")


def graph_of(*steps: tuple[str, str, tuple[str, ...]], size: int = 10) -> SparseGraph:
    """Operations `(name, kind, inputs)` on maps, each of `[1, size, 10, 10]`."""
    graph = SparseGraph()
    for name, kind, inputs in steps:
        graph.add(Operation(name, kind, inputs, shape=(1, size, 10, 10) if kind != "output" else ()))
    return graph


CHAIN = (
    ("x", "input", ()),
    ("a", "conv", ("x",)),
    ("r", "relu", ("a",)),
    ("b", "conv", ("r",)),
    ("c", "conv", ("b",)),
    ("out", "output", ("c",)),
)


def own(*names: str) -> dict[str, str]:
    return {name: name for name in names}


def test_a_chain_of_sparse_convolutions_has_no_conversion() -> None:
    costs = {name: SiteCosts(50, 100) for name in "abc"}
    found = choose_layouts(graph_of(*CHAIN), costs, own(*"abc"), lambda values: values / 10)
    assert found.last == frozenset()
    assert found.conversions == ()


def test_a_dense_convolution_between_sparse_ones_is_converted_once_on_either_side() -> None:
    costs = {"a": SiteCosts(50, 200), "b": SiteCosts(INF, 100), "c": SiteCosts(50, 200)}
    found = choose_layouts(graph_of(*CHAIN), costs, own(*"abc"), lambda values: values / 100)
    assert found.last == {"b"}
    assert sorted((item.to, item.values, item.us) for item in found.conversions) == [
        (FIRST, 1000, 10),
        (LAST, 1000, 10),
    ]
    assert found.conversions[-1].producer == "b"


def test_a_sparse_convolution_that_gains_less_than_its_conversions_is_left_dense() -> None:
    costs = {"a": SiteCosts(INF, 100), "b": SiteCosts(85, 100), "c": SiteCosts(INF, 100)}
    found = choose_layouts(graph_of(*CHAIN), costs, own(*"abc"), lambda values: values / 100)
    assert found.last == {"a", "b", "c"}
    # What is left are those of the whole graph: its input comes channels first, and its output leaves so.
    assert [(item.producer, item.consumer) for item in found.conversions] == [("x", "a"), ("c", "out")]
    # With a gain of 25 for conversions of 20 it pays.
    costs["b"] = SiteCosts(75, 100)
    found = choose_layouts(graph_of(*CHAIN), costs, own(*"abc"), lambda values: values / 100)
    assert found.last == {"a", "c"}


def test_the_conversion_is_where_the_value_is_smallest() -> None:
    graph = SparseGraph()
    for name, kind, inputs, size in (
        ("x", "input", (), 16),
        ("a", "conv", ("x",), 16),
        ("pool", "opaque", ("a",), 8),
        ("up", "opaque", ("pool",), 32),
        ("b", "conv", ("up",), 32),
        ("mean", "opaque", ("b",), 0),
    ):
        graph.add(Operation(name, kind, inputs, shape=(1, 8, size, size) if size else (1, 8)))
    costs = {"a": SiteCosts(10, 1000), "b": SiteCosts(INF, 100)}
    (found,) = choose_layouts(graph, costs, own("a", "b"), lambda values: values / 100).conversions
    assert (found.producer, found.consumer, found.values, found.to) == ("pool", "up", 8 * 64, LAST)


def test_convolutions_that_cannot_be_rewritten_are_channels_last() -> None:
    found = choose_layouts(graph_of(*CHAIN[:-1]), {"c": SiteCosts(95, 100)}, own("c"), lambda values: values / 100)
    assert found.last == {"c"}


@settings(max_examples=60)
@given(st.data())
def test_no_assignment_is_cheaper(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 6))
    costs: dict[str, SiteCosts] = {}
    steps: list[tuple[str, str, tuple[str, ...]]] = [("x", "input", ())]
    for number in range(count):
        kind = data.draw(st.sampled_from(["conv", "add", "relu"]))
        names = [name for name, *_ in steps]
        inputs = tuple(data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True)))
        steps.append((f"n{number}", kind, inputs if kind == "add" else inputs[:1]))
        if kind == "conv":
            first = data.draw(st.just(INF) | st.integers(1, 50))
            costs[f"n{number}"] = SiteCosts(first, data.draw(st.integers(1, 50)))
    steps.append(("out", "output", (steps[-1][0],)))
    free = [name for name, kind, _ in steps if kind not in ("input", "output")]

    def total(last: set[str]) -> float:
        sites = sum(cost.last if name in last else cost.first for name, cost in costs.items())
        return sites + sum(10 for name, _, inputs in steps for given in inputs if (name in last) != (given in last))

    found = choose_layouts(graph_of(*steps), costs, own(*costs), lambda _: 10)
    best = min(total(set(last)) for r in range(len(free) + 1) for last in itertools.combinations(free, r))
    sites = sum(cost.last if name in found.last else cost.first for name, cost in costs.items())
    assert sites + sum(item.us for item in found.conversions) == pytest.approx(best)
