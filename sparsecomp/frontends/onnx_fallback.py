"""The operations of `ai.sparsecomp` in standard ONNX: a model-local function for each, which unpacks its weight.

A run time without the native library inlines the function and folds all that depends on constants, so that one dense
product is left; the reference evaluator and viewers read it as it is. From opset 16 on a function decodes the packed
arrays by themselves. Older opsets lack the operations for that: there the node also brings the places of its values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.tape import Tape

from sparsecomp.runtime.ort_library import DOMAIN
from sparsecomp.window import Window

DECODING_OPSET = 16
"""From this opset on a function decodes the packed arrays; below it takes `index` and `shape` instead."""
SCATTER_OPSET = 11
"""From this opset on `index` says where every value goes; below it where every entry of the weight comes from."""
OLDEST_OPSET = 9

_TITLES = {
    "none": "",
    "relu": "Relu",
    "gelu": "Gelu",
    "gelu_tanh": "GeluTanh",
    "silu": "Silu",
    "relu6": "Relu6",
    "hardswish": "HardSwish",
}
_WEIGHTS = {
    "rows": ("values", "columns", "pairs", "rows"),
    "panel": ("values", "columns", "ptr"),
    "gather": ("values", "columns", "ptr"),
    "mask": ("values", "masks", "ptr"),
    "conv": ("values", "columns", "quads", "starts"),
}
_ATTRIBUTES = {
    "rows": ("outputs", "inputs", "chunk", "block"),
    "conv": ("outputs", "inputs", "chunk", "block", "vectors"),
}
_SIZES = ("outputs", "inputs")
INDEXED = ("index", "shape")
"""Inputs of the form for old opsets: int32, see `index_of`; int64, the shape that the weight has in ONNX."""


@dataclass(frozen=True)
class Variant:
    """An operation of the domain; equal ones share a function and an entry of the library.

    Attributes:
        family: of kernels: `rows`, `panel`, `gather`, `mask` or `conv`.
        v: rows of a panel, entries of a group (gather), else 1.
        width: rows of a panel whose values lie together, else 1.
        activation: as in `sparsecomp.ir.ACTIVATIONS`.
        bias: whether a bias is added.
        residual: whether a residual is added last.
        indexed: whether the node brings the places of its values, for old opsets.
        residual_first: whether the residual is added before the activation.
        window: of a convolution.
        rank: dimensions of its maps, 1 or 2.
    """

    family: str
    v: int
    width: int
    activation: str
    bias: bool
    residual: bool
    indexed: bool
    residual_first: bool = False
    window: Window | None = None
    rank: int = 2

    @property
    def name(self) -> str:
        """Type of the operation: a name of its own for every variant, since overloads of functions are not safe."""
        if self.window is None:
            form = f"Linear{self.family.title()}{self.v if self.v > 1 else ''}"
            form += f"By{self.width}" if self.width > 1 and self.width != self.v else ""
        else:
            form = f"Conv{self.rank}d{_window_title(self.window, self.rank)}"
        after = [_TITLES[self.activation], "Add" if self.residual else ""]
        parts = (form, "Indexed" if self.indexed else "", "Bias" if self.bias else "")
        return "".join((*parts, *(reversed(after) if self.residual_first else after)))

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs, in order."""
        operands = ("x", *(("bias",) if self.bias else ()), *(("residual",) if self.residual else ()))
        return (*operands, *_WEIGHTS[self.family], *(INDEXED if self.indexed else ()))

    @property
    def attributes(self) -> tuple[str, ...]:
        """Names of the attributes, all int64."""
        return _ATTRIBUTES.get(self.family, _SIZES)


def function(variant: Variant, opset: int) -> ir.Function:
    """The model-local function of a variant.

    Args:
        variant: says what is computed.
        opset: of the model, which the function imports too.
    """
    inputs = {name: ir.Value(name=name) for name in variant.inputs}
    body = _Body(inputs, opset)
    weight = body.scattered() if variant.indexed else _DECODERS[variant.family](body, variant)
    y = body.product(weight, variant)
    y.name = "y"
    for index, node in enumerate(body.op.nodes):
        for value in node.outputs:
            value.name = value.name or f"v{index}"
    graph = ir.Graph(list(inputs.values()), [y], nodes=body.op.nodes, opset_imports={"": opset}, name=variant.name)
    attributes = [ir.Attr(name, ir.AttributeType.INT, None) for name in variant.attributes]
    return ir.Function(DOMAIN, variant.name, "", graph=graph, attributes=attributes)


def product_nodes(inputs: dict[str, ir.Value], weight: ir.Value, variant: Variant, opset: int) -> Sequence[ir.Node]:
    """The nodes that compute a variant from a dense weight, the one that gives the result last."""
    body = _Body(inputs, opset)
    body.product(weight, variant)
    return body.op.nodes


def index_of(
    pack: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]], weight: npt.NDArray[np.float32], opset: int
) -> npt.NDArray[np.int32]:
    """The input `index` of a node.

    Args:
        pack: gives the packed values of a weight `[O, I]` in the order of the node; it only looks at what is zero.
        weight: `[O, I]`, or that of a convolution; not without zeros.
        opset: of the model.

    Returns:
        From opset 11 on the place in the weight of every packed value, of padding one that is zero. Below, for every
        entry of the weight the number of its value counted from 1, or 0. Places are those of `MatMul`'s weight `[I, O]`
        for a matrix, those of `weight` for a convolution.
    """
    kept = weight != 0
    places = np.arange(weight.size, dtype=np.int64).reshape(weight.shape[::-1] if weight.ndim == 2 else weight.shape)
    places = places.T if weight.ndim == 2 else places
    # Two halves that float32 holds exactly, each moved by one, so that zero stays the mark of padding.
    high, low = (
        pack(np.where(kept, half + 1, 0).astype(np.float32)).astype(np.int64).reshape(-1)
        for half in (places // 4096, places % 4096)
    )
    place = (high - 1) * 4096 + low - 1
    if opset >= SCATTER_OPSET:
        return np.where(high > 0, place, int(places[~kept][0]) if not kept.all() else 0).astype(np.int32)
    source = np.zeros(weight.size, np.int32)
    source[place[high > 0]] = np.flatnonzero(high > 0) + 1
    return source


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


class _Body:
    """Emits the nodes of a function; integers are int32."""

    def __init__(self, inputs: dict[str, ir.Value], opset: int) -> None:
        self.inputs = inputs
        self.op = _Emitter()
        self._opset = opset
        self._constants: dict[tuple[Any, ...], ir.Value] = {}

    def constant(self, value: Any, dtype: Any = np.int32) -> ir.Value:
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
        return self.op.Cast(value, to=ir.DataType.INT32)

    def zeros(self, shape: ir.Value, dtype: Any) -> ir.Value:
        return self.op.ConstantOfShape(shape, value=ir.tensor(np.zeros(1, dtype)))

    def range(self, count: ir.Value) -> ir.Value:
        return self.op.Range(self.constant(0), count, self.constant(1))

    def flat(self, value: ir.Value) -> ir.Value:
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

    def scattered(self) -> ir.Value:
        """The weight `[I, O]` for old opsets."""
        op, index, shape, values = self.op, *(self.inputs[name] for name in (*INDEXED, "values"))
        if self._opset < SCATTER_OPSET:
            values = op.Concat(self.constant([0.0], np.float32), values, axis=0)
            return op.Reshape(op.Gather(values, index, axis=0), shape)
        zeros = self.zeros(op.ReduceProd(shape, axes=[0], keepdims=1), np.float32)
        return op.Reshape(op.ScatterElements(zeros, index, values, axis=0), shape)

    def product(self, weight: ir.Value, variant: Variant) -> ir.Value:
        """The product with a weight, and what follows it."""
        op, inputs = self.op, self.inputs
        if variant.window is not None:
            y = _convolved(self, weight, variant.window, variant)
        else:
            y = op.MatMul(inputs["x"], weight)
            y = op.Add(y, inputs["bias"]) if variant.bias else y
        if variant.residual and variant.residual_first:
            y = op.Add(y, inputs["residual"])
        y = self.activated(y, variant.activation)
        if variant.residual and not variant.residual_first:
            y = op.Add(y, inputs["residual"])
        return y

    def activated(self, x: ir.Value, activation: str) -> ir.Value:
        op = self.op

        def number(value: float) -> ir.Value:
            return self.constant(value, np.float32)

        if activation == "relu":
            return op.Relu(x)
        if activation == "relu6":
            if self._opset < 11:
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


def _decode_rows(body: _Body, variant: Variant) -> ir.Value:
    """See `sparsecomp.patterns.rows`: of every value its pair, from that its row and its column."""
    op, inputs, constant = body.op, body.inputs, body.constant
    outputs, width, chunk, block = (body.attribute(name) for name in variant.attributes)
    two = constant(2)
    value0, column0, both, turns = (op.Gather(inputs["pairs"], constant(field), axis=1) for field in range(4))
    pair = body.owners(value0, inputs["values"])

    def of_pair(values: ir.Value) -> ir.Value:
        return op.Gather(values, pair, axis=0)

    step = op.Sub(body.range(body.int32(op.Size(inputs["values"]))), of_pair(value0))
    shared = of_pair(op.Mul(both, two))
    alternating = op.Less(step, of_pair(op.Mul(op.Add(both, turns), two)))
    member = op.Where(alternating, op.Mod(step, two), constant(0))
    entry = op.Where(op.Less(step, shared), op.Div(step, two), op.Sub(step, of_pair(both)))
    column = body.int32(op.Gather(inputs["columns"], op.Add(of_pair(column0), entry), axis=0))
    row = op.Gather(body.flat(inputs["rows"]), op.Add(op.Mul(pair, two), member), axis=0)

    # Pairs stand chunk by chunk, in a chunk block by block.
    one = constant(1)
    blocks = op.Div(op.Sub(op.Add(width, block), one), block)
    number = body.range(body.int32(op.Size(value0)))
    whole = op.Mul(blocks, op.Div(chunk, two))
    at = op.Div(number, whole)
    rest = op.Sub(outputs, op.Mul(at, chunk))
    members = op.Where(op.Less(rest, chunk), rest, chunk)
    pairs_of_block = op.Div(op.Add(members, one), two)
    at_block = op.Div(op.Sub(number, op.Mul(at, whole)), pairs_of_block)
    row = op.Add(row, of_pair(op.Mul(at, chunk)))
    column = op.Add(column, of_pair(op.Mul(at_block, block)))
    return body.placed(op.Add(op.Mul(column, outputs), row), inputs["values"])


def _parts(body: _Body) -> tuple[ir.Value, ir.Value]:
    """Starts and counts of the parts that `ptr` bounds."""
    op, ptr = body.op, body.inputs["ptr"]
    start = op.Slice(ptr, *(body.constant([at], np.int64) for at in (0, -1)))
    stop = op.Slice(ptr, body.constant([1], np.int64), op.Shape(ptr))
    return start, op.Sub(stop, start)


def _decode_panel(body: _Body, variant: Variant) -> ir.Value:
    """See `sparsecomp.patterns.panel`, and `kernels.panel.weights` for the order of the values of a panel."""
    op, inputs, constant = body.op, body.inputs, body.constant
    start, count = _parts(body)
    columns = inputs["columns"]
    panel = body.owners(start, columns)

    def upright(values: ir.Value) -> ir.Value:
        return op.Reshape(values, constant([-1, 1], np.int64))

    first = op.Gather(start, panel, axis=0)
    step = op.Sub(body.range(body.int32(op.Size(columns))), first)
    lanes = np.arange(variant.v)
    base = upright(op.Add(op.Mul(first, constant(variant.v)), op.Mul(step, constant(variant.width))))
    part = op.Mul(upright(op.Gather(count, panel, axis=0)), constant(lanes // variant.width * variant.width))
    values = op.Gather(inputs["values"], op.Add(op.Add(base, part), constant(lanes % variant.width)), axis=0)

    panels = body.int32(op.Size(count))
    place = op.Cast(upright(op.Add(op.Mul(columns, panels), panel)), to=ir.DataType.INT64)
    one, wide = constant([1], np.int64), constant([variant.v], np.int64)
    width, outputs = (op.Cast(body.attribute(name), to=ir.DataType.INT64) for name in ("inputs", "outputs"))
    count64 = op.Size(count)
    rows = op.Reshape(op.Mul(width, count64), one)
    dense = op.ScatterND(body.zeros(op.Concat(rows, wide, axis=0), np.float32), place, values)
    padded = op.Reshape(op.Mul(count64, constant(variant.v, np.int64)), one)
    dense = op.Reshape(dense, op.Concat(op.Reshape(width, one), padded, axis=0))
    return op.Slice(dense, constant([0], np.int64), op.Reshape(outputs, one), constant([1], np.int64))


def _decode_gather(body: _Body, variant: Variant) -> ir.Value:
    """See `sparsecomp.patterns.gathered.GatherWeight`: zeros are padding, whose column means nothing."""
    op, inputs, constant = body.op, body.inputs, body.constant
    start, _ = _parts(body)
    group = constant(variant.v)
    row = body.owners(op.Mul(start, group), inputs["values"])
    outputs, width = (body.attribute(name) for name in ("outputs", "inputs"))
    place = op.Add(op.Mul(body.int32(inputs["columns"]), outputs), row)
    padding = op.Equal(inputs["values"], constant(0.0, np.float32))
    return body.placed(op.Where(padding, op.Mul(outputs, width), place), inputs["values"], spare=True)


def _decode_mask(body: _Body, variant: Variant) -> ir.Value:
    """See `sparsecomp.patterns.gathered.MaskWeight`: the values stand in the order of the bits that are set."""
    op, inputs, constant = body.op, body.inputs, body.constant
    words = op.Unsqueeze(body.int32(inputs["masks"]), constant([2], np.int64))
    bits = op.Mod(op.Div(words, constant(1 << np.arange(16))), constant(2))
    before = op.CumSum(body.flat(bits), constant(0), exclusive=1)
    # Where a bit is not set, this takes a value that is not used; there are some behind the last one.
    values = op.Reshape(op.Gather(inputs["values"], before, axis=0), op.Shape(bits))
    kept = op.Where(op.Equal(bits, constant(1)), values, constant(0.0, np.float32))
    by_row = op.Reshape(kept, constant([0, -1], np.int64))
    width = op.Reshape(op.Cast(body.attribute("inputs"), to=ir.DataType.INT64), constant([1], np.int64))
    by_row = op.Slice(by_row, constant([0], np.int64), width, constant([1], np.int64))
    return op.Transpose(by_row, perm=[1, 0])


def _decode_conv(body: _Body, variant: Variant) -> ir.Value:
    """See `sparsecomp.patterns.quads`: of every value its quad, from that its row and its column; zeros are padding."""
    op, inputs, constant = body.op, body.inputs, body.constant
    window = variant.window
    assert window is not None
    outputs, width, chunk, block, _ = (body.attribute(name) for name in variant.attributes)
    one, two, four = constant(1), constant(2), constant(4)
    value0, word0, shared = (op.Gather(inputs["quads"], constant(field), axis=1) for field in range(3))
    quad = body.owners(value0, inputs["values"])

    def of_quad(values: ir.Value) -> ir.Value:
        return op.Gather(values, quad, axis=0)

    place = op.Sub(body.range(body.int32(op.Size(inputs["values"]))), of_quad(value0))
    member, step = op.Mod(place, four), op.Div(place, four)
    shared4 = of_quad(op.Mul(shared, four))
    in_shared = op.Add(op.Mul(step, two), op.Div(member, two))
    at = op.Where(op.Less(place, op.Mul(shared4, two)), in_shared, op.Sub(place, shared4))
    column = body.int32(op.Gather(inputs["columns"], op.Add(of_quad(op.Mul(word0, four)), at), axis=0))
    field = op.Add(op.Add(op.Mul(quad, constant(8)), four), member)
    row = op.Gather(body.flat(inputs["quads"]), field, axis=0)

    # Quads stand group by group, in a group chunk by chunk, in a chunk block by block.
    def ceil_div(a: ir.Value, b: ir.Value) -> ir.Value:
        return op.Div(op.Sub(op.Add(a, b), one), b)

    starts = op.Slice(inputs["starts"], *(constant([place], np.int64) for place in (0, -1)))
    cell = body.owners(starts, value0)
    blocks = ceil_div(width, block)
    group_rows = op.Div(outputs, constant(window.groups))
    at_chunk, at_block = op.Div(cell, blocks), op.Mod(cell, blocks)
    chunks = ceil_div(group_rows, chunk)
    first_row = op.Add(op.Mul(op.Div(at_chunk, chunks), group_rows), op.Mul(op.Mod(at_chunk, chunks), chunk))
    row = op.Add(row, of_quad(first_row))
    column = op.Add(column, of_quad(op.Mul(at_block, block)))
    padding = op.Equal(inputs["values"], constant(0.0, np.float32))
    place = op.Where(padding, op.Mul(outputs, width), op.Add(op.Mul(row, width), column))
    dense = body.placed(place, inputs["values"], spare=True, shape=("outputs", "inputs"))
    kernel = window.kernel[2 - variant.rank :]
    return op.Reshape(dense, constant([0, -1, *kernel], np.int64))


def _convolved(body: _Body, weight: ir.Value, window: Window, variant: Variant) -> ir.Value:
    names = ("strides", window.stride), ("dilations", window.dilation), ("pads", window.padding)
    given: dict[str, Any] = {name: list(pair[2 - variant.rank :]) for name, pair in names}
    given["pads"] *= 2
    bias = [body.inputs["bias"]] if variant.bias else []
    return body.op.Conv(body.inputs["x"], weight, *bias, group=window.groups, **given)


def _window_title(window: Window, rank: int) -> str:
    first = 2 - rank
    parts = ["x".join(map(str, window.kernel[first:]))]
    pairs = (("S", window.stride, 1), ("P", window.padding, 0), ("D", window.dilation, 1))
    for letter, pair, usual in pairs:
        if any(size != usual for size in pair[first:]):
            parts.append(letter + "x".join(map(str, pair[first:])))
    return "".join((*parts, f"G{window.groups}" if window.groups > 1 else ""))


_DECODERS: dict[str, Callable[[_Body, Variant], ir.Value]] = {
    "rows": _decode_rows,
    "panel": _decode_panel,
    "gather": _decode_gather,
    "mask": _decode_mask,
    "conv": _decode_conv,
}
