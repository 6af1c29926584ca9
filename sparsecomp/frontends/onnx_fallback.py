"""The operations of `ai.sparsecomp` in standard ONNX: a model-local function for each, which unpacks its weight.

A run time without the native library inlines the function and folds all that depends on constants, so that one dense
product is left; the reference evaluator and viewers read it as it is. From opset 16 on a function decodes the packed
arrays by themselves. Older opsets lack the operations for that: there the node also brings the places of its values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from sparsecomp.frontends.onnx_body import Body
from sparsecomp.runtime.ort_library import DOMAIN
from sparsecomp.window import Window

DECODING_OPSET = 16
"""From this opset on a function decodes the packed arrays; below it takes `index` and `shape` instead."""
SCATTER_OPSET = 11
"""From this opset on `index` says where every value goes; below it where every entry of the weight comes from."""
FULL_OPSET = 12
"""From this opset on a function decodes a dense weight in panels."""
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
    "rows": ("values", "columns", "quads", "starts"),
    "panel": ("values", "columns", "ptr"),
    "gather": ("values", "columns", "ptr"),
    "mask": ("values", "masks", "ptr"),
    "conv": ("values", "columns", "quads", "starts"),
    "full": ("values",),
}
_EASIEST = ("full", "panel", "gather", "mask", "rows", "conv")
_ATTRIBUTES = {
    "rows": ("outputs", "inputs", "chunk", "block"),
    "conv": ("outputs", "inputs", "chunk", "block", "vectors"),
}
_SIZES = ("outputs", "inputs")
CHOICE = "choice"
"""Input with several forms: int32 `[ranges, 2]`, up to so many tokens the number of the form; read by the library."""
INDEXED = ("index", "shape")
"""Inputs of the form for old opsets: int32, see `index_of`; int64, the shape that the weight has in ONNX."""


@dataclass(frozen=True)
class Form:
    """A packed form of a weight.

    Attributes:
        family: of kernels: `rows`, `panel`, `gather`, `mask`, `conv`, or `full`, a dense weight in panels.
        v: rows of a panel, entries of a group (gather), else 1.
        width: rows of a panel whose values lie together (panel), else 1.
    """

    family: str
    v: int = 1
    width: int = 1

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of its arrays, in order."""
        return _WEIGHTS[self.family]

    @property
    def title(self) -> str:
        """Its part of the name of an operation."""
        by = f"By{self.width}" if self.width > 1 and self.width != self.v else ""
        return f"{self.family.title()}{self.v if self.v > 1 else ''}{by}"


@dataclass(frozen=True)
class Variant:
    """An operation of the domain; equal ones share a function and an entry of the library.

    Attributes:
        forms: of the weight; with several the node brings a table of which to use at how many tokens.
        activation: as in `sparsecomp.ir.ACTIVATIONS`.
        bias: whether a bias is added.
        residual: whether a residual is added last.
        indexed: whether the node brings the places of its values, for old opsets.
        residual_first: whether the residual is added before the activation.
        window: of a convolution.
        rank: dimensions of its maps, 1 or 2.
    """

    forms: tuple[Form, ...]
    activation: str
    bias: bool
    residual: bool
    indexed: bool = False
    residual_first: bool = False
    window: Window | None = None
    rank: int = 2

    @property
    def decoded(self) -> Form:
        """The form that the function unpacks: the one that is unpacked with the least work."""
        return min(self.forms, key=lambda form: _EASIEST.index(form.family))

    @property
    def name(self) -> str:
        """Type of the operation: a name of its own for every variant, since overloads of functions are not safe."""
        if self.window is None:
            form = "Linear" + "".join(form.title for form in self.forms)
        else:
            form = f"Conv{self.rank}d{_window_title(self.window, self.rank)}"
        after = [_TITLES[self.activation], "Add" if self.residual else ""]
        parts = (form, "Indexed" if self.indexed else "", "Bias" if self.bias else "")
        return "".join((*parts, *(reversed(after) if self.residual_first else after)))

    def arrays(self, form: Form) -> tuple[str, ...]:
        """Names of the inputs that hold the arrays of a form, in order."""
        prefix = f"{form.family}_" if len(self.forms) > 1 else ""
        return tuple(prefix + name for name in form.arrays)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs, in order."""
        operands = ("x", *(("bias",) if self.bias else ()), *(("residual",) if self.residual else ()))
        choice = (CHOICE,) if len(self.forms) > 1 else ()
        arrays = (name for form in self.forms for name in self.arrays(form))
        return (*operands, *choice, *arrays, *(INDEXED if self.indexed else ()))

    @property
    def attributes(self) -> tuple[str, ...]:
        """Names of the attributes, all int64."""
        return next((_ATTRIBUTES[form.family] for form in self.forms if form.family in _ATTRIBUTES), _SIZES)


def function(variant: Variant, opset: int) -> ir.Function:
    """The model-local function of a variant.

    Args:
        variant: says what is computed.
        opset: of the model, which the function imports too.
    """
    inputs = {name: ir.Value(name=name) for name in variant.inputs}
    body = Body(dict(inputs), opset)
    form = variant.decoded
    body.inputs.update({plain: inputs[name] for plain, name in zip(form.arrays, variant.arrays(form), strict=True)})
    weight = _scattered(body) if variant.indexed else _DECODERS[form.family](body, variant)
    y = _product(body, weight, variant)
    y.name = "y"
    for index, node in enumerate(body.op.nodes):
        for value in node.outputs:
            value.name = value.name or f"v{index}"
    graph = ir.Graph(list(inputs.values()), [y], nodes=body.op.nodes, opset_imports={"": opset}, name=variant.name)
    attributes = [ir.Attr(name, ir.AttributeType.INT, None) for name in variant.attributes]
    return ir.Function(DOMAIN, variant.name, "", graph=graph, attributes=attributes)


def product_nodes(inputs: dict[str, ir.Value], weight: ir.Value, variant: Variant, opset: int) -> Sequence[ir.Node]:
    """The nodes that compute a variant from a dense weight, the one that gives the result last."""
    body = Body(inputs, opset)
    _product(body, weight, variant)
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


def _scattered(body: Body) -> ir.Value:
    """The weight `[I, O]`, or that of a convolution, for old opsets."""
    op, index, shape, values = body.op, *(body.inputs[name] for name in (*INDEXED, "values"))
    if body.opset < SCATTER_OPSET:
        values = op.Concat(body.constant([0.0], np.float32), values, axis=0)
        return op.Reshape(op.Gather(values, index, axis=0), shape)
    zeros = body.zeros(op.ReduceProd(shape, axes=[0], keepdims=1), np.float32)
    return op.Reshape(op.ScatterElements(zeros, index, values, axis=0), shape)


def _product(body: Body, weight: ir.Value, variant: Variant) -> ir.Value:
    """The product with a weight, and what follows it."""
    op, inputs = body.op, body.inputs
    if variant.window is not None:
        y = _convolved(body, weight, variant.window, variant)
    else:
        y = op.MatMul(inputs["x"], weight)
        y = op.Add(y, inputs["bias"]) if variant.bias else y
    if variant.residual and variant.residual_first:
        y = op.Add(y, inputs["residual"])
    y = body.activated(y, variant.activation)
    if variant.residual and not variant.residual_first:
        y = op.Add(y, inputs["residual"])
    return y


def _decode_rows(body: Body, variant: Variant) -> ir.Value:
    op = body.op
    outputs, width, chunk, block = (body.attribute(name) for name in variant.attributes)
    row, column, padding = _decode_quads(body, (outputs, width), (chunk, block), 1)
    place = op.Where(padding, op.Mul(outputs, width), op.Add(op.Mul(column, outputs), row))
    return body.placed(place, body.inputs["values"], spare=True)


def _decode_quads(
    body: Body, shape: tuple[ir.Value, ir.Value], sizes: tuple[ir.Value, ir.Value], groups: int
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Row and column of every value, and whether it is padding (a zero), whose place means nothing.

    See `sparsecomp.patterns.quads`: of every value its quad, from that its row and its column.

    Args:
        body: of the function.
        shape: (O, K) of the weight.
        sizes: rows of a chunk, columns of a block.
        groups: of rows.
    """
    op, inputs, constant = body.op, body.inputs, body.constant
    (outputs, width), (chunk, block) = shape, sizes
    one, two, four, eight = constant(1), constant(2), constant(4), constant(8)
    value0, word0, shared = (op.Gather(inputs["quads"], constant(field), axis=1) for field in range(3))
    quad = body.owners(value0, inputs["values"])

    def of_quad(values: ir.Value) -> ir.Value:
        return op.Gather(values, quad, axis=0)

    place = op.Sub(body.range(body.int32(op.Size(inputs["values"]))), of_quad(value0))
    member, step = op.Mod(place, four), op.Div(place, four)
    shared4 = of_quad(op.Mul(shared, four))
    in_shared = op.Add(op.Mul(step, two), op.Div(member, two))
    # Columns of their own begin a word of eight; a shared half word is four columns and eight values.
    own = op.Add(op.Sub(place, op.Mul(shared4, two)), of_quad(op.Mul(op.Div(op.Add(shared, one), two), eight)))
    at = op.Where(op.Less(place, op.Mul(shared4, two)), in_shared, own)
    column = body.int32(op.Gather(inputs["columns"], op.Add(of_quad(op.Mul(word0, eight)), at), axis=0))
    field = op.Add(op.Add(op.Mul(quad, eight), four), member)
    row = op.Gather(body.flat(inputs["quads"]), field, axis=0)

    # Quads stand group by group, in a group chunk by chunk, in a chunk block by block.
    def ceil_div(a: ir.Value, b: ir.Value) -> ir.Value:
        return op.Div(op.Sub(op.Add(a, b), one), b)

    starts = op.Slice(inputs["starts"], *(constant([place], np.int64) for place in (0, -1)))
    cell = body.owners(starts, value0)
    blocks = ceil_div(width, block)
    group_rows = op.Div(outputs, constant(groups))
    at_chunk, at_block = op.Div(cell, blocks), op.Mod(cell, blocks)
    chunks = ceil_div(group_rows, chunk)
    first_row = op.Add(op.Mul(op.Div(at_chunk, chunks), group_rows), op.Mul(op.Mod(at_chunk, chunks), chunk))
    row = op.Add(row, of_quad(first_row))
    column = op.Add(column, of_quad(op.Mul(at_block, block)))
    return row, column, op.Equal(inputs["values"], constant(0.0, np.float32))


def _parts(body: Body) -> tuple[ir.Value, ir.Value]:
    """Starts and counts of the parts that `ptr` bounds."""
    op, ptr = body.op, body.inputs["ptr"]
    start = op.Slice(ptr, *(body.constant([at], np.int64) for at in (0, -1)))
    stop = op.Slice(ptr, body.constant([1], np.int64), op.Shape(ptr))
    return start, op.Sub(stop, start)


def _decode_panel(body: Body, variant: Variant) -> ir.Value:
    """See `sparsecomp.patterns.panel`, and `kernels.panel.weights` for the order of the values of a panel."""
    op, inputs, constant = body.op, body.inputs, body.constant
    v, together = variant.decoded.v, variant.decoded.width
    start, count = _parts(body)
    columns = inputs["columns"]
    panel = body.owners(start, columns)

    def upright(values: ir.Value) -> ir.Value:
        return op.Reshape(values, constant([-1, 1], np.int64))

    first = op.Gather(start, panel, axis=0)
    step = op.Sub(body.range(body.int32(op.Size(columns))), first)
    lanes = np.arange(v)
    base = upright(op.Add(op.Mul(first, constant(v)), op.Mul(step, constant(together))))
    part = op.Mul(upright(op.Gather(count, panel, axis=0)), constant(lanes // together * together))
    values = op.Gather(inputs["values"], op.Add(op.Add(base, part), constant(lanes % together)), axis=0)

    panels = body.int32(op.Size(count))
    place = op.Cast(upright(op.Add(op.Mul(columns, panels), panel)), to=ir.DataType.INT64)
    one, wide = constant([1], np.int64), constant([v], np.int64)
    width, outputs = _lengths(body)
    count64 = op.Size(count)
    rows = op.Mul(width, op.Reshape(count64, one))
    dense = op.ScatterND(body.zeros(op.Concat(rows, wide, axis=0), np.float32), place, values)
    padded = op.Reshape(op.Mul(count64, constant(v, np.int64)), one)
    dense = op.Reshape(dense, op.Concat(width, padded, axis=0))
    return op.Slice(dense, constant([0], np.int64), outputs, constant([1], np.int64))


def _lengths(body: Body) -> tuple[ir.Value, ir.Value]:
    """Inputs and outputs as int64 `[1]`."""
    op, one = body.op, body.constant([1], np.int64)
    width, outputs = (
        op.Reshape(op.Cast(body.attribute(name), to=ir.DataType.INT64), one) for name in ("inputs", "outputs")
    )
    return width, outputs


def _decode_full(body: Body, variant: Variant) -> ir.Value:
    """Panels that keep every column: the values `[panels, I, V]` in another order."""
    op = body.op
    zero, any_size, one, wide = (body.constant([number], np.int64) for number in (0, -1, 1, variant.decoded.v))
    width, outputs = _lengths(body)
    panels = op.Reshape(body.inputs["values"], op.Concat(any_size, width, wide, axis=0))
    dense = op.Reshape(op.Transpose(panels, perm=[1, 0, 2]), op.Concat(width, any_size, axis=0))
    return op.Slice(dense, zero, outputs, one)


def _decode_gather(body: Body, variant: Variant) -> ir.Value:
    """See `sparsecomp.patterns.gathered.GatherWeight`: zeros are padding, whose column means nothing."""
    op, inputs, constant = body.op, body.inputs, body.constant
    start, _ = _parts(body)
    group = constant(variant.decoded.v)
    row = body.owners(op.Mul(start, group), inputs["values"])
    outputs, width = (body.attribute(name) for name in ("outputs", "inputs"))
    place = op.Add(op.Mul(body.int32(inputs["columns"]), outputs), row)
    padding = op.Equal(inputs["values"], constant(0.0, np.float32))
    return body.placed(op.Where(padding, op.Mul(outputs, width), place), inputs["values"], spare=True)


def _decode_mask(body: Body, variant: Variant) -> ir.Value:
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


def _decode_conv(body: Body, variant: Variant) -> ir.Value:
    op, inputs, constant = body.op, body.inputs, body.constant
    window = variant.window
    assert window is not None
    outputs, width, chunk, block, _ = (body.attribute(name) for name in variant.attributes)
    row, column, padding = _decode_quads(body, (outputs, width), (chunk, block), window.groups)
    place = op.Where(padding, op.Mul(outputs, width), op.Add(op.Mul(row, width), column))
    dense = body.placed(place, inputs["values"], spare=True, shape=("outputs", "inputs"))
    kernel = window.kernel[2 - variant.rank :]
    return op.Reshape(dense, constant([0, -1, *kernel], np.int64))


def _convolved(body: Body, weight: ir.Value, window: Window, variant: Variant) -> ir.Value:
    names = ("strides", window.stride), ("dilations", window.dilation), ("pads", window.padding)
    given: dict[str, Any] = {name: list(pair[2 - variant.rank :]) for name, pair in names}
    behind = zip(given["pads"], window.extra[2 - variant.rank :], strict=True)
    given["pads"] = given["pads"] + [padding + extra for padding, extra in behind]
    bias = [body.inputs["bias"]] if variant.bias else []
    return body.op.Conv(body.inputs["x"], weight, *bias, group=window.groups, **given)


def _window_title(window: Window, rank: int) -> str:
    first = 2 - rank
    parts = ["x".join(map(str, window.kernel[first:]))]
    pairs = (("S", window.stride, 1), ("P", window.padding, 0), ("E", window.extra, 0), ("D", window.dilation, 1))
    for letter, pair, usual in pairs:
        if any(size != usual for size in pair[first:]):
            parts.append(letter + "x".join(map(str, pair[first:])))
    return "".join((*parts, f"G{window.groups}" if window.groups > 1 else ""))


_DECODERS: dict[str, Callable[[Body, Variant], ir.Value]] = {
    "rows": _decode_rows,
    "panel": _decode_panel,
    "gather": _decode_gather,
    "mask": _decode_mask,
    "conv": _decode_conv,
    "full": _decode_full,
}
