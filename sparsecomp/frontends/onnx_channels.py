"""Channels that go through a graph together: the axis of every value, and of every constant, that is theirs.

A channel of one value is the same channel of the sums, activations and normalisations that it goes through: a hidden
unit of a gated FFN, a channel of a residual stream and of all its blocks, a map behind a depthwise convolution. Such a
set of axes begins where a linear, a convolution or a table gives a value, and ends where the next ones read it. It can
be cut as one if every node that it meets is understood.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from sparsecomp.frontends.onnx_constants import read_tensor
from sparsecomp.frontends.onnx_shapes import ValueShape

ELEMENTWISE = frozenset(
    (
        *("Abs", "Add", "Cast", "Celu", "Clip", "Div", "Dropout", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid"),
        *("HardSwish", "Identity", "LeakyRelu", "Max", "Min", "Mish", "Mul", "Neg", "Pow", "PRelu", "Reciprocal"),
        *("Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Sqrt", "Sub", "Sum", "Swish", "Tanh", "ThresholdedRelu"),
    )
)
"""Operations that give an element of each operand's element at its place, or of the one that is broadcast there."""
CONTRIBUTED = frozenset({"Gelu", "FastGelu", "QuickGelu"})
"""The same of the domain `com.microsoft`."""
REDUCTIONS = frozenset({"ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2"})
_POOLS = frozenset({"MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool"})
_LONGEST = 16  # Identity and Transpose in a row behind a constant

Wire = tuple[ir.Value, int]
"""A value and the axis of its channels."""


@dataclass(frozen=True)
class Read:
    """A node that mixes channels.

    Attributes:
        node: of the graph.
        value: whose channels it reads.
        weight: place of the constant that they meet; None for a sum over the channels as they are.
        axis: of the weight along which they lie.
    """

    node: ir.Node
    value: ir.Value
    weight: int | None = None
    axis: int = 0


@dataclass
class Channels:
    """A set of axes that can only be cut together.

    Attributes:
        size: number of channels.
        axes: by value the axis of its channels.
        constants: by node and place of an operand, the axes of a constant along which the channels lie.
        reads: the nodes that mix them.
        grouped: depthwise convolutions, which say in an attribute how many there are.
    """

    size: int
    axes: dict[ir.Value, int] = field(default_factory=dict)
    constants: dict[tuple[ir.Node, int], set[int]] = field(default_factory=dict)
    reads: list[Read] = field(default_factory=list)
    grouped: dict[ir.Node, None] = field(default_factory=dict)

    def lies(self, node: ir.Node, place: int, axis: int) -> None:
        """Note that the channels lie along an axis of a constant operand."""
        self.constants.setdefault((node, place), set()).add(axis)


class Tracer:
    """Follows channels through the outer graph of a model.

    Attributes:
        graph: is only read here.
        sizes: of its values; whoever cuts a value notes its new size here.
    """

    def __init__(self, graph: ir.Graph, shapes: Mapping[str, ValueShape]) -> None:
        self.graph = graph
        values = (*graph.inputs, *(value for node in graph for value in node.outputs))
        known = ((value, shapes.get(value.name or "")) for value in values)
        self.sizes = {value: list(shape.sizes) for value, shape in known if shape is not None}

    def seeds(self) -> list[Wire]:
        """Where channels begin."""
        found = []
        for node in self.graph:
            if node.domain == "" and node.op_type in ("MatMul", "Gemm", "Gather", "Conv"):
                rank = self.rank(node.outputs[0])
                if rank:
                    found.append((node.outputs[0], 1 if node.op_type == "Conv" else rank - 1))
        return found

    def trace(self, seed: Wire, refused: set[ir.Value]) -> Channels | None:
        """All that is connected to a wire.

        Args:
            seed: where to begin.
            refused: values whose channels cannot be cut; those that are found are added.

        Returns:
            None if something about the channels is not understood.
        """
        size = self.size(*seed)
        channels = Channels(size if isinstance(size, int) else 0)
        waiting = [seed] if channels.size > 1 else []
        while waiting:
            value, axis = waiting.pop()
            if value in channels.axes and channels.axes[value] == axis:
                continue
            joined = None
            if value not in refused and value not in channels.axes and self.size(value, axis) == channels.size:
                channels.axes[value] = axis
                joined = self._meet(value, channels)
            if joined is None:
                refused.update(channels.axes)
                return None
            waiting += joined
        return channels if channels.reads else None

    def _meet(self, value: ir.Value, channels: Channels) -> list[Wire] | None:
        """What else has the channels of a value, None if they cannot be cut."""
        producer = value.producer()
        if producer is None or value.is_graph_output() or value.is_graph_input():
            return None
        joined = []
        for node in dict.fromkeys((producer, *(use.node for use in value.uses()))):
            found = self._rule(node)(self, node, value, channels) if node.graph is self.graph else None
            if found is None:
                return None
            joined += found
        return joined

    def _rule(self, node: ir.Node) -> _Rule:
        if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
            return _unknown
        if node.domain == "":
            return _elementwise if node.op_type in ELEMENTWISE else _RULES.get(node.op_type, _unknown)
        return _elementwise if node.domain == "com.microsoft" and node.op_type in CONTRIBUTED else _unknown

    def stored(self, value: ir.Value | None) -> tuple[ir.Value, bool] | None:
        """The initializer or Constant behind a value, and whether the value is its transpose; None if there is none."""
        flipped = False
        for _ in range(_LONGEST):
            if value is None or value in self.graph.inputs:
                return None
            if ir.convenience.get_const_tensor(value) is not None:
                return value, flipped
            node = value.producer()
            if node is None or node.domain != "" or node.op_type not in ("Identity", "Transpose"):
                return None
            value = node.inputs[0]
            if node.op_type == "Transpose":
                if list(node.attributes.get_ints("perm", [1, 0]) or ()) != [1, 0]:
                    return None
                flipped = not flipped
        return None

    def array(self, value: ir.Value | None) -> npt.NDArray[Any]:
        """The elements of a constant.

        Raises:
            ValueError: its data does not fit its shape, or cannot be read.
        """
        found = self.stored(value)
        assert found is not None
        tensor = ir.convenience.get_const_tensor(found[0])
        assert tensor is not None
        array = read_tensor(tensor)
        return array.T if found[1] else array

    def shape(self, value: ir.Value | None) -> tuple[int | str, ...] | None:
        """Sizes of a value, text for those that change; None if its rank is not known."""
        found = self.stored(value)
        if found is not None:
            tensor = ir.convenience.get_const_tensor(found[0])
            assert tensor is not None
            sizes = tuple(tensor.shape.numpy())
            return sizes[::-1] if found[1] else sizes
        return tuple(self.sizes[value]) if value in self.sizes else None

    def rank(self, value: ir.Value | None) -> int | None:
        """Dimensions of a value."""
        shape = self.shape(value)
        return None if shape is None else len(shape)

    def size(self, value: ir.Value | None, axis: int) -> int | str | None:
        """One size of a value; None if it has no such axis."""
        shape = self.shape(value)
        return shape[axis] if shape is not None and 0 <= axis < len(shape) else None


_Rule = Callable[[Tracer, ir.Node, ir.Value, Channels], "list[Wire] | None"]
"""`(tracer, node, value, channels) -> wires`: what has the channels that a value has, on the other side of a node that
gives or reads it. Notes constants and reads; None where the node does something else with them."""


def _unknown(tracer: Tracer, node: ir.Node, value: ir.Value, channels: Channels) -> list[Wire] | None:
    return None


def _elementwise(tracer: Tracer, node: ir.Node, value: ir.Value, channels: Channels) -> list[Wire] | None:
    behind = (tracer.rank(value) or 0) - channels.axes[value]
    joined = []
    for place, operand in enumerate(node.inputs):
        if operand is None:
            continue
        rank = tracer.rank(operand)
        if rank is None:
            return None
        axis = rank - behind
        if axis < 0 or tracer.size(operand, axis) == 1:
            continue
        if tracer.stored(operand) is None:
            joined.append((operand, axis))
        elif tracer.size(operand, axis) == channels.size:
            channels.lies(node, place, axis)
        else:
            return None
    return [*joined, (node.outputs[0], (tracer.rank(node.outputs[0]) or 0) - behind)]


def _matmul(tracer: Tracer, node: ir.Node, value: ir.Value, channels: Channels) -> list[Wire] | None:
    x, weight = node.inputs
    if tracer.stored(weight) is None or tracer.rank(weight) != 2 or not _last(tracer, value, channels):
        return None
    if value is x:
        channels.lies(node, 1, 0)
        channels.reads.append(Read(node, value, 1, 0))
    else:
        channels.lies(node, 1, 1)
    return []


def _gemm(tracer: Tracer, node: ir.Node, value: ir.Value, channels: Channels) -> list[Wire] | None:
    x, weight, *others = node.inputs
    bias = others[0] if others else None
    if tracer.stored(weight) is None or node.attributes.get_int("transA") or not _last(tracer, value, channels):
        return None
    inner = 1 if node.attributes.get_int("transB") else 0
    if value is x:
        channels.lies(node, 1, inner)
        channels.reads.append(Read(node, value, 1, inner))
        return None if x is bias else []
    channels.lies(node, 1, 1 - inner)
    rank = tracer.rank(bias)
    if bias is not None and rank is None:
        return None
    if not rank or tracer.size(bias, rank - 1) == 1 or bias is None:
        return [(node.outputs[0], 1)]
    if tracer.stored(bias) is None:
        return [(node.outputs[0], 1), (bias, rank - 1)]
    channels.lies(node, 2, rank - 1)
    return [(node.outputs[0], 1)]


def _gather(tracer: Tracer, node: ir.Node, value: ir.Value, channels: Channels) -> list[Wire] | None:
    """A table of vectors, such as an embedding."""
    table = node.inputs[0]
    fits = tracer.stored(table) is not None and tracer.rank(table) == 2 and node.attributes.get_int("axis", 0) == 0
    if not fits or value is not node.outputs[0] or not _last(tracer, value, channels):
        return None
    channels.lies(node, 0, 1)
    return []


def _conv(tracer: Tracer, node: ir.Node, value: ir.Value, channels: Channels) -> list[Wire] | None:
    x, weight, *others = node.inputs
    bias = others[0] if others else None
    groups = node.attributes.get_int("group", 1)
    depthwise = groups == tracer.size(x, 1) == tracer.size(weight, 0) and tracer.size(weight, 1) == 1 and groups != 1
    constant = tracer.stored(weight) is not None and (bias is None or tracer.stored(bias) is not None)
    if not constant or channels.axes[value] != 1 or not (groups == 1 or depthwise):
        return None
    if value is x and not depthwise:
        channels.lies(node, 1, 1)
        channels.reads.append(Read(node, value, 1, 1))
        return []
    channels.lies(node, 1, 0)
    if bias is not None:
        channels.lies(node, 2, 0)
    if depthwise and x is not None:
        channels.grouped[node] = None
        return [(x, 1), (node.outputs[0], 1)]
    return []


def _batch_norm(tracer: Tracer, node: ir.Node, value: ir.Value, channels: Channels) -> list[Wire] | None:
    x, *vectors = node.inputs
    constant = len(vectors) == 4 and all(tracer.stored(vector) is not None for vector in vectors)
    if not constant or channels.axes[value] != 1 or node.attributes.get_int("training_mode") or x is None:
        return None
    for place in range(1, 5):
        channels.lies(node, place, 0)
    return [(x, 1), (node.outputs[0], 1)]


def _rms_norm(tracer: Tracer, node: ir.Node, value: ir.Value, channels: Channels) -> list[Wire] | None:
    """Divided by the root of the mean square: of channels that are zero that only changes the count."""
    x, scale = node.inputs
    axis = node.attributes.get_int("axis", -1)
    last = axis in (-1, (tracer.rank(x) or 0) - 1)
    plain = tracer.stored(scale) is not None and tracer.rank(scale) == 1
    if not (last and plain and _last(tracer, value, channels)) or x is None:
        return None
    if value is x:
        channels.reads.append(Read(node, value))
    channels.lies(node, 1, 0)
    return [(x, (tracer.rank(x) or 0) - 1), (node.outputs[0], (tracer.rank(x) or 0) - 1)]


def _reduce(tracer: Tracer, node: ir.Node, value: ir.Value, channels: Channels) -> list[Wire] | None:
    x, out, rank = node.inputs[0], node.outputs[0], tracer.rank(node.inputs[0])
    axes = reduced_axes(tracer, node)
    if axes is None or rank is None or x is None:
        return None
    stays = [axis for axis in range(rank) if axis not in axes]
    keeps = node.attributes.get_int("keepdims", 1)
    if value is x and axes == {channels.axes[x]}:
        channels.reads.append(Read(node, value))
        return []
    if value is x:
        axis = channels.axes[x]
        return [(out, axis if keeps else stays.index(axis))] if axis in stays else None
    axis = channels.axes[out] if keeps else stays[channels.axes[out]]
    return [(x, axis)] if axis in stays else None


def reduced_axes(tracer: Tracer, node: ir.Node) -> set[int] | None:
    """The axes that a reduction sums over, counted from the front; None if they are not known."""
    rank = tracer.rank(node.inputs[0])
    given = node.attributes.get_ints("axes", None)
    if given is None and len(node.inputs) > 1 and tracer.stored(node.inputs[1]) is not None:
        given = [int(axis) for axis in tracer.array(node.inputs[1]).reshape(-1)]
    return None if rank is None or not given else {int(axis) % rank for axis in given}


def _pool(tracer: Tracer, node: ir.Node, value: ir.Value, channels: Channels) -> list[Wire] | None:
    x = node.inputs[0]
    return [(x, 1), (node.outputs[0], 1)] if channels.axes[value] == 1 and x is not None else None


def _flatten(tracer: Tracer, node: ir.Node, value: ir.Value, channels: Channels) -> list[Wire] | None:
    """Only of maps of one value."""
    x = node.inputs[0]
    one = all(size == 1 for size in (tracer.shape(x) or ("?",))[2:]) and tracer.rank(x) is not None
    fits = one and channels.axes[value] == 1 and node.attributes.get_int("axis", 1) == 1
    return [(x, 1), (node.outputs[0], 1)] if fits and x is not None else None


def _transpose(tracer: Tracer, node: ir.Node, value: ir.Value, channels: Channels) -> list[Wire] | None:
    x, rank = node.inputs[0], tracer.rank(node.outputs[0]) or 0
    order = [int(place) for place in node.attributes.get_ints("perm", list(range(rank))[::-1]) or ()]
    if x is None or sorted(order) != list(range(rank)):
        return None
    axis = channels.axes[value]
    return [(node.outputs[0], order.index(axis))] if value is x else [(x, order[axis])]


def _shape(tracer: Tracer, node: ir.Node, value: ir.Value, channels: Channels) -> list[Wire] | None:
    """Who asks for a shape must not see how many channels there are."""
    axis, rank = channels.axes[value], tracer.rank(value) or 0
    first, last, _ = slice(*(node.attributes.get_int(name, None) for name in ("start", "end"))).indices(rank)
    if not first <= axis < last:
        return []
    unseen = all(axis - first not in (_seen(tracer, use.node, last - first) or {axis - first}) for use in _uses(node))
    return [] if unseen and not node.outputs[0].is_graph_output() else None


def _uses(node: ir.Node) -> list[Any]:
    return list(node.outputs[0].uses())


def _seen(tracer: Tracer, node: ir.Node, count: int) -> set[int] | None:
    """Which entries of a shape a node takes, None if that is not known."""
    if node.domain != "" or node.op_type not in ("Gather", "Slice"):
        return None
    given = [tracer.array(value).reshape(-1) if tracer.stored(value) else None for value in node.inputs[1:]]
    if any(array is None for array in given):
        return None
    if node.op_type == "Gather":
        return {int(place) % count for array in given if array is not None for place in array}
    bounds: list[Any] = [node.attributes.get_ints("starts", None), node.attributes.get_ints("ends", None)]
    first, last = given[:2] if len(given) >= 2 else bounds
    steps = given[3] if len(given) > 3 else None
    if first is None or last is None or len(first) != 1 or (steps is not None and steps[0] != 1):
        return None
    return set(range(*slice(int(first[0]), int(last[0])).indices(count)))


def _last(tracer: Tracer, value: ir.Value, channels: Channels) -> bool:
    return channels.axes[value] == (tracer.rank(value) or 0) - 1


_RULES: dict[str, _Rule] = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Gather": _gather,
    "Conv": _conv,
    "BatchNormalization": _batch_norm,
    "RMSNormalization": _rms_norm,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Shape": _shape,
    **dict.fromkeys(_POOLS, _pool),
    **dict.fromkeys(REDUCTIONS, _reduce),
}
