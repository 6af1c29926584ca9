"""Which convolutions work channels first and which channels last, and where values change between the two.

The sparse kernels read and write maps channels first; Inductor lays the maps of dense convolutions out channels last,
and fuses a change of layout with the element-wise operation or the pooling that it meets there. Each change is a pass
over a value. So the choice is made for the whole graph: the sites that take part cost what they cost in either layout,
a value that goes from one layout to the other costs its conversion, and what is cheapest in all is a minimum cut
between both layouts (two labels with costs for unlike neighbours: Greig, Porteous and Seheult 1989).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import networkx as nx

from sparsecomp.ir import Operation, SparseGraph

FIRST, LAST = "channels first", "channels last"


@dataclass(frozen=True)
class Conversion:
    """A value that changes its layout.

    Attributes:
        producer: operation that gives it.
        consumer: operation that reads it in the other layout.
        values: how many.
        us: predicted microseconds.
        to: the layout that the consumer wants.
    """

    producer: str
    consumer: str
    values: int
    us: float
    to: str


@dataclass(frozen=True)
class SiteCosts:
    """What a convolution takes in either layout, in microseconds; infinity where it has none."""

    first: float
    last: float


@dataclass(frozen=True)
class Layouts:
    """The cheapest layouts of a graph.

    Attributes:
        last: anchors of the sites that work channels last.
        conversions: in graph order.
    """

    last: frozenset[str]
    conversions: tuple[Conversion, ...]


def choose_layouts(
    graph: SparseGraph, costs: Mapping[str, SiteCosts], owner: Mapping[str, str], convert_us: Callable[[int], float]
) -> Layouts:
    """Find the layouts of least cost, conversions included.

    Args:
        graph: the operations.
        costs: of the convolutions that may be rewritten, by anchor.
        owner: of every operation that one of these absorbs, its anchor.
        convert_us: predicted microseconds for a conversion of so many values.
    """
    flow: nx.DiGraph[str] = nx.DiGraph()
    flow.add_nodes_from((FIRST, LAST))
    for anchor, cost in costs.items():
        # What lies on the side of channels first is cut from the other side at its cost there, and the other way round.
        _limit(flow, anchor, LAST, cost.first)
        _limit(flow, FIRST, anchor, cost.last)
    edges: list[Conversion] = []
    for operation in graph:
        reader = owner.get(operation.name, operation.name)
        if reader not in costs and (fixed := _fixed(operation)) is not None:
            _limit(flow, *((FIRST, reader) if fixed == FIRST else (reader, LAST)), float("inf"))
        for name in operation.inputs:
            given = graph.operation(name)
            producer = owner.get(name, name)
            if producer == reader or not _is_maps(given) or not (_is_maps(operation) or operation.kind == "output"):
                continue
            values = prod(given.shape)
            edges.append(Conversion(producer, reader, values, convert_us(values), ""))
    for edge in edges:
        _limit(flow, edge.producer, edge.consumer, edge.us)
        _limit(flow, edge.consumer, edge.producer, edge.us)
    _, (first, _) = nx.minimum_cut(flow, FIRST, LAST)
    crossing = tuple(
        Conversion(edge.producer, edge.consumer, edge.values, edge.us, FIRST if edge.consumer in first else LAST)
        for edge in edges
        if (edge.producer in first) != (edge.consumer in first)
    )
    return Layouts(frozenset(costs.keys() - first), crossing)


def _limit(flow: nx.DiGraph[str], tail: str, head: str, us: float) -> None:
    """Add to what may flow; an edge without a capacity is unlimited."""
    if us == float("inf"):
        flow.add_edge(tail, head)
    elif not flow.has_edge(tail, head):
        flow.add_edge(tail, head, capacity=us)
    elif "capacity" in flow.edges[tail, head]:
        flow.edges[tail, head]["capacity"] += us


def _is_maps(operation: Operation) -> bool:
    return len(operation.shape) == 4 and operation.kind != "constant"


def _fixed(operation: Operation) -> str | None:
    """The layout that an operation has whatever is chosen; None where it takes the one of its inputs."""
    if operation.kind == "conv":
        return LAST  # dense, under Inductor
    if operation.kind == "output" or (operation.kind == "input" and operation.contiguous):
        return FIRST
    return LAST if operation.kind == "input" and _is_maps(operation) else None
