"""Take composites apart, so that the linears inside become visible, and put back those not needed.

Under `torch.no_grad` an `nn.TransformerEncoderLayer` is one call, `torch._transformer_encoder_layer_fwd`; otherwise
its attention is one call, `F.multi_head_attention_forward`. `expand` writes the same computation beside such a call in
terms of `F.linear` and `F.scaled_dot_product_attention` and lets the users read that; `settle` decides. A composite
whose sites all stay dense is restored, so a dense model compiles exactly as it would have.

The experts of a mixture are one call, `sparsecomp::experts`, since which rows an expert gets is known only at run time.
What `expand` writes beside it only shows the linears of every expert to the passes: nothing reads it, and `settle`
takes it out again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from operator import getitem
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from sparsecomp.frontends.fx import COMPOSITE
from sparsecomp.frontends.fx_ops import argument, function_name, tensor_value
from sparsecomp.ir import Site


@dataclass(frozen=True)
class Expansion:
    """A composite that was taken apart.

    Attributes:
        name: Name of the composite node, which stays in the graph without users until `settle`.
        old: The node whose users now read `new`: the composite, or the selection of its first result.
        new: The value computed by the expanded operations; `old` where they are only shown.
        nodes: The expanded operations, in graph order.
    """

    name: str
    old: fx.Node
    new: fx.Node
    nodes: list[fx.Node] = field(default_factory=list)


def expand(gm: fx.GraphModule) -> list[Expansion]:
    """Take every composite of a known form apart, in place.

    Args:
        gm: Dynamo's graph, with example values in its metadata. Forms that are not known (nested tensors, separate
            projections, key padding masks, attention weights asked for, autocast) are left as they are.

    Returns:
        What was expanded; give it to `settle` before the graph is used.
    """
    expansions = []
    for node in list(gm.graph.nodes):
        if is_experts(node):
            expansions.append(_experts(gm.graph, node))
            continue
        write = _FORMS.get(function_name(node) or "") if node.op == "call_function" else None
        if write is None or not _is_plain(node):
            continue
        expansion = write(gm.graph, node)
        if expansion is not None:
            expansion.old.replace_all_uses_with(expansion.new)
            expansions.append(expansion)
    return expansions


def settle(
    gm: fx.GraphModule,
    expansions: Collection[Expansion],
    keep: Collection[str] = (),
    sites: Iterable[Site] = (),
) -> None:
    """Keep some expansions and undo the others, in place; then recompile.

    Args:
        gm: The graph that `expand` changed.
        expansions: What it returned.
        keep: Names of the composites that stay taken apart (`composite` of the sites to be replaced).
        sites: Sites found since; those that read a value of a restored composite read it under its old name afterwards.

    Raises:
        ValueError: A name to keep is none of the expansions.
    """
    unknown = set(keep) - {expansion.name for expansion in expansions}
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))} was not expanded; expanded: {[e.name for e in expansions]}")
    renamed: dict[str | None, str] = {}
    for expansion in expansions:
        if expansion.name in keep:
            composite = next(node for node in gm.graph.nodes if node.name == expansion.name)
            if expansion.old is not composite:
                gm.graph.erase_node(expansion.old)
            gm.graph.erase_node(composite)
        else:
            if expansion.new is not expansion.old:
                renamed[expansion.new.name] = expansion.old.name
                expansion.new.replace_all_uses_with(expansion.old)
            for node in reversed(expansion.nodes):
                gm.graph.erase_node(node)
    for site in sites:
        site.x = renamed.get(site.x, site.x)
        site.bias = renamed.get(site.bias, site.bias)
        site.residual = renamed.get(site.residual, site.residual)
    if expansions:
        gm.graph.lint()
        gm.recompile()


def is_experts(node: fx.Node) -> bool:
    """Whether a node is the op of the experts of a mixture."""
    return node.op == "call_function" and str(node.target) == "sparsecomp.experts.default"


def _experts(graph: fx.Graph, node: fx.Node) -> Expansion:
    """The linears of every expert, on as many rows as an expert gets on average."""
    x, index, _, first, down, gated, activation, _ = node.args
    assert isinstance(x, fx.Node)
    assert isinstance(index, fx.Node)
    assert isinstance(first, Sequence)
    assert isinstance(down, Sequence)
    write = _Writer(graph, node)
    tokens, picked = index.meta["example_value"].shape
    rows = x
    if isinstance(tokens, int) and (share := -(-tokens * picked // len(first))) < tokens:
        rows = write(torch.narrow, x, 0, 0, share)
    for one, other in zip(first, down, strict=True):
        hidden = write(F.linear, rows, one)
        if gated:
            parts = write(torch.chunk, hidden, 2, -1)
            gate, up = (write(getitem, parts, place) for place in range(2))
            hidden = write(torch.mul, _activated(write, str(activation), gate), up)
        else:
            hidden = _activated(write, str(activation), hidden)
        write(F.linear, hidden, other)
    return Expansion(node.name, node, node, write.nodes)


def _activated(write: _Writer, activation: str, value: fx.Node) -> fx.Node:
    if activation == "none":
        return value
    if activation == "gelu_tanh":
        return write(F.gelu, value, approximate="tanh")
    if activation == "relu2":
        return write(torch.square, write(F.relu, value))
    return write(getattr(F, activation), value)


class _Writer:
    """Writes operations before a composite and computes their example values as Dynamo did."""

    def __init__(self, graph: fx.Graph, composite: fx.Node) -> None:
        self._graph = graph
        self._composite = composite
        self.nodes: list[fx.Node] = []

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        with self._graph.inserting_before(self._composite):
            node = self._graph.call_function(function, args, kwargs)
        known = fx.map_arg((args, kwargs), lambda source: source.meta["example_value"])
        with torch.no_grad():
            value = function(*known[0], **known[1])
        shared = ("nn_module_stack", "stack_trace", "source_fn_stack")
        node.meta = {key: self._composite.meta[key] for key in shared if key in self._composite.meta}
        node.meta.update({"example_value": value, COMPOSITE: self._composite.name})
        self.nodes.append(node)
        return node


def _is_plain(node: fx.Node) -> bool:
    """Whether every tensor of a call is known, dense and of one floating type (masks apart)."""
    known: list[Any] = [source.meta.get("example_value") for source in node.all_input_nodes]
    values = [value for value in known if not isinstance(value, (int, float, torch.SymInt, torch.SymFloat))]
    if not all(isinstance(value, torch.Tensor) and value.layout == torch.strided for value in values):
        return False  # a nested tensor has another layout or says so itself
    if any(value.is_nested for value in values):
        return False
    result = node.meta.get("example_value")
    first = result[0] if isinstance(result, (tuple, list)) else result
    dtypes = {value.dtype for value in values if value.dtype != torch.bool}
    return isinstance(first, torch.Tensor) and dtypes == {first.dtype}


def _self_attention(
    write: _Writer,
    x: fx.Node,
    heads: int,
    weights: tuple[Any, Any, Any, Any],
    order: tuple[int, int, int, int],
    mask: Any = None,
    causal: bool = False,
) -> fx.Node:
    """Attention of x with itself.

    Args:
        write: Where the operations go.
        x: [N, L, E] or [L, N, E].
        heads: Number of heads.
        weights: Weight [3 E, E] and bias of the input projection, weight [E, E] and bias of the output projection.
        order: Permutation of [.., .., heads, E / heads] to [N, heads, L, E / heads].
        mask: Added to or, of bool, excluded from the scores [L, L]; None for none.
        causal: Whether each position sees only those before it.

    Returns:
        The output projection, with the shape of x.
    """
    projected = write(F.linear, x, weights[0], weights[1])
    parts = write(torch.chunk, projected, 3, -1)
    query, key, value = (
        write(torch.permute, write(torch.unflatten, write(getitem, parts, place), -1, (heads, -1)), order)
        for place in range(3)
    )
    if mask is not None and mask.meta["example_value"].dtype == torch.bool:
        mask = write(torch.logical_not, mask)  # True excludes here and includes there
    mixed = write(F.scaled_dot_product_attention, query, key, value, attn_mask=mask, is_causal=causal)
    back = tuple(order.index(dim) for dim in range(4))
    return write(F.linear, write(torch.flatten, write(torch.permute, mixed, back), -2), weights[2], weights[3])


def _encoder_layer(graph: fx.Graph, node: fx.Node) -> Expansion | None:
    names = [argument.name for argument in torch.ops.aten._transformer_encoder_layer_fwd.default._schema.arguments]
    given = {name: argument(node, place, name, None) for place, name in enumerate(names)}
    source = given["src"]
    if given["mask"] is not None or tensor_value(source).ndim != 3:  # type: ignore[union-attr]
        return None
    write = _Writer(graph, node)

    def normalised(value: fx.Node, which: int) -> fx.Node:
        scale, shift = given[f"norm_weight_{which}"], given[f"norm_bias_{which}"]
        return write(F.layer_norm, value, (given["embed_dim"],), scale, shift, given["eps"])

    def attended(value: fx.Node) -> fx.Node:
        weights = (given["qkv_weight"], given["qkv_bias"], given["proj_weight"], given["proj_bias"])
        return _self_attention(write, value, given["num_heads"], weights, (0, 2, 1, 3))

    def forwarded(value: fx.Node) -> fx.Node:
        hidden = write(F.linear, value, given["ffn_weight_1"], given["ffn_bias_1"])
        hidden = write(F.gelu if given["use_gelu"] else F.relu, hidden)
        return write(F.linear, hidden, given["ffn_weight_2"], given["ffn_bias_2"])

    if given["norm_first"]:
        middle = write(torch.add, source, attended(normalised(source, 1)))
        result = write(torch.add, middle, forwarded(normalised(middle, 2)))
    else:
        middle = normalised(write(torch.add, source, attended(source)), 1)
        result = normalised(write(torch.add, middle, forwarded(middle)), 2)
    return Expansion(node.name, node, result, write.nodes)


def _multi_head(graph: fx.Graph, node: fx.Node) -> Expansion | None:
    parameters = inspect.signature(F.multi_head_attention_forward).parameters.values()
    given = {entry.name: argument(node, place, entry.name, entry.default) for place, entry in enumerate(parameters)}
    source, mask = given["query"], given["attn_mask"]
    absent = ("bias_k", "bias_v", "key_padding_mask", "static_k", "static_v")
    flags = ("add_zero_attn", "need_weights", "use_separate_proj_weight")
    random = given["training"] and given["dropout_p"] != 0
    users = list(node.users)
    if (
        any(given[name] is not None for name in absent)
        or any(given[name] for name in flags)
        or random
        or given["key"] is not source
        or given["value"] is not source
        or tensor_value(source).ndim != 3  # type: ignore[union-attr]
        or (mask is not None and tensor_value(mask).ndim != 2)  # type: ignore[union-attr]
        or [(user.target, user.args[1:]) for user in users] != [(getitem, (0,))]
    ):
        return None
    write = _Writer(graph, node)
    causal = bool(given["is_causal"])  # PyTorch then ignores the mask, which only says the same
    weights = (given["in_proj_weight"], given["in_proj_bias"], given["out_proj_weight"], given["out_proj_bias"])
    result = _self_attention(
        write, source, given["num_heads"], weights, (1, 2, 0, 3), mask=None if causal else mask, causal=causal
    )
    return Expansion(node.name, users[0], result, write.nodes)


_FORMS: dict[str, Callable[[fx.Graph, fx.Node], Expansion | None]] = {
    "_transformer_encoder_layer_fwd": _encoder_layer,
    "multi_head_attention_forward": _multi_head,
}
