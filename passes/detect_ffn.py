"""Find feed-forward blocks: `down(activation(gate(x)) [* up(x)])` around linears that were found before."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import takewhile

from sparsecomp.blocks import UNNAMED, FfnSite
from sparsecomp.ir import ACTIVATIONS, LinearSite, Operation, SparseGraph
from sparsecomp.passes.base import Pass, PassResult
from sparsecomp.passes.fuse_epilogue import hazard

_TANH_GELU = (math.sqrt(2 / math.pi), 0.044715)


class DetectFfn(Pass):
    """Add the blocks; runs after the epilogues are fused, so that gate has its activation and down its residual.

    Gated blocks are SwiGLU, GeGLU and ReGLU (Shazeer, arXiv:2002.05202, equation 6), with gate and up apart or in one
    weight whose output is split. What is found and cannot be rewritten as a whole is declined with its reason.
    """

    name = "detect_ffn"

    def run(self, graph: SparseGraph) -> PassResult:
        """Append the blocks in graph order."""
        anchors = {site.anchor: site for site in graph.sites if isinstance(site, LinearSite) and site.declined is None}
        names: set[str] = set()
        for down in anchors.values():
            found = _block(graph, down, anchors)
            if found is not None:
                if found.name in names:
                    found.name = f"{found.name}#{sum(name.partition('#')[0] == found.name for name in names) + 1}"
                names.add(found.name)
                graph.ffns.append(found)
        return PassResult(bool(graph.ffns), tuple(str(ffn) for ffn in graph.ffns))


@dataclass
class _Hidden:
    """The value between the linears, read backwards from down.

    Attributes:
        linear: The linear that it comes from.
        activation: What was applied, "none" for nothing.
        start: First column of the part of the linear's output that it is; -1 for all of it.
        length: Columns of that part.
        passed: Operations between the linear and the value.
    """

    linear: LinearSite
    activation: str = "none"
    floor: float = 0.0
    start: int = -1
    length: int = 0
    passed: list[str] = field(default_factory=list)


def _block(graph: SparseGraph, down: LinearSite, anchors: dict[str, LinearSite]) -> FfnSite | None:
    sides, passed = _sides(graph, down, anchors)
    if not sides:
        return None
    gate = sides[0]
    up = sides[1] if len(sides) == 2 else None
    linears = {id(side.linear): side.linear for side in sides}
    operations = {name for side in sides for name in side.passed} | set(passed) | set(down.operations)
    operations |= {name for linear in linears.values() for name in linear.operations}
    fused = ""
    if up is not None and up.linear is gate.linear:
        fused = "gate" if gate.start == 0 else "up"
        # What splits the output is read by the parts alone.
        anchor = gate.linear.anchor
        operations |= {user.name for user in graph.users(anchor) if user.kind in ("opaque", "part")}
    block = FfnSite(
        name=_name([*linears.values(), down]),
        gate=gate.linear,
        up=None if up is None or fused else up.linear,
        down=down,
        activation=gate.activation,
        operations=tuple(sorted(operations, key=graph.position)),
        fused=fused,
        floor=gate.floor,
    )
    block.declined = _why_declined(graph, block, sides)
    return block


def _sides(graph: SparseGraph, down: LinearSite, anchors: dict[str, LinearSite]) -> tuple[list[_Hidden], list[str]]:
    """The gate, and what it is multiplied with; with the operations from their product on; empty for no block."""
    product, passed = _through(graph, down.x)
    if product.kind == "mul" and "scalar" not in product.attrs and len(set(product.inputs[:2])) == 2:
        found = [_read(graph, name, anchors) for name in product.inputs[:2]]
        sides = [side for side in found if side is not None]
        # Of a product the side with an activation is the gate.
        sides.sort(key=lambda side: side.activation == "none")
        if len(sides) == 2 and sides[0].activation != "none" and sides[1].activation == "none":
            return sides, [*passed, product.name]
    single = _read(graph, down.x, anchors)
    return ([], []) if single is None or single.activation == "none" or single.start >= 0 else ([single], [])


def _why_declined(graph: SparseGraph, block: FfnSite, sides: list[_Hidden]) -> str | None:
    inside = set(block.operations)
    for side in sides:
        linear, units = side.linear, side.linear.out_features // (2 if block.fused else 1)
        if linear.residual is not None:
            return f"something is added to the output of {linear.name}"
        if linear.activation not in ("none", side.activation) and side.activation != "relu2":
            return f"{linear.name} has an activation of its own"
        if linear.x != block.x:
            return f"{linear.name} reads {linear.x} and {block.gate.name} reads {block.x}"
        halves = (side.start, side.length) in ((0, units), (units, units)) if block.fused else side.start < 0
        if not halves or units != block.hidden:
            return f"{linear.name} gives {units} values and {block.down.name} takes {block.hidden}"
    if block.fused and sides[0].start == sides[1].start:
        return f"gate and up are the same half of {block.gate.name}"
    composites = {linear.composite for linear in block.linears}
    if len(composites) > 1:
        return f"its linears are in different composite operations ({', '.join(sorted(composites))})"
    for name in block.operations[:-1]:
        if outside := [user.name for user in graph.users(name) if user.name not in inside]:
            return f"its {name} is also used by {outside[0]}"
        if graph.operation(name).mutates and not set(graph.operation(name).mutates) <= inside:
            return f"{name} changes a value in place"
    biases = [linear.bias for linear in block.linears if linear.bias is not None]
    operands = [block.x, *biases, *([block.residual] if block.residual is not None else [])]
    if any(name in inside for name in operands):
        return "one of its linears reads what another computes"
    return hazard(graph, operands, block.operations)


def _through(graph: SparseGraph, name: str) -> tuple[Operation, list[str]]:
    """Follow what changes no value of a row backwards: identities, and views that keep the last dimension."""
    passed: list[str] = []
    operation = graph.operation(name)
    while operation.kind in ("identity", "reshape"):
        source = graph.operation(operation.inputs[0])
        if operation.kind == "reshape" and (source.sizes or (None,))[-1:] != (operation.sizes or (None,))[-1:]:
            break
        passed.append(operation.name)
        operation = source
    return operation, passed


def _read(graph: SparseGraph, name: str, anchors: dict[str, LinearSite]) -> _Hidden | None:
    """Follow one side of a hidden value back to the linear that it comes from."""
    activation, floor, passed = "none", 0.0, []
    while True:
        operation, more = _through(graph, name)
        passed += more
        if operation.name in anchors:
            break
        if operation.kind == "threshold" and activation == "none":
            activation, floor = "relu", operation.attrs["threshold"]
        elif operation.kind == "power" and operation.attrs["exponent"] == 2.0 and activation == "none":
            activation = "square"
        elif operation.kind in ACTIVATIONS and activation in ("none", "square"):
            if activation == "square" and operation.kind != "relu":
                return None
            activation = operation.kind if activation == "none" else "relu2"
        elif operation.kind == "mul" and activation == "none" and (chain := _tanh_gelu(graph, operation)) is not None:
            activation = "gelu_tanh"
            passed += chain[1]
            name = chain[0]
            continue
        else:
            break
        passed.append(operation.name)
        name = operation.inputs[0]
    start, length = -1, 0
    if operation.kind == "part":
        passed.append(operation.name)
        start, length = operation.attrs["start"], operation.attrs["length"]
        operation, more = _through(graph, operation.inputs[0])
        passed += more
    linear = anchors.get(operation.name)
    if linear is None:
        return None
    if start < 0 and linear.activation != "none":
        # FATReLU keeps what is above its threshold; a ReLU before it changes nothing.
        own = {"none": linear.activation, "square": "relu2" if linear.activation == "relu" else "", "relu": "relu"}
        activation = own.get(activation, "") if activation != "relu" or linear.activation == "relu" else ""
    return None if activation in ("", "square") else _Hidden(linear, activation, floor, start, length, passed)


def _tanh_gelu(graph: SparseGraph, last: Operation) -> tuple[str, list[str]] | None:
    """The x of GELU's tanh form, `0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`, written out, and its steps."""
    steps = [last.name]

    def step(name: str, kind: str, scalar: float | None = None) -> Operation | None:
        operation = graph.operation(name)
        value = operation.attrs.get("scalar", operation.attrs.get("exponent"))
        if operation.kind != kind or (scalar is None) != (value is None):
            return None
        if scalar is not None and not (isinstance(value, (int, float)) and math.isclose(value, scalar, rel_tol=1e-6)):
            return None
        steps.append(name)
        return operation

    if "scalar" in last.attrs:
        return None
    for half_name, other in (last.inputs[:2], last.inputs[1::-1]):
        del steps[1:]
        half, one_more = step(half_name, "mul", 0.5), step(other, "add", 1.0)
        tanh = step(one_more.inputs[0], "tanh") if one_more else None
        scaled = step(tanh.inputs[0], "mul", _TANH_GELU[0]) if tanh else None
        added = step(scaled.inputs[0], "add") if scaled else None
        if half is None or added is None:
            continue
        x = half.inputs[0]
        cubic = next((name for name in added.inputs[:2] if name != x), "")
        weighted = step(cubic, "mul", _TANH_GELU[1]) if x in added.inputs[:2] and cubic else None
        power = step(weighted.inputs[0], "power", 3.0) if weighted else None
        if power is not None and power.inputs[0] == x:
            return x, steps
    return None


def _name(linears: list[LinearSite]) -> str:
    """The module that holds the linears: the common beginning of their qualified names."""
    paths = [linear.name.partition("#")[0].split(".")[:-1] for linear in linears]
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in shared) or UNNAMED
