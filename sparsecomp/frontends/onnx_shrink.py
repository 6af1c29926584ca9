"""Remove hidden units, channels and heads that do nothing, for real: smaller dense weights in standard operations.

A hidden unit lies between two linears, or a channel between two convolutions, of which the first gives its value to the
second alone. It is dead when the second does not read it (its column is zero) or when the first always gives the same
for it (its row is zero); what that constant adds is then a part of the second's bias. A head of attention is dead when
the linear that mixes the heads does not read it, or when its values are zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from torch import Tensor

from sparsecomp.frontends.onnx import Overlay
from sparsecomp.frontends.onnx_apply import StandardSite, replace_with_standard
from sparsecomp.frontends.onnx_heads import Attention, find_attention, set_heads
from sparsecomp.frontends.onnx_norm import fold_norm, folds
from sparsecomp.ir import ConvSite, LinearSite, Site
from sparsecomp.kernels.epilogue import activate_reference

_Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Shrunk:
    """A layer that became smaller.

    Attributes:
        name: of the first of its two sites; of an attention, of the linear that mixes the heads.
        units: hidden units, channels or heads before.
        removed: of them.
        kind: what they are: `units` or `heads`.
    """

    name: str
    units: int
    removed: int
    kind: str = "units"

    def __str__(self) -> str:
        return f"{self.name}: {self.removed} of {self.units} {self.kind} removed"


def shrink(model: ir.Model, overlays: list[Overlay]) -> list[Shrunk]:
    """Remove the dead units of a model, in place.

    Args:
        model: that the overlays, with their sites, were built on.
        overlays: of its graphs.

    Returns:
        The layers that became smaller.
    """
    found: list[Shrunk] = []
    standard: dict[int, StandardSite] = {}
    for overlay in overlays:
        for attention in find_attention(overlay):
            before = [_standard(overlay, site) for site in attention.sources]
            after = _standard(overlay, attention.mix)
            if after is None or any(site is None for site in before):
                continue
            kept = _remove_heads(attention, [site for site in before if site is not None], after)
            if kept < attention.heads:
                set_heads(overlay.owner, attention, kept)
                found.append(Shrunk(attention.mix.name, attention.heads, attention.heads - kept, "heads"))
                for site, new in zip((*attention.sources, attention.mix), (*before, after), strict=True):
                    if new is not None:
                        standard[id(site)] = new
        for first, second in _pairs(overlay):
            above = standard.get(id(first)) or _standard(overlay, first)
            below = standard.get(id(second)) or _standard(overlay, second)
            if above is None or below is None:
                continue
            dead = _remove_dead(first, above, below)
            if dead:
                found.append(Shrunk(first.name, first.out_features, dead))
                standard[id(first)], standard[id(second)] = above, below
    replace_with_standard(model, list(standard.values()))
    return found


def _pairs(overlay: Overlay) -> list[tuple[Site, Site]]:
    """Sites of one kind of which the second alone reads the value of the first."""
    graph = overlay.graph
    by_input: dict[str, list[Site]] = {}
    for site in graph.sites:
        if site.declined is None:
            by_input.setdefault(site.x, []).append(site)
    pairs: list[tuple[Site, Site]] = []
    for first in graph.sites:
        readers = by_input.get(first.anchor, [])
        if first.declined is not None or first.residual is not None or len(readers) != 1:
            continue
        second = readers[0]
        grouped = isinstance(second, ConvSite) and (second.window is None or second.window.groups > 1)
        grouped |= isinstance(first, ConvSite) and (first.window is None or first.window.groups > 1)
        users = [user.name for user in graph.users(first.anchor)]
        if type(first) is type(second) and not grouped and users == [second.operations[0]]:
            pairs.append((first, second))
    return pairs


def _standard(overlay: Overlay, site: Site) -> StandardSite | None:
    """A site with its weight and bias as arrays of their own; None if they are not constant."""
    bias: _Array | None = None
    if isinstance(site, ConvSite):
        if not folds(overlay, site):
            return None
        weight, bias = fold_norm(overlay, site)
    else:
        weight = site.weight.t() if site.transposed else site.weight
    if bias is None and site.bias is not None:
        value: Tensor | None = overlay.graph.operation(site.bias).attrs.get("value")
        if value is None:
            return None
        bias = value.float().numpy()
    return StandardSite(overlay, site, weight.float().numpy().copy(), bias)


def _remove_dead(site: Site, first: StandardSite, second: StandardSite) -> int:
    """Remove the dead units between two sites; returns how many."""
    units = first.weight.shape[0]
    axes = (0, *range(2, second.weight.ndim))
    unread = ~(second.weight != 0).any(axis=axes)
    unmade = ~(first.weight != 0).any(axis=tuple(range(1, first.weight.ndim)))
    bias = first.bias if first.bias is not None else np.zeros(units, np.float32)
    constant = activate_reference(site.activation, bias.astype(np.float64))
    if isinstance(site, LinearSite):
        added = second.weight[:, unmade].astype(np.float64) @ constant[unmade]
        if added.any():
            second.bias = (added + (0 if second.bias is None else second.bias)).astype(np.float32)
    else:
        # At the border of a padded map the constant is missing: only zeros go without a trace.
        unmade &= constant == 0
    kept = ~(unread | unmade)
    if not kept.any():
        # A dimension of none is more than most kernels expect: one stays, and what it adds is in the bias already.
        kept[0] = True
        second.weight[:, 0] = 0
    first.weight, second.weight = first.weight[kept], second.weight[:, kept]
    first.bias = None if first.bias is None else first.bias[kept]
    return units - int(kept.sum())


def _remove_heads(attention: Attention, sources: list[StandardSite], mix: StandardSite) -> int:
    """Remove the dead heads of an attention; returns how many stay."""
    heads, size = attention.heads, attention.size
    values = sources[2]
    unread = ~(mix.weight != 0).reshape(-1, heads, size).any(axis=(0, 2))
    unmade = ~(values.weight != 0).reshape(heads, -1).any(axis=1)
    if values.bias is not None:
        unmade &= ~(values.bias != 0).reshape(heads, size).any(axis=1)
    kept = ~(unread | unmade)
    if not kept.any():
        kept[0] = True
        mix.weight[:, :size] = 0
    units = np.repeat(kept, size)
    for source in sources:
        source.weight = source.weight[units]
        source.bias = None if source.bias is None else source.bias[units]
    mix.weight = mix.weight[:, units]
    return int(kept.sum())
