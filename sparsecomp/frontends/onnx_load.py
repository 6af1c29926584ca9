"""Read an ONNX model that need not be trusted."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from sparsecomp.runtime.ort_library import DOMAIN

MOST_NODES = 2_000_000
"""Nodes of a model with its functions inlined, at most: a few that call each other may stand for very many."""
_OPTIONAL_INPUTS = 4  # IR version from which on an initializer need not be an input


def load(source: str | os.PathLike[str] | onnx.ModelProto | ir.Model) -> ir.Model:
    """Read a model and bring it into the form that the front end takes.

    Functions are inlined, as ONNX Runtime does when it loads a model. In models so old that every initializer had to be
    an input too, they are none any more.

    Args:
        source: path of a model, or one in memory; it is not changed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no valid model, was optimised before, or uses what this package does not read.
    """
    model = _read(source)
    if DOMAIN in model.opset_imports:
        raise ValueError(f"the model has operations of {DOMAIN} already: optimise the model that it was made from")
    if model.functions:
        _check_inlined_size(model)
        common.InlinePass()(model)
    if model.ir_version < _OPTIONAL_INPUTS:
        common.RemoveInitializersFromInputsPass()(model)
        model.ir_version = _OPTIONAL_INPUTS
    return model


def _read(source: str | os.PathLike[str] | onnx.ModelProto | ir.Model) -> ir.Model:
    if isinstance(source, ir.Model):
        return source.clone()
    try:
        if isinstance(source, onnx.ModelProto):
            return ir.from_proto(_checked(source))
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a file; give the path of an ONNX model")
        proto = onnx.load(path, load_external_data=False)
        checked = _checked(proto, path)
        model = ir.load(path) if checked is proto else ir.from_proto(checked)
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever a parser raises for what is no model
        raise ValueError(f"{_named(source)} is no valid ONNX model: {error}") from error
    return model


def _checked(proto: onnx.ModelProto, path: Path | None = None) -> onnx.ModelProto:
    """A valid model: this one, or the same with its nodes in an order in which they can run.

    ONNX Runtime takes nodes in any order, and its own converter to float16 leaves some out of order.
    """
    try:
        _check(proto, path)
        return proto
    except onnx.checker.ValidationError as error:
        try:
            model = ir.from_proto(proto)
            model.graph.sort()
            ordered = ir.to_proto(model)
        except Exception:  # noqa: BLE001 -- whatever a parser raises for what is no model
            raise error from None
        # The checker looks at files beside a model by the path of that alone.
        if path is not None and _has_files(model):
            raise
        _check(ordered)
        return ordered


def _has_files(model: ir.Model) -> bool:
    """Whether constants of a model lie in other files."""
    bodies: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    nodes = [node for body in bodies for node in body.all_nodes()]
    graphs = {
        id(graph): graph for graph in (model.graph, *(node.graph for node in nodes)) if isinstance(graph, ir.Graph)
    }
    stored = [value.const_value for graph in graphs.values() for value in graph.initializers.values()]
    for attribute in (attribute for node in nodes for attribute in node.attributes.values() if not attribute.is_ref()):
        if attribute.type == ir.AttributeType.TENSOR:
            stored.append(attribute.as_tensor())
        elif attribute.type == ir.AttributeType.TENSORS:
            stored.extend(attribute.as_tensors())
    return any(isinstance(tensor, ir.ExternalTensor) for tensor in stored)


def _check(proto: onnx.ModelProto, path: Path | None = None) -> None:
    """Let onnx's checker look at a model, the files of its constants included."""
    if proto.ir_version < _OPTIONAL_INPUTS:
        # ONNX Runtime takes old models whose initializers are no inputs; the checker does only from this version on.
        proto = _copy(proto)
        proto.ir_version = _OPTIONAL_INPUTS
        onnx.checker.check_model(proto)
    else:
        onnx.checker.check_model(proto if path is None else str(path))


def _copy(proto: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    return copy


def _named(source: object) -> str:
    return str(source) if isinstance(source, (str, os.PathLike)) else "the model"


def _check_inlined_size(model: ir.Model) -> None:
    """Count the nodes after inlining before it is done.

    Raises:
        ValueError: they are too many, or functions call each other in a circle.
    """
    sizes: dict[ir.OperatorIdentifier, int] = {}
    active: set[ir.OperatorIdentifier] = set()

    def size_of(identifier: ir.OperatorIdentifier) -> int:
        if identifier in active:
            raise ValueError(f"function {identifier[1]!r} of the model calls itself")
        if identifier not in sizes:
            active.add(identifier)
            if len(active) > 500:
                raise ValueError("functions of the model call each other too deeply")
            sizes[identifier] = count(model.functions[identifier])
            active.discard(identifier)
        return sizes[identifier]

    def count(body: ir.Function | ir.Graph) -> int:
        total = 0
        for node in body.all_nodes():
            called = node.op_identifier()
            total += size_of(called) if called in model.functions else 1
            if total > MOST_NODES:
                raise ValueError(f"the model has more than {MOST_NODES} nodes when its functions are inlined")
        return total

    count(model.graph)
