"""What is known of channels before a model runs: a channel of a value may be the same number in every call."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from sparsecomp.frontends.onnx_channels import CONTRIBUTED, ELEMENTWISE, Channels, Tracer
from sparsecomp.log import log

Numbers = npt.NDArray[np.float64]
"""A number for every channel, NaN where it is not known."""


def known_numbers(tracer: Tracer, channels: Channels, opset: int) -> dict[ir.Value, Numbers]:
    """For every value of some channels, the number that each channel has in every call, NaN where it is not known."""
    made = {value.producer() for value in channels.axes}
    known: dict[ir.Value, Numbers] = {}
    with np.errstate(all="ignore"):
        for node in tracer.graph:
            if node in made:
                numbers = _Given(tracer, channels, node, known, opset).result()
                known[node.outputs[0]] = np.where(np.isfinite(numbers), numbers, np.nan)
    return known


class _Given:
    """A node that gives channels, and what is known of its operands."""

    def __init__(
        self, tracer: Tracer, channels: Channels, node: ir.Node, known: dict[ir.Value, Numbers], opset: int
    ) -> None:
        self.tracer, self.channels, self.node, self.opset = tracer, channels, node, opset
        self._known = known

    def result(self) -> Numbers:
        """Of its value."""
        node = self.node
        if node.domain == "" and node.op_type in _RULES:
            return _RULES[node.op_type](self)
        if node.domain == "" and node.op_type in ELEMENTWISE:
            return self._elementwise()
        zero = node.op_type in CONTRIBUTED and len(node.inputs) == 1
        return np.where(self.operand(0) == 0, 0.0, np.nan) if zero else self._unknown()

    def operand(self, place: int) -> Numbers:
        """Of an operand: a number for every channel, or one for all."""
        value = self.node.inputs[place] if place < len(self.node.inputs) else None
        if value in self._known:
            return self._known[value]
        axes = self.channels.constants.get((self.node, place))
        if axes:
            return self.along(place, next(iter(axes)))
        if self.tracer.stored(value) is not None:
            array = self.tracer.array(value)
            if array.size == 1:
                return array.reshape(()).astype(np.float64)
        return np.array(np.nan)

    def along(self, place: int, axis: int) -> Numbers:
        """Of a constant operand, where it is the same all along the other axes."""
        array = self.tracer.array(self.node.inputs[place])
        others = _all_but(array.ndim, axis)
        # A table may be a large part of a model: nothing of its size is made but the comparison.
        first = array[tuple(slice(None) if other == axis else slice(0, 1) for other in range(array.ndim))]
        return np.where((array == first).all(axis=others), first.reshape(-1).astype(np.float64), np.nan)

    def zero(self, place: int, axis: int) -> npt.NDArray[np.bool_]:
        """Where a constant operand is zero all along the other axes."""
        array = self.tracer.array(self.node.inputs[place])
        return np.asarray(~(array != 0).any(axis=_all_but(array.ndim, axis)))

    def has(self, place: int) -> bool:
        """Whether there is such an operand."""
        return place < len(self.node.inputs) and self.node.inputs[place] is not None

    def _unknown(self) -> Numbers:
        return np.full(self.channels.size, np.nan)

    def _elementwise(self) -> Numbers:
        given = [self.operand(place) if self.has(place) else None for place in range(len(self.node.inputs))]
        numbers = np.broadcast_to(self._evaluate(given), (self.channels.size,))
        zeros = [array == 0 for array in given if array is not None]
        if self.node.op_type == "Mul":
            return np.where(zeros[0] | zeros[1], 0.0, numbers)
        return np.where(zeros[0], 0.0, numbers) if self.node.op_type == "Div" else numbers

    def _evaluate(self, given: list[Numbers | None]) -> Numbers:
        """What onnx's own evaluator says; nothing is known of operations that it does not have."""
        proto = ir.to_proto(self.node)
        names = ["" if array is None else f"x{place}" for place, array in enumerate(given)]
        call = helper.make_node(proto.op_type, names, ["y"])
        call.attribute.extend(proto.attribute)
        feeds = {name: array for name, array in zip(names, given, strict=True) if array is not None}
        inputs = [helper.make_tensor_value_info(name, TensorProto.DOUBLE, None) for name in feeds]
        outputs = [helper.make_tensor_value_info("y", TensorProto.DOUBLE, None)]
        graph = helper.make_graph([call], "node", inputs, outputs)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)])
        try:
            (result,) = ReferenceEvaluator(model).run(None, feeds)
            return np.asarray(result, np.float64)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            log.debug("nothing is known behind %s %s: %s", proto.op_type, proto.name, error)
            return self._unknown()


def _all_but(rank: int, axis: int) -> tuple[int, ...]:
    return tuple(other for other in range(rank) if other != axis)


def _linear(given: _Given) -> Numbers:
    """Zero, and the constant that is added, where the weight lets nothing in."""
    node = given.node
    weight_axis = 0 if node.op_type == "Conv" or node.attributes.get_int("transB") else 1
    nothing = given.zero(1, weight_axis)
    if node in given.channels.grouped:
        nothing |= given.operand(0) == 0
    bias = np.array(0.0)
    if given.has(2):
        bias = given.operand(2) * (node.attributes.get_float("beta", 1.0) or 0.0)
    return np.where(nothing, bias, np.nan)


def _batch_norm(given: _Given) -> Numbers:
    x, scale, bias, mean, variance = (given.operand(place) for place in range(5))
    root = np.sqrt(variance + (given.node.attributes.get_float("epsilon", 1e-5) or 0.0))
    return np.where(scale == 0, bias, (x - mean) / root * scale + bias)


def _zeros(given: _Given) -> Numbers:
    return np.where(given.operand(0) == 0, 0.0, np.nan)


_KEEP_ZEROS = (
    *("RMSNormalization", "MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool", "Flatten", "Transpose"),
    *("ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2"),
)
_RULES: dict[str, Callable[[_Given], Numbers]] = {
    "MatMul": _linear,
    "Gemm": _linear,
    "Conv": _linear,
    "Gather": lambda given: given.along(0, 1),
    "BatchNormalization": _batch_norm,
    **dict.fromkeys(_KEEP_ZEROS, _zeros),
}
