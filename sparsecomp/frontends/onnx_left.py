"""Products with a constant on the left, `W @ x`, of any rank: as `[N, I, L]`, which is a convolution over L.

A Reshape only gives a value another shape and moves nothing. Where the product stays dense, it is put back as it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx_ir as ir

from sparsecomp.frontends.onnx_apply import Rewriter
from sparsecomp.frontends.onnx_constants import Constants
from sparsecomp.frontends.onnx_shapes import infer
from sparsecomp.ir import Size


@dataclass(frozen=True)
class Left:
    """A product between two reshapes."""

    before: ir.Node
    product: ir.Node
    after: ir.Node

    def put_back(self) -> None:
        """Take the reshapes out, if the product is still there."""
        graph = self.product.graph
        if graph is None:
            return
        node = ir.Node("", "MatMul", [self.product.inputs[0], self.before.inputs[0]], name=self.product.name)
        shapes = [reshape.inputs[1] for reshape in (self.before, self.after)]
        _replace(graph, self.after, [self.before, self.product, self.after], [node])
        for shape in shapes:
            if shape is not None and not shape.uses():
                del graph.initializers[shape.name or ""]


def reshape_left(model: ir.Model, shapes: Mapping[str, Sequence[int]] | None) -> list[Left]:
    """Give the products of the outer graph with a constant matrix on the left three dimensions, in place.

    Args:
        model: without functions.
        shapes: sizes of inputs by name.

    Returns:
        Those that were given another shape; not those with several sizes that only a call tells.
    """
    constants = Constants(model)
    nodes = [node for node in model.graph if _is_left(node, constants)]
    if not nodes:
        return []
    known = infer(model, shapes).graphs[0]
    rewriter = Rewriter(model, model.opset_imports.get("", 1))
    found = []
    for node in nodes:
        x = node.inputs[1]
        assert x is not None
        outputs, inputs = constants.shape_and_type(node.inputs[0])[0] if node.inputs[0] is not None else (0, 0)
        sizes = known[x.name or ""].sizes if (x.name or "") in known else ()
        into, back = _joined(sizes, inputs), _with_one_open((*sizes[:-2], outputs, *sizes[-1:]))
        if len(sizes) in (0, 1, 3) or sizes[-2] != inputs or into is None or back is None:
            continue
        reshapes = []
        for name, shape in (("joined", into), ("apart", back)):
            array = rewriter.initializer(model.graph, f"{node.outputs[0].name}.{name}", np.array(shape, np.int64))
            reshapes.append(ir.Node("", "Reshape", [None, array]))
        before, after = reshapes
        before.replace_input_with(0, x)
        product = ir.Node("", "MatMul", [node.inputs[0], before.outputs[0]], name=node.name)
        after.replace_input_with(0, product.outputs[0])
        before.outputs[0].name = rewriter.unique(f"{x.name}.joined")
        product.outputs[0].name = rewriter.unique(f"{node.outputs[0].name}.product")
        _replace(model.graph, node, [node], [before, product, after])
        found.append(Left(before, product, after))
    return found


def _is_left(node: ir.Node, constants: Constants) -> bool:
    if node.domain != "" or node.op_type != "MatMul":
        return False
    left, right = node.inputs
    if left is None or right is None or not constants.is_constant(left) or constants.is_constant(right):
        return False
    return len(constants.shape_and_type(left)[0]) == 2


def _joined(sizes: Sequence[Size], inputs: int) -> list[int] | None:
    """`[N, I, L]` for `[..., I, L]`."""
    ahead = [size for size in sizes[:-2] if isinstance(size, int)]
    first: Size = prod(ahead) if len(ahead) == len(sizes[:-2]) else "?"
    return _with_one_open((first, inputs, *sizes[-1:]))


def _with_one_open(sizes: Sequence[Size]) -> list[int] | None:
    """A shape for Reshape, which finds out one size by itself; a 0 would mean something else to it."""
    numbers = [size if isinstance(size, int) else -1 for size in sizes]
    return numbers if numbers.count(-1) <= 1 and 0 not in numbers else None


def _replace(graph: ir.Graph, place: ir.Node, old: list[ir.Node], new: list[ir.Node]) -> None:
    values = [old[-1].outputs[0]], [new[-1].outputs[0]]
    ir.convenience.replace_nodes_and_values(graph, place, old, new, *values)
