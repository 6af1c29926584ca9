"""Max pooling behind convolutions that became sparse: their maps lie channels first, as our kernel wants them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from sparsecomp.frontends.fx import Replacement
from sparsecomp.frontends.fx_ops import argument, classify, function_name, tensor_value
from sparsecomp.ir import ConvSite
from sparsecomp.log import log
from sparsecomp.runtime.pool import MAX_POOL
from sparsecomp.targets.base import Target
from sparsecomp.window import Window, form_of

_NEVER_NEGATIVE = ("relu", "relu6")


def use_pools(gm: fx.GraphModule, replaced: Sequence[Replacement], target: Target) -> int:
    """Put our op in the place of the max poolings that read a sparse convolution, in place.

    Zeros that are padded to what no activation left negative do not change a maximum, so that they become positions
    outside of the map.

    Args:
        gm: The graph, rewritten.
        replaced: The convolutions, and other sites.
        target: Whose kernel it is to be.

    Returns:
        How many there were.
    """
    found = 0
    positive = {item.handle for item in replaced if isinstance(item.site, ConvSite) and _never_negative(item.site)}
    for node in list(gm.graph.nodes):
        if function_name(node) not in ("max_pool2d", "_max_pool2d"):
            continue
        place = _place(node, positive)
        if place is None or target.prepare_pool(place[1]) is None:
            continue
        form = form_of(place[1], place[1].groups)
        with gm.graph.inserting_before(node):
            new = gm.graph.call_function(MAX_POOL, (place[0], target.name, form))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        log.info("%s: max pooling by a kernel of %s, as its maps lie channels first", node.name, target.name)
        source = node.all_input_nodes[0]
        gm.graph.erase_node(node)
        if source is not place[0] and not source.users:
            gm.graph.erase_node(source)
        found += 1
    if found:
        gm.graph.lint()
        gm.recompile()
    return found


def _never_negative(site: ConvSite) -> bool:
    return site.activation in _NEVER_NEGATIVE and (site.residual is None or site.residual_first)


def _place(node: fx.Node, positive: set[int]) -> tuple[fx.Node, Window] | None:
    """The convolution that a max pooling reads, and its window; None for forms that there is no kernel for."""
    value = tensor_value(node)
    kernel = _pair(argument(node, 1, "kernel_size"))
    stride = _pair(argument(node, 2, "stride", None) or kernel)
    padding, dilation = _pair(argument(node, 3, "padding", 0)), _pair(argument(node, 4, "dilation", 1))
    special = argument(node, 5, "ceil_mode", False) or argument(node, 6, "return_indices", False)
    if special or value is None or value.dim() != 4 or value.dtype != torch.float32:
        return None
    if kernel is None or stride is None or padding is None or dilation is None:
        return None
    source, extra = argument(node, 0, "input"), (0, 0)
    padded = classify(source) if isinstance(source, fx.Node) else None
    if padded is not None and padded.kind == "pad":
        before, extra = _sides(padded.attrs["amounts"])
        (source,) = padded.operands
        if not _is_conv(source) or source.args[3] not in positive or before is None or any(padding):
            return None
        padding = before
    # Every window must have a position within the map.
    sides = zip(padding, extra, kernel, strict=True)
    if not _is_conv(source) or any(p + e >= k for p, e, k in sides) or dilation != (1, 1):
        return None
    return source, Window(kernel, stride, padding, dilation, int(value.shape[1]), extra)


def _sides(amounts: Sequence[int]) -> tuple[tuple[int, int] | None, tuple[int, int]]:
    """Padding of both sides, rows and columns, and what the ends have beyond; None for amounts that do not split so."""
    if len(amounts) != 4:
        return None, (0, 0)
    left, right, top, bottom = amounts
    if not (0 <= left <= right and 0 <= top <= bottom):
        return None, (0, 0)
    return (top, left), (bottom - top, right - left)


def _is_conv(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is torch.ops.sparsecomp.conv.default


def _pair(value: Any) -> tuple[int, int] | None:
    pair = value if isinstance(value, (tuple, list)) else (value, value)
    pair = tuple(pair) * (2 if len(pair) == 1 else 1)
    return (pair[0], pair[1]) if len(pair) == 2 and all(type(number) is int for number in pair) else None
