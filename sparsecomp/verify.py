"""`verify`: a rewritten site against dense, on random input."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sparsecomp.ir import ConvSite, LinearSite, Site
from sparsecomp.runtime.conv_site import RuntimeConv
from sparsecomp.runtime.device_site import DeviceSite
from sparsecomp.runtime.site import RuntimeSite
from sparsecomp.runtime.weight_site import ACTIVATIONS
from sparsecomp.window import convolve, form_of

VERIFY_TOKENS = 4096
"""At most this many tokens of a linear are used."""


def difference(site: Site, runtime: RuntimeSite | DeviceSite | RuntimeConv) -> float:
    """The largest difference of a site from dense on random input, relative to the largest value of dense."""
    runtime.refresh(site.weight)
    if isinstance(site, LinearSite):
        expected, given = _linear(site, runtime.handle)
    else:
        expected, given = _conv(site, runtime.handle)
    if given.shape != expected.shape or given.dtype != expected.dtype:
        return float("inf")
    expected, given = expected.double(), given.double()
    finite = expected.isfinite()
    if not torch.equal(finite, given.isfinite()):
        return float("inf")
    expected, given = expected[finite], given[finite]
    if expected.numel() == 0:
        return 0.0
    scale = expected.abs().max().item()
    largest = (given - expected).abs().max().item()
    return largest / scale if scale else largest


class _Random:
    def __init__(self, weight: Tensor) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._weight = weight

    def __call__(self, *shape: int) -> Tensor:
        value = torch.randn(*shape, generator=self._generator)
        return (value * 32 if self._weight.dtype == torch.int8 else value).to(self._weight)


def _linear(site: LinearSite, handle: int) -> tuple[Tensor, Tensor]:
    random = _Random(site.weight)
    tokens = max(1, min(site.tokens, VERIFY_TOKENS))
    x = random(tokens, site.in_features)
    bias = random(site.out_features) if site.bias is not None else None
    residual = random(tokens, site.out_features) if site.residual is not None else None
    weight = site.weight.detach()
    matrix = weight.t() if site.transposed else weight
    expected = torch._int_mm(x, matrix.t()) if site.dtype == torch.int8 else functional.linear(x, matrix, bias)
    expected = ACTIVATIONS[site.activation](expected)
    if residual is not None:
        expected = expected + residual
    return expected, torch.ops.sparsecomp.linear(x, bias, residual, handle, site.out_features, site.activation)


def _conv(site: ConvSite, handle: int) -> tuple[Tensor, Tensor]:
    window, maps, weight = site.window, site.maps, site.weight.detach()
    if window is None:
        raise ValueError(f"convolution {site.name} has no window")
    random = _Random(site.weight)
    flat = weight.dim() == 3
    x = random(1, weight.shape[1] * window.groups, *([maps.width] if flat else [maps.height, maps.width]))
    terms = torch.cat([torch.linspace(-1, 1, site.out_features), torch.linspace(0.5, 1.5, site.out_features)])
    value = convolve(x, weight, window)
    shift, scale = terms.reshape(2, -1, *[1] * (x.dim() - 2))
    value = (value * scale + shift).to(x.dtype)
    residual = random(*value.shape) if site.residual is not None else None
    if residual is not None and site.residual_first:
        value = value + residual
    value = ACTIVATIONS[site.activation](value)
    if residual is not None and not site.residual_first:
        value = value + residual
    return value, torch.ops.sparsecomp.conv(x, terms, residual, handle, form_of(window, site.out_features))
