"""Which convolutions work channels first and which channels last, and where values change between the two.

The sparse kernels read and write maps channels first; Inductor lays the maps of dense convolutions out channels last,
and fuses a change of layout with the element-wise operation or the pooling that it meets there. Each change is a pass
over a value. So the choice is made for the whole graph: the sites that take part cost what they cost in either layout,
and a value that goes from one layout to the other costs its conversion.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf, prod

import networkx as nx

from sparsecomp.ir import Operation, SparseGraph

FIRST, LAST = "channels first", "channels last"
_FIRST, _SECOND = "the first label", "the second label"  # no operation is called so


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
    labels = TwoLabels()
    for anchor, cost in costs.items():
        labels.price(anchor, cost.first, cost.last)
    edges: list[Conversion] = []
    for operation in graph:
        reader = owner.get(operation.name, operation.name)
        if reader not in costs and (fixed := _fixed(operation)) is not None:
            labels.price(reader, *((0.0, inf) if fixed == FIRST else (inf, 0.0)))
        for name in operation.inputs:
            given = graph.operation(name)
            producer = owner.get(name, name)
            if producer == reader or not _is_maps(given) or not (_is_maps(operation) or operation.kind == "output"):
                continue
            values = prod(given.shape)
            edges.append(Conversion(producer, reader, values, convert_us(values), ""))
            labels.unlike(producer, reader, edges[-1].us)
    first = labels.first()
    crossing = tuple(
        Conversion(edge.producer, edge.consumer, edge.values, edge.us, FIRST if edge.consumer in first else LAST)
        for edge in edges
        if (edge.producer in first) != (edge.consumer in first)
    )
    return Layouts(frozenset(costs.keys() - first), crossing)


class TwoLabels:
    """Nodes of which each takes the first or the second of two labels, so that it costs least in all.

    A node costs what its label does, and neighbours with unlike labels cost their price: a minimum cut between both
    labels (Greig, Porteous and Seheult 1989, section 2).
    """

    def __init__(self) -> None:
        self._flow: nx.DiGraph[str] = nx.DiGraph()
        self._flow.add_nodes_from((_FIRST, _SECOND))

    def price(self, node: str, first: float, second: float) -> None:
        """Add to what a node costs with either label; infinity for one that it cannot have."""
        # What is on the side of the first label is cut off from the other at its cost there, and the other way round.
        self._limit(node, _SECOND, first)
        self._limit(_FIRST, node, second)

    def unlike(self, one: str, other: str, cost: float) -> None:
        """Add to what it costs if two nodes have unlike labels."""
        self._limit(one, other, cost)
        self._limit(other, one, cost)

    def first(self) -> set[str]:
        """The nodes with the first label."""
        _, (found, _) = nx.minimum_cut(self._flow, _FIRST, _SECOND)
        return found - {_FIRST}

    def _limit(self, tail: str, head: str, cost: float) -> None:
        """Add to what may flow; an edge without a capacity is unlimited."""
        if cost == inf:
            self._flow.add_edge(tail, head)
        elif not self._flow.has_edge(tail, head):
            self._flow.add_edge(tail, head, capacity=cost)
        elif "capacity" in self._flow.edges[tail, head]:
            self._flow.edges[tail, head]["capacity"] += cost


def _is_maps(operation: Operation) -> bool:
    return len(operation.shape) == 4 and operation.kind != "constant"


def _fixed(operation: Operation) -> str | None:
    """The layout that an operation has whatever is chosen; None where it takes the one of its inputs."""
    if operation.kind == "conv":
        return LAST  # dense, under Inductor
    if operation.kind == "output" or (operation.kind == "input" and operation.contiguous):
        return FIRST
    return LAST if operation.kind == "input" and _is_maps(operation) else None
