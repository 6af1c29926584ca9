"""Emits the nodes of a function in standard operations; what the functions of `onnx_fallback` are written with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape


class _Emitter:
    """Emits a node by the name of its type: `op.Add(a, b)`."""

    def __init__(self) -> None:
        self._tape = Tape()

    @property
    def nodes(self) -> Sequence[ir.Node]:
        """What was emitted."""
        return self._tape.nodes

    def __getattr__(self, op_type: str) -> Callable[..., ir.Value]:
        return lambda *inputs, **attributes: self._tape.op(op_type, inputs, attributes)


class Body:
    """Emits the nodes of a function; integers are int32.

    Args:
        inputs: of the function by name.
        opset: that its nodes are of.

    Attributes:
        op: emits a node by the name of its type.
    """

    def __init__(self, inputs: dict[str, ir.Value], opset: int) -> None:
        self.inputs = inputs
        self.op = _Emitter()
        self.opset = opset
        self._constants: dict[tuple[Any, ...], ir.Value] = {}

    def constant(self, value: Any, dtype: Any = np.int32) -> ir.Value:
        """A constant; equal ones are one node."""
        array = np.asarray(value, dtype)
        key = (array.tobytes(), array.shape, array.dtype.str)
        if key not in self._constants:
            self._constants[key] = self.op.Constant(value=ir.tensor(array))
        return self._constants[key]

    def attribute(self, name: str) -> ir.Value:
        """The attribute of the node, as a scalar."""
        value = self.op.Constant(value_int=ir.RefAttr("value_int", name, ir.AttributeType.INT))
        return self.int32(value)

    def int32(self, value: ir.Value) -> ir.Value:
        """A value as int32."""
        return self.op.Cast(value, to=ir.DataType.INT32)

    def zeros(self, shape: ir.Value, dtype: Any) -> ir.Value:
        """Zeros of a shape that is computed."""
        return self.op.ConstantOfShape(shape, value=ir.tensor(np.zeros(1, dtype)))

    def range(self, count: ir.Value) -> ir.Value:
        """0, 1 and so on."""
        return self.op.Range(self.constant(0), count, self.constant(1))

    def flat(self, value: ir.Value) -> ir.Value:
        """A value with one dimension."""
        return self.op.Reshape(value, self.constant([-1], np.int64))

    def owners(self, starts: ir.Value, like: ir.Value) -> ir.Value:
        """For every entry of `like` the part that it is in; part p begins at `starts[p]`.

        Every start but the first is marked, with the number of parts that begin there, and the marks are summed: an
        empty part begins where the next one does. (ONNX Runtime folds no `NonZero`, which could leave them out.)
        """
        op, one = self.op, self.constant([1], np.int64)
        later = op.Slice(starts, one, op.Shape(starts))
        # Parts that are empty at the end begin behind the last entry.
        marks = self.zeros(op.Add(op.Shape(like), one), np.int32)
        ones = op.Add(self.zeros(op.Shape(later), np.int32), self.constant(1))
        marks = op.ScatterElements(marks, later, ones, axis=0, reduction="add")
        return op.CumSum(op.Slice(marks, self.constant([0], np.int64), op.Shape(like)), self.constant(0))

    def placed(
        self, place: ir.Value, values: ir.Value, *, spare: bool = False, shape: tuple[str, str] = ("inputs", "outputs")
    ) -> ir.Value:
        """A matrix from values and their places; with `spare` one place more is for what does not count."""
        op = self.op
        sizes = [op.Cast(self.attribute(name), to=ir.DataType.INT64) for name in shape]
        one = self.constant([1], np.int64)
        count = op.Reshape(op.Mul(*sizes), one)
        room = op.Add(count, one) if spare else count
        dense = op.ScatterElements(self.zeros(room, np.float32), place, values, axis=0)
        if spare:
            dense = op.Slice(dense, self.constant([0], np.int64), count)
        return op.Reshape(dense, op.Concat(*(op.Reshape(size, one) for size in sizes), axis=0))

    def activated(self, x: ir.Value, activation: str) -> ir.Value:
        """An activation in the form that ONNX Runtime fuses."""
        op = self.op

        def number(value: float) -> ir.Value:
            return self.constant(value, np.float32)

        if activation == "relu":
            return op.Relu(x)
        if activation == "relu6":
            if self.opset < 11:
                return op.Clip(x, min=0.0, max=6.0)
            return op.Clip(x, number(0.0), number(6.0))
        if activation == "hardswish":
            return op.Mul(x, op.HardSigmoid(x, alpha=1 / 6, beta=0.5))
        if activation == "silu":
            return op.Mul(x, op.Sigmoid(x))
        if activation == "gelu":  # in the form that ONNX Runtime fuses
            erf = op.Erf(op.Div(x, number(math.sqrt(2))))
            return op.Mul(op.Mul(x, op.Add(erf, number(1.0))), number(0.5))
        if activation == "gelu_tanh":
            cube = op.Mul(op.Mul(x, x), x)
            inner = op.Mul(op.Add(x, op.Mul(cube, number(0.044715))), number(math.sqrt(2 / math.pi)))
            return op.Mul(op.Mul(x, op.Add(op.Tanh(inner), number(1.0))), number(0.5))
        return x
