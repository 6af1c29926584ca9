"""From the experts of a graph, which are one op, to the site that runs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from sparsecomp.analysis import Analysis, PlannedSite
from sparsecomp.blocks import FfnSite
from sparsecomp.frontends.fx_expand import is_experts
from sparsecomp.ir import LinearSite
from sparsecomp.runtime.experts_site import Expert, LinearExpert, RuntimeExperts
from sparsecomp.runtime.site import RuntimeSite
from sparsecomp.skip_planning import PlannedSkip
from sparsecomp.skip_runtime import runtime_skip
from sparsecomp.targets.base import DENSE, Target

MakeLinear = Callable[[PlannedSite], tuple[Any, str]]
"""Packs the weight of a linear, or gives None and the reason."""


@dataclass
class ReadyExperts:
    """An op of experts that is rewritten.

    Attributes:
        linears: of all experts, as they were planned; those that stay dense are among them.
        runtime: runs them.
    """

    linears: list[PlannedSite]
    runtime: RuntimeExperts


def in_experts(analysis: Analysis) -> set[int]:
    """The `id` of every site of a graph that is inside of an op of experts."""
    ops = {expansion.name for expansion in analysis.expansions if is_experts(expansion.old)}
    return {id(item.site) for item in analysis.sites if item.site.composite in ops}


def rewrite_experts(
    gm: fx.GraphModule, analysis: Analysis, target: Target, verify: bool, make: MakeLinear
) -> list[ReadyExperts]:
    """Let the ops of experts call sites where any expert is sparse or skips; what stays dense is written to its choice.

    Args:
        gm: the graph; only the handle of the ops changes.
        analysis: of the graph.
        target: packs and builds.
        verify: whether skipping is compared with its definition.
        make: packs one linear.
    """
    planned = {id(item.site): item for item in analysis.sites}
    skips = {id(skip.site): skip for skip in analysis.skips}
    found = []
    for node in gm.graph.nodes:
        if not is_experts(node):
            continue
        ffns = [ffn for ffn in analysis.graph.ffns if ffn.down.composite == node.name]
        inside = [item for item in analysis.sites if item.site.composite == node.name]
        for skip in analysis.skips:
            if isinstance(skip.site, LinearSite) and skip.site.composite == node.name:
                _leave(skip.linears, f"experts skip as whole blocks, and {skip.form} is for this linear")
        if all(item.choice.chosen.is_dense for item in inside):
            continue
        whole = len(ffns) == len(node.args[3]) and all(ffn.declined is None for ffn in ffns)
        if not whole or any(item.chooser is None for item in inside):
            _leave(inside, "one of the experts beside it cannot be rewritten")
            continue
        experts: list[Expert] = []
        for ffn in ffns:
            linears = [planned[id(linear)] for linear in ffn.linears]
            expert = _skipping(skips.get(id(ffn)), target, verify) or _linear_expert(ffn, linears, make)
            if expert is None:
                break
            experts.append(expert)
        else:
            ready = ReadyExperts(inside, RuntimeExperts(experts))
            node.args = (*node.args[:-1], ready.runtime.handle)
            found.append(ready)
            continue
        _leave(inside, "an expert beside it could not be prepared")
    return found


def _skipping(skip: PlannedSkip | None, target: Target, verify: bool) -> Expert | None:
    if skip is None:
        return None
    ready, reason = runtime_skip(skip, target, verify)
    if ready is None:
        _leave(skip.linears, reason)
    return ready


def _linear_expert(ffn: FfnSite, linears: list[PlannedSite], make: MakeLinear) -> LinearExpert | None:
    sites = []
    for item in linears:
        site, reason = make(item)
        if not isinstance(site, RuntimeSite):
            _leave([item], reason)
            return None
        sites.append(site)
    return LinearExpert((sites[0], sites[1]), ffn.activation, ffn.gated)


def _leave(linears: Any, reason: str) -> None:
    for item in linears:
        if not item.choice.chosen.is_dense:
            item.choice = replace(item.choice, chosen=DENSE, reason=f"dense: {reason}", declined=True)
