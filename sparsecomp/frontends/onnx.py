"""The front end for ONNX: `build` overlays a `SparseGraph` on every graph of a model, those inside of nodes included.

Every value of a graph is an operation of its overlay. What a graph reads from around it is there as a constant or as an
input. Some operations stand for no value of the model: a bias that is written as a scalar, a transpose that
`Gemm` implies; `Derived` says how to make them when a site needs them.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from sparsecomp.frontends.onnx_constants import DTYPES, Constants, as_torch
from sparsecomp.frontends.onnx_groups import Group, constant_number, find_groups
from sparsecomp.frontends.onnx_padding import zeros_around, zeros_of
from sparsecomp.frontends.onnx_shapes import Shapes, ValueShape, all_graphs, subgraphs
from sparsecomp.ir import ACTIVATIONS, Operation, SparseGraph


@dataclass(frozen=True)
class Derived:
    """A value that the model does not have.

    Attributes:
        tensor: what it is, for a constant.
        transposed: of what it is the transpose, for a matrix that is computed.
    """

    tensor: npt.NDArray[Any] | None = None
    transposed: ir.Value | None = None


@dataclass
class Overlay:
    """A graph of a model and what is laid over it.

    Attributes:
        owner: the graph of the model.
        graph: the overlay.
        nodes: by the name of an operation the nodes that it stands for, the one that gives its value last.
    """

    owner: ir.Graph
    graph: SparseGraph = field(default_factory=SparseGraph)
    nodes: dict[str, tuple[ir.Node, ...]] = field(default_factory=dict)

    def origin(self, name: str) -> ir.Value | Derived:
        """What an operation stands for."""
        found: ir.Value | Derived = self.graph.operation(name).origin
        return found


def build(model: ir.Model, shapes: Shapes) -> list[Overlay]:
    """Overlay every graph of a model; functions are not looked into.

    Args:
        model: is not changed.
        shapes: of its values.

    Raises:
        IRError: nodes are not in an order in which they can run.
    """
    constants = Constants(model)
    overlays = []
    around: dict[ir.Graph, ChainMap[str, ValueShape]] = {model.graph: ChainMap()}
    for index, graph in enumerate(all_graphs(model.graph)):
        known = around[graph].new_child(shapes.graphs[index] if index < len(shapes.graphs) else {})
        around.update((inner, known) for node in graph for inner in subgraphs(node))
        overlays.append(_Builder(graph, known, constants, model.opset_imports.get("", 1)).build())
    return overlays


class _Builder:
    def __init__(self, graph: ir.Graph, shapes: Mapping[str, ValueShape], constants: Constants, opset: int) -> None:
        self._overlay = Overlay(graph)
        self._shapes, self._constants, self._opset = shapes, constants, opset
        self._names: dict[ir.Value, str] = {}
        self._groups = find_groups(graph)
        self._inner = {node for group in self._groups.values() for node in group.nodes[:-1]}

    def build(self) -> Overlay:
        graph = self._overlay.owner
        for index, value in enumerate(graph.inputs):
            self._add_input(value, index)
        for node in graph:
            # What is folded is added when something reads it.
            if node in self._inner or (node.outputs and all(map(self._constants.is_constant, node.outputs))):
                continue
            implicit = [value for sub in subgraphs(node) for value in _outer_values(sub)]
            operands = [value for value in (*node.inputs, *implicit) if value is not None]
            group = self._groups.get(node)
            for value in operands if group is None else [group.x]:
                self._operand(value)
            self._add_node(node, operands, group)
        outputs = tuple(self._operand(value) for value in graph.outputs)
        self._add(self._unique("output"), "output", inputs=tuple(dict.fromkeys(outputs)))
        return self._overlay

    # -- values ----------------------------------------------------------------------------------------------------

    def _operand(self, value: ir.Value) -> str:
        """The operation that gives a value; a constant, or a value from around the graph, is added when first read."""
        if value in self._names:
            return self._names[value]
        if self._constants.is_constant(value):
            return self._add_constant(value)
        return self._add_input(value, len(self._names))

    def _add_input(self, value: ir.Value, index: int) -> str:
        if value.name in self._overlay.owner.initializers:
            why = "an initializer that the caller may replace, since it is an input of the model too"
        elif value in self._overlay.owner.inputs:
            why = "an input of the model" if value.is_graph_input() else "given at each call"
        else:
            why = "computed in the graph around it"
        return self._value(value, "input", attrs={"index": index, "why": why})

    def _add_constant(self, value: ir.Value) -> str:
        array = self._constants.shape_and_type(value)
        path = self._constants.name(value)
        attrs: dict[str, Any] = {"index": -1, "path": _path(path)}
        tensor = self._constants.tensor(value)
        if tensor is not None:
            attrs["value"] = tensor
        name = self._unique(value.name or "constant")
        self._names[value] = name
        shape, dtype = array
        return self._add(name, "constant", attrs=attrs, shape=shape, dtype=dtype, origin=value)

    def _derive(self, name: str, array: npt.NDArray[Any], path: str = "") -> str:
        tensor = as_torch(array)
        attrs: dict[str, Any] = {"index": -1, "path": path} | ({} if tensor is None else {"value": tensor})
        dtype = None if tensor is None else tensor.dtype
        return self._add(
            self._unique(name), "constant", attrs=attrs, shape=array.shape, dtype=dtype, origin=Derived(tensor=array)
        )

    def _value(self, value: ir.Value, kind: str, **given: Any) -> str:
        name = self._unique(value.name or kind)
        self._names[value] = name
        shape = self._shapes.get(value.name or "")
        if shape is None:
            return self._add(name, kind, origin=value, **given)
        dtype = DTYPES.get(shape.dtype)
        return self._add(name, kind, shape=shape.hints, sizes=shape.sizes, dtype=dtype, origin=value, **given)

    def _add(self, name: str, kind: str, **given: Any) -> str:
        operation = Operation(name=name, kind=kind, **given)
        operation.dynamic = any(isinstance(size, str) for size in operation.sizes or ())
        self._overlay.graph.add(operation)
        return name

    def _unique(self, name: str) -> str:
        candidate, count = name, 1
        while candidate in self._overlay.graph:
            count += 1
            candidate = f"{name}~{count}"
        return candidate

    # -- nodes -----------------------------------------------------------------------------------------------------

    def _add_node(self, node: ir.Node, operands: list[ir.Value], group: Group | None) -> None:
        call = None
        if group is not None:
            call = _Call(group.kind, (self._operand(group.x),))
        elif len(node.outputs) >= 1 and (reader := _READERS.get((node.domain, node.op_type))) is not None:
            call = reader(self, node)
        names = tuple(dict.fromkeys(self._operand(value) for value in operands)) if group is None else ()
        for place, value in enumerate(node.outputs):
            if value in self._names:
                continue  # a constant that was folded for somebody who read it
            if call is not None and place == 0:
                inputs = (*call.inputs, *(name for name in names if name not in call.inputs and name not in call.hides))
                name = self._value(value, call.kind, inputs=inputs, attrs=call.attrs, module=_module(node))
                self._complete(self._overlay.graph.operation(name))
            else:
                name = self._value(value, "opaque", inputs=names, module=_module(node))
            self._overlay.nodes[name] = (node,) if group is None else group.nodes

    def _complete(self, operation: Operation) -> None:
        """Give dimensions that no inference knows, as in the body of a loop, those of the operand behind them."""
        operands = [self._overlay.graph.operation(name) for name in operation.inputs]
        sizes = list(operation.sizes or ())
        if operation.kind == "matmul" and len(operands[1].shape) == 2:
            source, count = operands[0], len(sizes) - 1
        elif operation.kind in _UNARY or (operation.kind == "add" and operands[1].shape == operation.shape[-1:]):
            source, count = operands[0], len(sizes)
        else:
            return
        if len(source.shape) == len(sizes):
            for place in range(count):
                if str(sizes[place]).startswith("?"):
                    sizes[place] = (source.sizes or ())[place]
            operation.sizes = tuple(sizes)
            operation.shape = tuple(
                size if isinstance(size, int) else hint for size, hint in zip(sizes, operation.shape, strict=True)
            )

    def operation(self, value: ir.Value) -> Operation:
        """The operation of a value."""
        return self._overlay.graph.operation(self._operand(value))

    def read_matmul(self, node: ir.Node) -> _Call | None:
        left, right = node.inputs[:2]
        if left is None or right is None:
            return None
        if self._constants.is_constant(left) and not self._constants.is_constant(right):
            found = self._on_the_left(left, right)
            if found is not None:
                return found
        flat = self._as_matrix(right, len(self.operation(left).shape))
        hides = () if flat is None else (self._operand(right),)
        return _Call("matmul", (self._operand(left), flat or self._operand(right)), hides=hides)

    def _as_matrix(self, weight: ir.Value, rank: int) -> str | None:
        """A constant `[1, ..., I, O]` as the matrix that it is beside an operand of as many dimensions or more."""
        if not self._constants.is_constant(weight):
            return None
        shape = self._constants.shape_and_type(weight)[0]
        if not 2 < len(shape) <= rank or any(size != 1 for size in shape[:-2]):
            return None
        array = self._constants.array(weight)
        assert array is not None
        return self._derive(f"{weight.name}~matrix", array.reshape(shape[-2:]), _path(self._constants.name(weight)))

    def _on_the_left(self, weight: ir.Value, x: ir.Value) -> _Call | None:
        """`W @ x` with x of `[N, I, L]`: a convolution over L with windows of one, whose channels come first."""
        shape, dtype = self._constants.shape_and_type(weight)
        array = self._constants.array(weight) if len(shape) == 2 and dtype == torch.float32 else None
        if array is None or len(self.operation(x).shape) != 3:
            return None
        derived = self._derive(f"{weight.name}~kernel", array[:, :, None], _path(self._constants.name(weight)))
        attrs = {"function": "conv1d", "stride": (1,), "padding": (0,), "dilation": (1,), "groups": 1}
        return _Call("conv", (self._operand(x), derived), attrs, hides=(self._operand(weight),))

    def read_gemm(self, node: ir.Node) -> _Call | None:
        """`alpha * A' @ B' + beta * C` as a product of constants that alpha and beta are folded into."""
        a, b = node.inputs[:2]
        c = node.inputs[2] if len(node.inputs) > 2 else None
        alpha, beta = (node.attributes.get_float(name, 1.0) for name in ("alpha", "beta"))
        trans_a, trans_b = (node.attributes.get_int(name, 0) for name in ("transA", "transB"))
        if a is None or b is None or not self._constants.is_constant(b):
            return None
        hides = [self._operand(value) for value in (a, b, c) if value is not None]
        x, weight = self._operand(a), self._operand(b)
        if alpha != 1.0:
            array = self._constants.array(b)
            if array is None:
                return None
            path = self._overlay.graph.operation(weight).attrs["path"]
            weight = self._derive(f"{weight}~alpha", array * np.float32(alpha), path)
        if trans_b:
            weight = self._transposed(weight, None)
        if trans_a:
            x = self._transposed(x, a)
        if c is None or beta == 0.0:
            return _Call("matmul", (x, weight), hides=tuple(hides))
        outputs = self._overlay.graph.operation(weight).shape[-1:]
        bias = self._bias(c, outputs[0] if outputs else 0, 2, float(beta or 0.0))
        if bias is None:
            if beta != 1.0:
                return None
            bias = self._operand(c)
        return _Call("addmm", (bias, x, weight), hides=tuple(hides))

    def _transposed(self, name: str, value: ir.Value | None) -> str:
        source = self._overlay.graph.operation(name)
        origin = None if value is None else Derived(transposed=value)
        return self._add(
            self._unique(f"{name}~T"),
            "transpose",
            inputs=(name,),
            attrs={"permutation": (1, 0)},
            shape=source.shape[::-1],
            sizes=(source.sizes or ())[::-1],
            dtype=source.dtype,
            origin=origin,
        )

    def _bias(self, value: ir.Value, count: int, rank: int, scale: float = 1.0) -> str | None:
        """A constant that is added to `[..., count]` as a vector of that length, None if it is no such constant."""
        if not self._constants.is_constant(value):
            return None
        shape, dtype = self._constants.shape_and_type(value)
        if dtype != torch.float32 or len(shape) > rank or any(size != 1 for size in shape[:-1]):
            return None
        if shape[-1:] == (count,) and len(shape) == 1 and scale == 1.0:
            return self._operand(value)
        array = self._constants.array(value)
        if array is None or array.size not in (1, count):
            return None
        return self._derive(
            f"{value.name}~bias", np.broadcast_to(array.reshape(-1) * np.float32(scale), (count,)).copy()
        )

    def read_add(self, node: ir.Node) -> _Call | None:
        if len(node.inputs) != 2 or (node.op_type == "Add" and self._opset < 7):
            return None
        left, right = node.inputs
        if left is None or right is None:
            return None
        for product, other in ((left, right), (right, left)):
            source = product.producer()
            if source is not None and source.op_type in ("MatMul", "Gemm"):
                operation = self.operation(product)
                if operation.kind != "conv" and operation.shape and isinstance((operation.sizes or ())[-1], int):
                    bias = self._bias(other, operation.shape[-1], len(operation.shape))
                    if bias is not None:
                        return _Call("add", (self._operand(product), bias), hides=(self._operand(other),))
        return _Call("add", (self._operand(left), self._operand(right)))

    def read_mul(self, node: ir.Node) -> _Call | None:
        left, right = node.inputs
        if left is None or right is None or any(map(self._constants.is_constant, (left, right))):
            return None
        return _Call("mul", (self._operand(left), self._operand(right)))

    def read_conv(self, node: ir.Node) -> _Call | None:
        x, weight = node.inputs[:2]
        if x is None or weight is None:
            return None
        kernel = self.operation(weight).shape[2:]
        dims = len(kernel)
        stride, dilation = (
            tuple(int(size) for size in node.attributes.get_ints(name, [1] * dims) or ())
            for name in ("strides", "dilations")
        )
        padding = zeros_around(node, (self.operation(x).sizes or ())[2:], (kernel, stride, dilation))
        if dims not in (1, 2) or padding is None:
            return None
        inputs = [self._operand(value) for value in node.inputs if value is not None]
        hides: tuple[str, ...] = ()
        before, after = padding[:dims], padding[dims:]
        if before != after:
            hides = (inputs[0],)
            inputs[0] = self._padded(inputs[0], tuple(b - a for a, b in zip(before, after, strict=True)))
        attrs = {
            "function": f"conv{dims}d",
            "stride": stride,
            "padding": before,
            "dilation": dilation,
            "groups": node.attributes.get_int("group", 1),
        }
        return _Call("conv", tuple(inputs), attrs, hides)

    def _padded(self, name: str, behind: tuple[int, ...]) -> str:
        """Maps with more zeros behind: what the detection of convolutions takes into their window."""
        source = self._overlay.graph.operation(name)
        grown = (0, 0, *behind)
        return self._add(
            self._unique(f"{name}~pad"),
            "pad",
            inputs=(name,),
            attrs={"amounts": tuple(size for extra in reversed(behind) for size in (0, extra))},
            shape=tuple(size + more for size, more in zip(source.shape, grown, strict=True)),
            sizes=tuple(
                size + more if isinstance(size, int) else f"{size}+{more}" if more else size
                for size, more in zip(source.sizes or (), grown, strict=True)
            ),
            dtype=source.dtype,
            origin=Derived(),
        )

    def read_pad(self, node: ir.Node) -> _Call | None:
        """Zeros around maps, of a constant number."""
        x = node.inputs[0]
        if x is None:
            return None
        pads = zeros_of(node, self._opset, self._constants)
        rank = len(self.operation(x).shape)
        if pads is None or len(pads) != 2 * rank:
            return None
        others = (operand for operand in node.inputs[1:] if operand is not None)
        amounts = tuple(int(size) for axis in reversed(range(rank)) for size in (pads[axis], pads[rank + axis]))
        return _Call("pad", (self._operand(x),), {"amounts": amounts}, tuple(self._operand(other) for other in others))

    def read_batch_norm(self, node: ir.Node) -> _Call | None:
        if len(node.outputs) != 1 or (node.attributes.get_int("training_mode") or 0) != 0 or len(node.inputs) < 5:
            return None
        x, scale, bias, mean, variance = (None if value is None else self._operand(value) for value in node.inputs[:5])
        if x is None or scale is None or bias is None or mean is None or variance is None:
            return None
        attrs = {"affine": (True, True), "eps": node.attributes.get_float("epsilon", 1e-5)}
        return _Call("batch_norm", (x, mean, variance, scale, bias), attrs)

    def read_transpose(self, node: ir.Node) -> _Call | None:
        source = node.inputs[0]
        if source is None:
            return None
        rank = len(self.operation(source).shape)
        order = node.attributes.get_ints("perm", list(range(rank))[::-1]) or []
        return _Call("transpose", (self._operand(source),), {"permutation": tuple(int(place) for place in order)})

    def read_clip(self, node: ir.Node) -> _Call | None:
        if self._opset < 11:
            low, high = (node.attributes.get_float(name, None) for name in ("min", "max"))
        else:
            low, high = (constant_number(node.inputs[place]) if place < len(node.inputs) else None for place in (1, 2))
        if (low, high) != (0.0, 6.0) or node.inputs[0] is None:
            return None
        hides = tuple(self._operand(value) for value in node.inputs[1:] if value is not None)
        return _Call("relu6", (self._operand(node.inputs[0]),), hides=hides)

    def read_gelu(self, node: ir.Node) -> _Call | None:
        form = node.attributes.get_string("approximate", "none")
        kind = {"none": "gelu", "tanh": "gelu_tanh"}.get(form or "none")
        return None if kind is None else _plain(kind)(self, node)

    def read_swish(self, node: ir.Node) -> _Call | None:
        return _plain("silu")(self, node) if node.attributes.get_float("alpha", 1.0) == 1.0 else None

    def read_dropout(self, node: ir.Node) -> _Call | None:
        training = node.inputs[2] if len(node.inputs) > 2 else None
        if len(node.outputs) > 1 or (training is not None and constant_number(training) != 0.0):
            return None
        return _plain("identity")(self, node)

    def read_cast(self, node: ir.Node) -> _Call | None:
        source, to = node.inputs[0], node.attributes.get_int("to", 0)
        dtype = None if source is None else self.operation(source).dtype
        same = dtype is not None and to in DTYPES and DTYPES[ir.DataType(to)] == dtype
        return _plain("identity")(self, node) if same else None


@dataclass(frozen=True)
class _Call:
    """A node in canonical terms; `hides` are inputs of the node that other operations stand for."""

    kind: str
    inputs: tuple[str, ...]
    attrs: dict[str, Any] = field(default_factory=dict)
    hides: tuple[str, ...] = ()


def _plain(kind: str) -> Callable[[_Builder, ir.Node], _Call | None]:
    def read(builder: _Builder, node: ir.Node) -> _Call | None:
        source = node.inputs[0] if len(node.inputs) == 1 or kind == "identity" else None
        return None if source is None else _Call(kind, (builder._operand(source),))

    return read


def _outer_values(graph: ir.Graph) -> list[ir.Value]:
    """What a graph, or one inside of it, reads from around it."""
    inside: set[ir.Value] = set()
    read: dict[ir.Value, None] = {}
    for inner in all_graphs(graph):
        inside.update(inner.inputs, inner.initializers.values(), (value for node in inner for value in node.outputs))
        read.update(dict.fromkeys(value for node in inner for value in node.inputs if value is not None))
        read.update(dict.fromkeys(inner.outputs))
    return [value for value in read if value not in inside]


def _path(name: str) -> str:
    """The name of a constant as a qualified name; "" for one that an exporter made up."""
    made_up = name.startswith("onnx::") or not any(letter.isalpha() for letter in name) or "Constant_output" in name
    return "" if made_up else name


def _module(node: ir.Node) -> str:
    """The module that a node was in, as PyTorch's exporter writes it: `/encoder/layer.0/query/MatMul`."""
    owner, _, leaf = (node.name or "").strip("/").rpartition("/")
    return owner.replace("/", ".") if leaf.startswith(node.op_type) else ""


_UNARY = frozenset({"identity", *ACTIVATIONS})

_READERS: dict[tuple[str, str], Callable[[_Builder, ir.Node], _Call | None]] = {
    ("", "MatMul"): _Builder.read_matmul,
    ("", "Gemm"): _Builder.read_gemm,
    ("", "Conv"): _Builder.read_conv,
    ("", "Pad"): _Builder.read_pad,
    ("", "BatchNormalization"): _Builder.read_batch_norm,
    ("", "Add"): _Builder.read_add,
    ("", "Sum"): _Builder.read_add,
    ("", "Mul"): _Builder.read_mul,
    ("", "Transpose"): _Builder.read_transpose,
    ("", "Clip"): _Builder.read_clip,
    ("", "Gelu"): _Builder.read_gelu,
    ("com.microsoft", "Gelu"): _plain("gelu"),
    ("com.microsoft", "FastGelu"): _plain("gelu_tanh"),
    ("", "Swish"): _Builder.read_swish,
    ("", "Relu"): _plain("relu"),
    ("", "HardSwish"): _plain("hardswish"),
    ("", "Identity"): _plain("identity"),
    ("", "Dropout"): _Builder.read_dropout,
    ("", "Cast"): _Builder.read_cast,
}
