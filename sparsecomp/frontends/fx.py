"""The front end for the graph that Dynamo hands a backend: `build` overlays a `SparseGraph` on it, `apply` rewrites it.

Parameters, buffers and other tensors that belong to the program arrive as graph inputs with real values; Dynamo's
sources tell them from the arguments of the call. They may still be replaced or changed between calls, so a site gives
the index of the graph input with its weight, and whoever runs the graph looks at that input on every call.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from sparsecomp.blocks import FfnSite
from sparsecomp.frontends.fx_ops import classify, is_transform, mutated, tensor_value
from sparsecomp.ir import ConvSite, LinearSite, Operation, Site, Size, SparseGraph
from sparsecomp.runtime.terms import fold_terms
from sparsecomp.window import form_of

COMPOSITE = "sparsecomp_composite"
"""Key in the metadata of a node that was expanded from a composite: the composite's name."""

UNKNOWN_SIZE = 64
"""Hint for a size that depends on data, of which the front end has seen no example."""


@dataclass(frozen=True)
class Replacement:
    """A site or block to be run by an op, the handle under which it is registered, and whether it skips at run time."""

    site: Site | FfnSite
    handle: int
    skips: bool = False


def build(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> SparseGraph:
    """Overlay a graph on what Dynamo hands a backend.

    Args:
        gm: Dynamo's graph; it is not changed. `node.meta["example_value"]` gives shapes and types; a linear without
            them will be declined.
        example_inputs: One value per placeholder, real for parameters and buffers.

    Returns:
        The graph, in the order of `gm`, without sites.

    Raises:
        ValueError: The number of inputs is not that of the placeholders.
    """
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    if len(placeholders) != len(example_inputs):
        raise ValueError(f"the graph has {len(placeholders)} inputs but {len(example_inputs)} values were given")
    index = {node: place for place, node in enumerate(placeholders)}
    namer = _Namer(gm)
    expanded = {node.meta.get(COMPOSITE) for node in gm.graph.nodes}
    graph = SparseGraph()
    for node in gm.graph.nodes:
        kind, inputs, aliases = "opaque", tuple(node.all_input_nodes), True
        attrs: dict[str, Any] = {}
        if node.op == "placeholder":
            kind, attrs = _read_input(node, index[node], example_inputs[index[node]], namer)
        elif node.op == "get_attr":
            kind, attrs = _read_attribute(gm, node)
        elif node.op == "output":
            kind = "output"
        elif is_transform(node):
            kind = "transform"
        else:
            call = classify(node)
            if call is not None:
                kind, attrs, aliases = call.kind, call.attrs, call.aliases
                inputs = (*call.operands, *(other for other in inputs if other not in call.operands))
        if COMPOSITE in node.meta:
            attrs = {**attrs, "composite": node.meta[COMPOSITE]}
        if kind == "composite":
            attrs = {**attrs, "expanded": node.name in expanded}
        graph.add(_operation(node, kind, inputs, attrs, aliases, namer))
    return graph


def apply(gm: fx.GraphModule, replacements: Sequence[Replacement]) -> None:
    """Put the sparse op in the place of sites, in place; either all are replaced or the graph is not changed.

    Args:
        gm: The graph that the sites were found in, or a copy with the same node names.
        replacements: What to replace. At the place of its anchor each becomes a call of
            `torch.ops.sparsecomp.linear.default(x, bias, residual, handle, out_features, activation)`, or of
            `torch.ops.sparsecomp.conv.default(x, terms, residual, handle, form)`, behind what computes the terms unless
            the site at run time holds them; what skips becomes a call of `skip`.

    Raises:
        ValueError: A site is declined, given twice, or its operations are not in the graph.
    """
    nodes = {node.name: node for node in gm.graph.nodes}
    replaced: set[str] = set()
    for replacement in replacements:
        site = replacement.site
        if site.declined is not None:
            raise ValueError(f"site {site.name} cannot be replaced, it was declined: {site.declined}")
        missing = [name for name in (*site.operations, *_operands(site)) if name not in nodes]
        if missing:
            raise ValueError(f"site {site.name} needs {', '.join(missing)}, which this graph does not have")
        again = replaced.intersection(site.operations)
        if again:
            raise ValueError(f"site {site.name} replaces {', '.join(sorted(again))}, which another replacement takes")
        replaced.update(site.operations)
    if not replacements:
        return
    for replacement in replacements:
        _replace(gm.graph, replacement, nodes)
    gm.graph.lint()
    gm.recompile()


def _operands(site: Site | FfnSite) -> list[str]:
    """The names of what a site reads beside its weights."""
    if isinstance(site, FfnSite):
        added = [linear.bias for linear in site.linears]
    else:
        added = list(site.term_names) if isinstance(site, ConvSite) else [site.bias]
    names = [site.x, *added, site.residual]
    return [name for name in names if name is not None]


def _replace(graph: fx.Graph, replacement: Replacement, nodes: dict[str, fx.Node]) -> None:
    site = replacement.site
    anchor = nodes[site.anchor]
    with graph.inserting_before(anchor):
        if isinstance(site, FfnSite) or (isinstance(site, LinearSite) and replacement.skips):
            new = _skip_call(graph, site, replacement.handle, nodes)
        elif isinstance(site, LinearSite):
            new = _linear_call(graph, site, replacement.handle, nodes)
        else:
            new = _conv_call(graph, site, replacement.handle, nodes)
    new.meta = dict(anchor.meta)
    anchor.replace_all_uses_with(new)
    nodes[site.anchor] = new  # a later site may read this value under its old name
    absorbed = [anchor if name == site.anchor else nodes[name] for name in reversed(site.operations)]
    read = [source for old in absorbed for source in old.all_input_nodes]
    for old in absorbed:
        graph.erase_node(old)
    _erase_unused(graph, [source for source in read if source not in absorbed])


def _linear_call(graph: fx.Graph, site: LinearSite, handle: int, nodes: dict[str, fx.Node]) -> fx.Node:
    operands = [nodes[name] if name is not None else None for name in (site.x, site.bias, site.residual)]
    target = torch.ops.sparsecomp.linear.default
    return graph.call_function(target, (*operands, handle, site.out_features, site.activation))


def _skip_call(graph: fx.Graph, site: LinearSite | FfnSite, handle: int, nodes: dict[str, fx.Node]) -> fx.Node:
    if isinstance(site, FfnSite):
        names = [site.gate.bias, None if site.up is None else site.up.bias, site.down.bias]
        out_features = site.down.out_features
    else:
        names, out_features = [site.bias, None, None], site.out_features
    x, residual, *biases = (nodes[name] if name is not None else None for name in (site.x, site.residual, *names))
    return graph.call_function(torch.ops.sparsecomp.skip.default, (x, biases, residual, handle, out_features))


def _conv_call(graph: fx.Graph, site: ConvSite, handle: int, nodes: dict[str, fx.Node]) -> fx.Node:
    window = site.window
    if window is None:
        raise ValueError(f"site {site.name} cannot be replaced, it has no window")
    terms = None
    if site.term_names and site.held is None:
        tracer = fx.proxy.GraphAppendingTracer(graph)
        terms = fold_terms(site.norm, site.bias, lambda name: fx.Proxy(nodes[name], tracer)).node
    residual = nodes[site.residual] if site.residual is not None else None
    arguments = (nodes[site.x], terms, residual, handle, form_of(window, site.out_features))
    return graph.call_function(torch.ops.sparsecomp.conv.default, arguments)


def _erase_unused(graph: fx.Graph, candidates: list[fx.Node]) -> None:
    """Erase what only the erased operations read: transposes of weights, sizes, attributes."""
    erased: set[fx.Node] = set()
    while candidates:
        node = candidates.pop()
        keep = node.op in ("placeholder", "output") or bool(mutated(node)) or "unbacked_bindings" in node.meta
        if node not in erased and not node.users and not keep:
            candidates.extend(node.all_input_nodes)
            graph.erase_node(node)
            erased.add(node)


def _operation(
    node: fx.Node, kind: str, inputs: tuple[fx.Node, ...], attrs: dict[str, Any], aliases: bool, namer: _Namer
) -> Operation:
    value = attrs["value"] if kind == "constant" else tensor_value(node)
    sizes: tuple[Size, ...] = ()
    hints: tuple[int, ...] = ()
    contiguous = True
    if value is not None:
        sizes = tuple(_size(dim) for dim in value.shape)
        hints = tuple(_hint(dim) for dim in value.shape)
        contiguous = value.layout == torch.strided and _is_contiguous(value)
    module, module_type = namer.module(node)
    changed = tuple(dict.fromkeys(other.name for other in mutated(node)))
    return Operation(
        name=node.name,
        kind=kind,
        inputs=tuple(other.name for other in inputs),
        attrs=attrs,
        shape=hints,
        sizes=sizes,
        dynamic=any(isinstance(size, str) for size in sizes),
        dtype=None if value is None else value.dtype,
        origin=node,
        module=module,
        module_type=module_type,
        contiguous=contiguous,
        mutates=changed,
        aliases=aliases or bool(changed),
    )


def _read_input(node: fx.Node, index: int, value: Any, namer: _Namer) -> tuple[str, dict[str, Any]]:
    if not isinstance(value, torch.Tensor):
        return "input", {"index": index, "why": "a number given at each call"}
    why = _why_not_constant(node, value)
    if why is not None:
        return "input", {"index": index, "why": why}
    return "constant", {"index": index, "value": value, "path": namer.path(_source(node))}


def _read_attribute(gm: fx.GraphModule, node: fx.Node) -> tuple[str, dict[str, Any]]:
    value = operator.attrgetter(str(node.target))(gm)
    if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):
        return "opaque", {}
    return "constant", {"index": -1, "value": value, "path": str(node.target)}


def _source(node: fx.Node) -> Any:
    return getattr(node.meta.get("grapharg"), "source", None)


def _why_not_constant(node: fx.Node, value: torch.Tensor) -> str | None:
    """Why a tensor among the inputs is not part of the program, None when it is."""
    if isinstance(value, FakeTensor) and not isinstance(value, torch.nn.Parameter):
        return "a tensor without a value at compile time"
    sizes = () if (known := tensor_value(node)) is None else tuple(_size(dim) for dim in known.shape)
    if any(isinstance(size, str) for size in sizes):
        return f"a tensor whose shape may change from call to call ({', '.join(map(str, sizes))})"
    if isinstance(value, torch.nn.Parameter):
        return None
    source = _source(node)
    while source is not None:
        name = type(source).__name__
        if "NNModule" in name or "ParamBuffer" in name or name == "GlobalSource":
            return None
        if name == "LocalSource":
            return None if source.is_derefed_cell_contents else "an argument of the compiled call"
        source = getattr(source, "base", None)
    return "a tensor that is given at each call"


def _size(dim: int | torch.SymInt) -> Size:
    if isinstance(dim, int):
        return dim
    fixed = dim.node.maybe_as_int()
    return str(dim.node.expr) if fixed is None else int(fixed)


def _hint(dim: int | torch.SymInt) -> int:
    if isinstance(dim, int):
        return dim
    fixed = dim.node.maybe_as_int()
    if fixed is not None:
        return int(fixed)
    return int(dim.node.hint) if dim.node.has_hint() else UNKNOWN_SIZE


def _is_contiguous(value: torch.Tensor) -> bool:
    """Compare strides as expressions: asking the tensor itself would add guards to the compiled code."""
    expected: Any = 1
    for dim, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if isinstance(_size(dim), int) and _hint(dim) == 1:
            continue  # its stride is never used
        if str(_size(stride)) != str(expected):
            return False
        expected = expected * (dim if isinstance(dim, int) else dim.node.expr)
    return True


class _Namer:
    """Qualified names as the user's model spells them, from Dynamo's module stacks and sources.

    Both start at the variable that held the model (`L['self'].encoder...`). That root is left out when it is the only
    one in the graph or the `self` of a compiled module; a function that calls several modules keeps it, to tell them
    apart.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        roots = {self._split(entry[0])[0] for entry in map(self._entry, gm.graph.nodes) if entry is not None}
        self._hidden = {"self", "fn"} | (roots if len(roots) == 1 else set())

    def module(self, node: fx.Node) -> tuple[str, str]:
        """Path and class name of the module that a node was called in."""
        entry = self._entry(node)
        if entry is None or node.op in ("placeholder", "get_attr", "output"):
            return "", ""
        return self._path(entry[0]), getattr(entry[1], "__name__", str(entry[1]))

    def path(self, source: Any) -> str:
        """Qualified name of the tensor of a source, "" when it has none."""
        return "" if source is None else self._path(str(source.name))

    @staticmethod
    def _entry(node: fx.Node) -> tuple[str, Any] | None:
        stack = node.meta.get("nn_module_stack")
        return None if not stack else list(stack.values())[-1]

    @staticmethod
    def _split(text: str) -> list[str]:
        quoted = re.sub(r"\[['\"]?([^\]'\"]*)['\"]?\]", r".\1", text)
        parts = [part for part in quoted.split(".") if part not in ("", "_modules", "_parameters", "_buffers")]
        parts = parts[1:] if parts[:1] in (["L"], ["G"]) else parts
        # a decorated forward holds its module in a tuple of arguments: `args[0]` is one name
        held = len(parts) > 1 and parts[1].isdigit() and "[" in text.partition("]")[2][:1]
        return [f"{parts[0]}.{parts[1]}", *parts[2:]] if held else parts

    def _path(self, text: str) -> str:
        parts = self._split(text)
        # after a graph break Dynamo passes what it had on its stack under names of its own
        anonymous = bool(parts) and (parts[0] in self._hidden or parts[0].startswith("___stack"))
        return ".".join(parts[1:] if anonymous else parts)
