"""Models in float16, computed in float32: what ONNX Runtime does on x86 too, where its products have no float16 form.

It casts what such a model is given, folds the weights to float32 when a session is made, and takes as long as for the
same model in float32 (four products of 768 x 768 with 128 tokens on a Zen 5, ONNX Runtime 1.32: 2.32 ms both). So the
graph is written in float32 here, with casts at its inputs and outputs and behind its weights, which stay float16 in the
file where nothing takes their place.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sparsecomp.frontends.onnx_apply import Rewriter
from sparsecomp.frontends.onnx_fallback import OLDEST_OPSET
from sparsecomp.frontends.onnx_shapes import all_graphs
from sparsecomp.log import log

_HALF, _SINGLE = ir.DataType.FLOAT16, ir.DataType.FLOAT
_HOLDERS = frozenset({"Constant", "ConstantOfShape"})
_NAMES_OF_TYPES = frozenset({"dtype", "output_dtype", "stash_type", "precision", "softmax_precision"})
_PLAIN = frozenset({ir.AttributeType.FLOAT, ir.AttributeType.FLOATS, ir.AttributeType.INTS, ir.AttributeType.STRING})
_GRAPHS = frozenset({ir.AttributeType.STRINGS, ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS})


def widen(model: ir.Model) -> bool:
    """Write a model with float16 values in float32, in place; its inputs and outputs keep their types.

    Args:
        model: without functions.

    Returns:
        Whether it was: not a model without float16, nor one with operations that may mean something else in float32.
    """
    graphs, opset = [*all_graphs(model.graph)], model.opset_imports.get("", 1)
    if opset < OLDEST_OPSET or not any(_has_half(graph) for graph in graphs):
        return False
    reason = next((found for graph in graphs if (found := _why_not(graph)) is not None), None)
    if reason is not None:
        log.info("the model stays in float16: %s", reason)
        return False
    rewriter = Rewriter(model, opset)
    ends = [value for value in model.graph.outputs if value.dtype == _HALF]
    for graph in graphs:
        given = [*graph.initializers.values(), *(graph.inputs if graph is model.graph else ())]
        first = graph[0] if len(graph) else None
        for value in (*graph.inputs, *(value for node in graph for value in node.outputs)):
            if value.dtype == _HALF and value not in given:
                value.type = ir.TensorType(_SINGLE)
        for node in graph:
            _widen_attributes(node)
        for value in dict.fromkeys(given):
            if value.dtype == _HALF and first is not None:
                _cast_behind(value, first, rewriter)
    for value in ends:
        _cast_before(model.graph, value, rewriter)
    return True


def _has_half(graph: ir.Graph) -> bool:
    if any(value.dtype == _HALF for value in (*graph.inputs, *graph.initializers.values())):
        return True
    return any(_holds_half(node) or _casts_to_half(node) for node in graph)


def _holds_half(node: ir.Node) -> bool:
    value = node.attributes.get("value")
    tensor = value is not None and not value.is_ref() and value.type == ir.AttributeType.TENSOR
    return tensor and value is not None and value.as_tensor().dtype == _HALF


def _casts_to_half(node: ir.Node) -> bool:
    return node.op_type == "Cast" and node.attributes.get_int("to", 0) == int(_HALF)


def _why_not(graph: ir.Graph) -> str | None:
    """What is not known to be the same in float32."""
    for node in graph:
        if node.domain != "":
            return f"{node.op_type} of {node.domain}"
        for name, attribute in node.attributes.items():
            number = not attribute.is_ref() and attribute.type == ir.AttributeType.INT
            plain = number and not (name in _NAMES_OF_TYPES and attribute.as_int() == int(_HALF))
            held = node.op_type in _HOLDERS and attribute.type == ir.AttributeType.TENSOR
            if attribute.is_ref() or not (plain or held or attribute.type in _PLAIN | _GRAPHS):
                return f"{name!r} of {node.op_type}"
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        if value.type is not None and not isinstance(value.type, ir.TensorType):
            return f"{value.name} is no tensor"
        if value.dtype == _HALF and value.is_graph_output() and value.producer() is None:
            return f"output {value.name} is an input or constant"
    return None


def _widen_attributes(node: ir.Node) -> None:
    if _casts_to_half(node):
        node.attributes["to"] = ir.AttrInt64("to", int(_SINGLE))
    if node.op_type in _HOLDERS and _holds_half(node):
        tensor = node.attributes["value"].as_tensor()
        node.attributes["value"] = ir.AttrTensor(
            "value", ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)
        )


def _cast_behind(value: ir.Value, first: ir.Node, rewriter: Rewriter) -> None:
    """Let all that reads a value of float16 read it in float32."""
    uses = [*value.uses()]
    if not uses:
        return
    node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(_SINGLE))])
    new = node.outputs[0]
    new.name, new.type = rewriter.unique(f"{value.name}.single"), ir.TensorType(_SINGLE)
    for use in uses:
        use.node.replace_input_with(use.idx, new)
    assert first.graph is not None
    first.graph.insert_before(first, node)


def _cast_before(graph: ir.Graph, value: ir.Value, rewriter: Rewriter) -> None:
    """Give an output in float16 under its name."""
    name = value.name
    value.name = rewriter.unique(f"{name}.single")
    node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(_HALF))])
    new = node.outputs[0]
    new.name, new.type, new.shape = name, ir.TensorType(_HALF), value.shape
    for place, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[place] = new
    graph.append(node)
