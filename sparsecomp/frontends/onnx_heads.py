"""Find the heads of attention in a graph of ONNX, and change how many there are.

What is looked for is the form that exporters write: three linears whose outputs are cut into heads by Reshape and
Transpose, two products with Softmax between, and the way back before the linear that mixes the heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from sparsecomp.frontends.onnx import Overlay
from sparsecomp.frontends.onnx_groups import constant_number
from sparsecomp.ir import LinearSite

_BETWEEN = frozenset({"Softmax", "Cast", "Dropout", "Identity", "Div", "Mul", "Add", "Sub", "Where", "Clip"})
_LONGEST = 16  # operations between the two products
_HEADS_FIRST, _KEYS = [0, 2, 1, 3], [0, 2, 3, 1]


@dataclass(frozen=True)
class Attention:
    """An attention of the outer graph.

    Attributes:
        query, key, value: Linears whose outputs are cut into heads.
        mix: The linear that reads all heads.
        heads: Their number.
        size: Of a head.
        cuts: The Reshape nodes that cut, and the one that joins, which comes last.
    """

    query: LinearSite
    key: LinearSite
    value: LinearSite
    mix: LinearSite
    heads: int
    size: int
    cuts: tuple[ir.Node, ...]

    @property
    def sources(self) -> tuple[LinearSite, LinearSite, LinearSite]:
        """Query, key and value."""
        return self.query, self.key, self.value


def find_attention(overlay: Overlay) -> list[Attention]:
    """The attentions of a graph whose values nothing else reads."""
    by_value: dict[ir.Value, LinearSite] = {}
    for site in overlay.graph.sites:
        value = overlay.origin(site.anchor)
        plain = site.declined is None and site.residual is None and site.activation == "none"
        if isinstance(site, LinearSite) and isinstance(value, ir.Value) and plain:
            by_value[value] = site
    linears = [site for site in overlay.graph.sites if isinstance(site, LinearSite) and site.declined is None]
    found = (_read(overlay, site, by_value) for site in linears)
    return [attention for attention in found if attention is not None]


def set_heads(graph: ir.Graph, attention: Attention, heads: int) -> None:
    """Let the Reshape nodes of an attention cut into so many heads."""
    *cuts, joint = attention.cuts
    for node, place, number in [*((cut, -2, heads) for cut in cuts), (joint, -1, heads * attention.size)]:
        shape = node.inputs[1]
        assert shape is not None
        node.replace_input_with(1, _with_entry(graph, node, shape, place, number))


def _read(overlay: Overlay, mix: LinearSite, by_value: dict[ir.Value, LinearSite]) -> Attention | None:
    joined = overlay.origin(mix.x)
    if not isinstance(joined, ir.Value):
        return None
    joint = _made_by(joined, "Reshape")
    if joint is None or not _only_read_by(joined, overlay, mix):
        return None
    back = _transposed(joint.inputs[0], _HEADS_FIRST, joint)
    product = None if back is None else _made_by(back.inputs[0], "MatMul")
    if back is None or product is None or not _sole(product.outputs[0], back):
        return None
    scores = _scores(overlay, product)
    if scores is None:
        return None
    sides = [
        _cut(product.inputs[1], product, (_HEADS_FIRST,), by_value),
        _cut(scores.inputs[0], scores, (_HEADS_FIRST,), by_value),
        _cut(scores.inputs[1], scores, (_KEYS,), by_value),
    ]
    if any(side is None for side in sides):
        return None
    (value, value_cut), (query, query_cut), (key, key_cut) = (side for side in sides if side is not None)
    cuts = (query_cut, key_cut, value_cut, joint)
    heads, size = _entry(query_cut.inputs[1], -2), _entry(query_cut.inputs[1], -1)
    if heads is None or size is None or _entry(joint.inputs[1], -1) != heads * size:
        return None
    same = all((_entry(cut.inputs[1], -2), _entry(cut.inputs[1], -1)) == (heads, size) for cut in cuts[:-1])
    fits = all(site.out_features == heads * size for site in (query, key, value)) and mix.in_features == heads * size
    distinct = len({id(site) for site in (query, key, value, mix)}) == 4
    return Attention(query, key, value, mix, heads, size, cuts) if same and fits and distinct else None


def _scores(overlay: Overlay, product: ir.Node) -> ir.Node | None:
    """The product of queries and keys before the one with the values; None if something between mixes the heads."""
    reader, value = product, product.inputs[0]
    for _ in range(_LONGEST):
        node = None if value is None else value.producer()
        if value is None or node is None or not _sole(value, reader) or node.domain != "":
            return None
        if node.op_type == "MatMul":
            return node
        if node.op_type not in _BETWEEN:
            return None
        if node.op_type == "Softmax" and node.attributes.get_int("axis", -1) not in (-1, 3):
            return None
        wide = [operand for operand in node.inputs if operand is not None and not _same_for_all(overlay, operand)]
        if len(wide) != 1:
            return None
        reader, value = node, wide[0]
    return None


def _same_for_all(overlay: Overlay, value: ir.Value) -> bool:
    """Whether a value that meets scores `[N, heads, tokens, tokens]` is the same for every head."""
    if constant_number(value) is not None:
        return True
    name = value.name or ""
    if name not in overlay.graph or overlay.graph.operation(name).origin is not value:
        return False
    sizes = overlay.graph.operation(name).sizes
    return sizes is not None and overlay.graph.operation(name).dtype is not None and (len(sizes) < 3 or sizes[-3] == 1)


def _cut(
    value: ir.Value | None, reader: ir.Node, orders: Sequence[list[int]], by_value: dict[ir.Value, LinearSite]
) -> tuple[LinearSite, ir.Node] | None:
    """The linear whose output becomes heads, and the Reshape that cuts it; a scale may follow."""
    while value is not None and (node := value.producer()) is not None and node.op_type in ("Mul", "Div"):
        others = [operand for operand in node.inputs if constant_number(operand) is None]
        if len(others) != 1 or not _sole(value, reader):
            return None
        reader, value = node, others[0]
    for order in orders:
        turn = _transposed(value, order, reader)
        cut = None if turn is None else _made_by(turn.inputs[0], "Reshape")
        if turn is not None and cut is not None and _sole(cut.outputs[0], turn):
            source = cut.inputs[0]
            if source in by_value and _sole(source, cut):
                return by_value[source], cut
    return None


def _transposed(value: ir.Value | None, order: list[int], reader: ir.Node) -> ir.Node | None:
    node = _made_by(value, "Transpose")
    if node is None or list(node.attributes.get_ints("perm", []) or ()) != order:
        return None
    return node if _sole(node.outputs[0], reader) else None


def _made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.domain == "" and node.op_type == op_type else None


def _sole(value: ir.Value | None, reader: ir.Node) -> bool:
    """Whether a node alone reads a value, but for those that ask for its shape."""
    if value is None or value.is_graph_output():
        return False
    return all(use.node is reader or use.node.op_type == "Shape" for use in value.uses())


def _only_read_by(value: ir.Value, overlay: Overlay, site: LinearSite) -> bool:
    nodes = {node for name in site.operations for node in overlay.nodes.get(name, ())}
    return not value.is_graph_output() and all(use.node in nodes for use in value.uses())


def _entry(shape: ir.Value | None, place: int) -> int | None:
    """An entry of the shape that a Reshape is given, counted from behind, if it is constant."""
    part = _part(shape, place)
    number = None if part is None else constant_number(part)
    if number is not None:
        return int(number)
    tensor = None if shape is None else ir.convenience.get_const_tensor(shape)
    if tensor is None or tensor.size < -place:
        return None
    return int(tensor.numpy().reshape(-1)[place])


def _part(shape: ir.Value | None, place: int) -> ir.Value | None:
    """Of a shape that is put together from single numbers, the one at a place."""
    node = _made_by(shape, "Concat")
    behind = [] if node is None else list(node.inputs)[place:]
    return behind[0] if len(behind) == -place and all(constant_number(value) is not None for value in behind) else None


def _with_entry(graph: ir.Graph, reader: ir.Node, shape: ir.Value, place: int, number: int) -> ir.Value:
    """A shape with another entry."""
    name = f"{reader.outputs[0].name}.heads"
    node = shape.producer()
    if _part(shape, place) is None or node is None:
        tensor = ir.convenience.get_const_tensor(shape)
        assert tensor is not None
        sizes = tensor.numpy().reshape(-1).astype(np.int64)
        sizes[place] = number
        return _constant(graph, name, sizes)
    parts = list(node.inputs)
    parts[place] = _constant(graph, name, np.array([number], np.int64))
    joined = ir.Node("", "Concat", parts, [ir.AttrInt64("axis", 0)])
    joined.outputs[0].name = f"{name}.shape"
    graph.insert_before(reader, joined)
    return joined.outputs[0]


def _constant(graph: ir.Graph, name: str, array: np.ndarray[tuple[int], np.dtype[np.int64]]) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    graph.register_initializer(value)
    return value
