"""Activations that a model spells as several operations: GELU in both forms, SiLU and hard swish.

They are products, and models write the factors in every order: `0.5 * (x * (1 + erf(x / sqrt(2))))` and so on. So a
chain of multiplications is taken as one product, and its factors are looked at without order. (Patterns of onnxscript's
rewriter would be some thousand for that, one for each order of every operand.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import onnx_ir as ir

_LONGEST = 8  # multiplications in a row; no form has as many
_TOLERANCE = 1e-3  # of constants, which some models keep in float16


@dataclass(frozen=True)
class Group:
    """Several nodes that are one canonical operation.

    Attributes:
        kind: of the operation.
        x: what it is applied to.
        nodes: all of them, the one that gives the result last; nothing else reads what the others give.
    """

    kind: str
    x: ir.Value
    nodes: tuple[ir.Node, ...]


def find_groups(graph: ir.Graph) -> dict[ir.Node, Group]:
    """The groups of a graph, its subgraphs not included, by the node that gives the result."""
    found: dict[ir.Node, Group] = {}
    taken: set[ir.Node] = set()
    for node in reversed(graph):
        group = _read(node) if _is(node, "Mul") and node not in taken else None
        # A subgraph may go on with what its outer graph began.
        if group is not None and all(member.graph is graph for member in group.nodes):
            found[node] = group
            taken.update(group.nodes)
    return found


@dataclass
class _Product:
    """A chain of multiplications: its factors that are not constant, the product of those that are, its nodes."""

    factors: list[ir.Value] = field(default_factory=list)
    scale: float = 1.0
    nodes: list[ir.Node] = field(default_factory=list)

    def take(self, node: ir.Node) -> None:
        """Take a node and the multiplications before it, of an endless chain only the last few."""
        waiting = [node]
        while waiting:
            current = waiting.pop()
            self.nodes.append(current)
            for value in current.inputs:
                number = None if value is None else constant_number(value)
                producer = None if value is None else value.producer()
                if number is not None:
                    self.scale *= number
                elif producer is not None and _is(producer, "Mul") and _only_used_once(producer):
                    if len(self.nodes) + len(waiting) < _LONGEST:
                        waiting.append(producer)
                elif value is not None:
                    self.factors.append(value)


def _read(node: ir.Node) -> Group | None:
    product = _Product()
    product.take(node)
    if len(product.factors) != 2:
        return None
    for x, gate in (product.factors, product.factors[::-1]):
        inner = gate.producer()
        if inner is None or not _only_used_once(inner):
            continue
        nodes = [*product.nodes, inner]
        kind = _gate(x, inner, product.scale, nodes)
        if kind is not None:
            return Group(kind, x, tuple(reversed(nodes)))
    return None


def _gate(x: ir.Value, gate: ir.Node, scale: float, nodes: list[ir.Node]) -> str | None:
    """What `scale * x * gate` is; appends the nodes behind the gate."""
    if _is(gate, "Sigmoid") and gate.inputs[0] is x and _near(scale, 1.0):
        return "silu"
    if _is(gate, "HardSigmoid") and gate.inputs[0] is x and _near(scale, 1.0):
        numbers = (gate.attributes.get_float("alpha", 0.2), gate.attributes.get_float("beta", 0.5))
        return "hardswish" if _near(numbers[0] or 0.0, 1 / 6) and _near(numbers[1] or 0.0, 0.5) else None
    if not _is(gate, "Add") or not _near(scale, 0.5):
        return None
    curve = _beside(gate, 1.0)
    if curve is None or not _only_used_once(curve):
        return None
    nodes.append(curve)
    argument = curve.inputs[0]
    if argument is None:
        return None
    if _is(curve, "Erf"):
        return "gelu" if _is_scaled(argument, x, 1 / math.sqrt(2), nodes) else None
    return "gelu_tanh" if _is(curve, "Tanh") and _is_cubic(argument, x, nodes) else None


def _is_scaled(value: ir.Value, x: ir.Value, scale: float, nodes: list[ir.Node]) -> bool:
    """Whether a value is `scale * x`."""
    node = value.producer()
    if node is None or not _only_used_once(node):
        return False
    nodes.append(node)
    if _is(node, "Div") and node.inputs[0] is x:
        number = constant_number(node.inputs[1])
        return number is not None and _near(number * scale, 1.0)
    if not _is(node, "Mul"):
        return False
    product = _Product()
    product.take(node)
    nodes.extend(product.nodes[1:])
    return product.factors == [x] and _near(product.scale, scale)


def _is_cubic(value: ir.Value, x: ir.Value, nodes: list[ir.Node]) -> bool:
    """Whether a value is `sqrt(2 / pi) * (x + 0.044715 * x ** 3)`, also with the bracket's x taken out of it."""
    node = value.producer()
    if node is None or not _is(node, "Mul") or not _only_used_once(node):
        return False
    product = _Product()
    product.take(node)
    nodes.extend(product.nodes)
    if not _near(product.scale, math.sqrt(2 / math.pi)):
        return False
    outside = product.factors.count(x)
    rest = [factor for factor in product.factors if factor is not x]
    if len(rest) != 1 or outside > 1 or (bracket := rest[0].producer()) is None:
        return False
    if not _is(bracket, "Add") or not _only_used_once(bracket):
        return False
    nodes.append(bracket)
    for place, operand in enumerate(bracket.inputs):
        first = operand is x if not outside else operand is not None and _near(constant_number(operand) or 0.0, 1.0)
        other = bracket.inputs[1 - place]
        if first and other is not None:
            return _is_power(other, x, 3 - outside, nodes)
    return False


def _is_power(value: ir.Value, x: ir.Value, power: int, nodes: list[ir.Node]) -> bool:
    """Whether a value is `0.044715 * x ** power`."""
    node = value.producer()
    if node is None or not _is(node, "Mul") or not _only_used_once(node):
        return False
    product = _Product()
    product.take(node)
    nodes.extend(product.nodes)
    count = 0
    for factor in product.factors:
        inner = factor.producer()
        if factor is x:
            count += 1
        elif inner is not None and _is(inner, "Pow") and inner.inputs[0] is x and _only_used_once(inner):
            nodes.append(inner)
            count += round(constant_number(inner.inputs[1]) or 0.0)
        elif inner is not None and _is(inner, "Mul") and list(inner.inputs) == [x, x] and _only_used_once(inner):
            nodes.append(inner)
            count += 2
        else:
            return False
    return count == power and _near(product.scale, 0.044715)


def _beside(node: ir.Node, number: float) -> ir.Node | None:
    """Of a node with two operands, what gives the one beside a constant of that value."""
    for place, value in enumerate(node.inputs):
        found = None if value is None else constant_number(value)
        other = node.inputs[1 - place]
        if found is not None and _near(found, number) and other is not None:
            return other.producer()
    return None


def constant_number(value: ir.Value | None) -> float | None:
    """The number that a value always is, None if it is no constant of one real number."""
    tensor = None if value is None or value.is_graph_input() else ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.size != 1 or tensor.dtype.is_string():
        return None
    return float(tensor.numpy().reshape(-1)[0])


def _is(node: ir.Node, op_type: str) -> bool:
    return node.domain == "" and node.op_type == op_type


def _only_used_once(node: ir.Node) -> bool:
    output = node.outputs[0]
    return len(node.outputs) == 1 and len(output.uses()) == 1 and not output.is_graph_output()


def _near(number: float, expected: float) -> bool:
    return abs(number - expected) <= _TOLERANCE * abs(expected)
