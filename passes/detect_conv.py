"""Find the convolutions with a constant weight, and say why a candidate stays dense."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import torch

from sparsecomp.ir import ConvSite, Operation, SparseGraph
from sparsecomp.passes.base import Pass, PassResult
from sparsecomp.passes.detect_linear import (
    constant_reason,
    site_name,
    storage_reason,
    type_name,
    types_reason,
    unique_name,
    weight_changes,
)
from sparsecomp.window import Maps, Window


class DetectConv(Pass):
    """Add a site for every convolution; what cannot be rewritten is declined with its reason."""

    name = "detect_conv"

    def run(self, graph: SparseGraph) -> PassResult:
        """Add the sites, in graph order among those that are there."""
        transforms = any(operation.kind == "transform" for operation in graph)
        notes = []
        for operation in graph:
            if operation.kind != "conv":
                continue
            site = _site(graph, operation)
            if site.declined is None and transforms:
                site.declined = "it runs under torch.func (vmap, grad, jvp), for which the sparse op has no rule"
            site.name = unique_name(graph, site.name)
            graph.sites.append(site)
            notes.append(str(site))
        graph.sites.sort(key=lambda site: graph.position(site.operations[0]))
        return PassResult(bool(notes), tuple(notes))


def _site(graph: SparseGraph, operation: Operation) -> ConvSite:
    x = graph.operation(operation.inputs[0])
    constant, reason = constant_reason(graph, operation.inputs[1])
    weight = constant.attrs.get("value")
    if reason is not None or weight is None:
        weight = torch.empty(constant.shape, device="meta")
    site = ConvSite(
        name=site_name(operation, constant),
        weight=weight,
        weight_op=constant.name,
        weight_index=int(constant.attrs.get("index", -1)),
        window=None,
        x=x.name,
        maps=Maps(0, 0, 0),
        operations=(operation.name,),
        tokens=operation.shape[0] * prod(operation.shape[2:]) if len(operation.shape) > 2 else 0,
        dynamic=any(isinstance(size, str) for size in x.sizes or ()),
        dtype=operation.dtype or weight.dtype,
        composite=str(operation.attrs.get("composite", "")),
    )
    site.declined = reason or _kind_reason(operation) or _why_declined(graph, site, operation)
    if site.declined is None:
        site.maps = Maps(x.shape[0], x.shape[2] if len(x.shape) == 4 else 1, x.shape[-1])
        site.declined = _read_window(site, operation) or _attach_bias(graph, site, operation)
        _absorb_padding(graph, site)
    return site


def _absorb_padding(graph: SparseGraph, site: ConvSite) -> None:
    """Take in a padding with zeros that only the convolution reads, as of layers that pad one side more."""
    pad = graph.operation(site.x)
    amounts = pad.attrs.get("amounts", ())
    if pad.kind != "pad" or site.window is None or len(graph.users(pad.name)) != 1:
        return
    # From the last dimension backwards, two numbers each.
    dims = site.weight.ndim - 2
    left, right, top, bottom = (*amounts, 0, 0, 0, 0)[:4]
    if min(amounts) < 0 or any(amounts[2 * dims :]) or (dims == 1 and (top or bottom)) or right < left or bottom < top:
        return
    source, window = graph.operation(pad.inputs[0]), site.window
    padding = (window.padding[0] + top, window.padding[1] + left)
    extra = (bottom - top, right - left)
    site.window = replace(window, padding=padding, extra=extra)
    site.maps = Maps(site.maps.images, site.maps.height - top - bottom, site.maps.width - left - right)
    site.x, site.operations = source.name, (pad.name, *site.operations)


def _kind_reason(operation: Operation) -> str | None:
    function = str(operation.attrs["function"])
    if function.startswith("conv_transpose"):
        return f"it is a transposed convolution ({function}), for which there is no sparse kernel"
    if function == "conv3d":
        return "it is a three-dimensional convolution, for which there is no sparse kernel"
    return None


def _why_declined(graph: SparseGraph, site: ConvSite, operation: Operation) -> str | None:
    x, weight = graph.operation(site.x), site.weight
    if (reason := storage_reason(weight)) is not None:
        return reason
    if weight.is_complex():
        return "it is a complex convolution, for which there is no sparse kernel"
    if weight.numel() == 0:
        return f"its weight has shape {tuple(weight.shape)} and no elements"
    if (reason := types_reason(x, weight, operation)) is not None:
        return reason
    if len(x.shape) != weight.ndim:
        return f"its input has shape {list(x.sizes or ())}, without a batch dimension; add one (unsqueeze(0))"
    if not operation.contiguous:
        return "its output is laid out channels last; the sparse kernel reads and writes channels first (contiguous)"
    return weight_changes(graph, site.weight_op)


def _read_window(site: ConvSite, operation: Operation) -> str | None:
    """Set the window of a site; the reason if that cannot be."""
    dims = site.weight.ndim - 2
    attrs: dict[str, Any] = operation.attrs
    kernel, groups = tuple(int(size) for size in site.weight.shape[2:]), attrs["groups"]
    stride, dilation = _pair(attrs["stride"], dims), _pair(attrs["dilation"], dims)
    padding = attrs["padding"]
    if isinstance(padding, str) and dilation is not None:
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        if padding == "same" and any(size % 2 for size in total):
            return f"padding='same' pads a kernel of {' x '.join(map(str, kernel))} unevenly; pad beforehand (F.pad)"
        padding = tuple(size // 2 for size in total) if padding == "same" else 0
    padding = _pair(padding, dims)
    if stride is None or padding is None or dilation is None or not isinstance(groups, int):
        return "its stride, padding, dilation or groups are not constant"
    # A one-dimensional convolution is one over maps of height 1.
    flat = dims == 1
    site.window = Window(
        (1, kernel[0]) if flat else (kernel[0], kernel[1]),
        (1, stride[0]) if flat else (stride[0], stride[1]),
        (0, padding[0]) if flat else (padding[0], padding[1]),
        (1, dilation[0]) if flat else (dilation[0], dilation[1]),
        groups,
    )
    return None


def _pair(value: Any, dims: int) -> tuple[int, ...] | None:
    """An argument given as one number or as one for each dimension; None if it is not constant."""
    numbers = (value,) * dims if isinstance(value, int) else tuple(value)
    if len(numbers) == 1:
        numbers *= dims
    return numbers if len(numbers) == dims and all(isinstance(number, int) for number in numbers) else None


def _attach_bias(graph: SparseGraph, site: ConvSite, operation: Operation) -> str | None:
    if len(operation.inputs) < 3:
        return None
    bias = graph.operation(operation.inputs[2])
    if bias.dtype != operation.dtype or bias.sizes != (site.out_features,):
        return f"its bias is {type_name(bias.dtype)} of shape {list(bias.sizes or ())}, expected [{site.out_features}]"
    site.bias = bias.name
    return None
