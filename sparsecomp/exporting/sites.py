"""The sites of an ONNX model that is exported: found, chosen, packed, and one operation each in the graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common

from sparsecomp.analysis import SiteChooser
from sparsecomp.exporting.lowering import SITE_OP
from sparsecomp.exporting.program import SiteStep
from sparsecomp.frontends.onnx import Derived, Overlay, build
from sparsecomp.frontends.onnx_norm import fold_norm
from sparsecomp.frontends.onnx_shapes import infer
from sparsecomp.ir import ConvSite, LinearSite, Site
from sparsecomp.kernels.epilogue import Epilogue
from sparsecomp.onnx_choice import found_sites, why_not_ours
from sparsecomp.options import Options
from sparsecomp.planner import SiteChoice, decline
from sparsecomp.targets.arm.cpu import ArmLevel
from sparsecomp.targets.arm.kernels import conv_call, linear_call
from sparsecomp.targets.arm.target import ArmTarget


@dataclass(frozen=True)
class FoundSite:
    """A site of the model's main graph.

    Attributes:
        overlay: that it was found in.
        site: as the passes left it.
        choice: what it becomes.
        computed: whether our kernels compute it, dense ones included; TVM computes what they do not take.
    """

    overlay: Overlay
    site: Site
    choice: SiteChoice
    computed: bool


def find_sites(
    model: ir.Model, shapes: Mapping[str, Sequence[int]], target: ArmTarget, options: Options
) -> list[FoundSite]:
    """Find the sites of the main graph and choose what each becomes.

    Args:
        model: is not changed.
        shapes: of all inputs.
        target: that they are chosen for.
        options: `plan`, `patterns` and `exclude` count.
    """
    found: list[FoundSite] = []
    for overlay, site, facts in found_sites(build(model, infer(model, shapes))[:1]):
        reason = _not_ours(overlay, site)
        if reason is not None or facts is None:
            found.append(FoundSite(overlay, site, decline(site, reason or "its weight cannot be read", facts), False))
            continue
        rule = options.excluding(site.name)
        if rule is not None:
            found.append(FoundSite(overlay, site, decline(site, f"excluded by {rule!r}", facts), True))
            continue
        found.append(FoundSite(overlay, site, SiteChooser(site, target, options).choice(facts), True))
    return found


def _not_ours(overlay: Overlay, site: Site) -> str | None:
    """Why TVM computes a site, None if our kernels do."""
    reason = why_not_ours(overlay, site)
    if reason is not None:
        return reason
    if site.bias is not None and "value" not in overlay.graph.operation(site.bias).attrs:
        return "its bias is computed at each call"
    return None


def pack_sites(
    found: Sequence[FoundSite], target: ArmTarget, level: ArmLevel, threads: int
) -> list[tuple[FoundSite, SiteStep]]:
    """Pack the weights of the sites that our kernels compute.

    Raises:
        ValueError: a site is too large for the kernels.
    """
    packed = []
    for item in found:
        if not item.computed:
            continue
        site, chosen = item.site, item.choice.chosen
        bias = _bias(item)
        if isinstance(site, LinearSite):
            epilogue = Epilogue(site.activation, site.residual is not None)
            weight = site.weight.t() if site.transposed else site.weight
            call = linear_call(level, target.cpu.caches, chosen, weight, (site.tokens, threads), epilogue)
            kernel, pattern = chosen.kernel, chosen.pattern
        else:
            assert site.window is not None
            epilogue = Epilogue(site.activation, site.residual is not None, site.residual_first)
            weight, _ = fold_norm(item.overlay, site)
            call = conv_call(level, target.cpu.caches, weight, site.window, site.maps, threads, epilogue)
            bias = np.concatenate([bias, np.ones_like(bias)])
            kernel, pattern = call.call.source.name.partition("_")[0], chosen.pattern
            kernel = "dense_conv" if kernel == "conv" and chosen.is_dense else kernel
        us = next((p.us for p in item.choice.predictions if p.candidate == chosen), 0.0) / target.scale(kernel)
        packed.append((item, SiteStep(site.name, kernel, pattern, call, bias, us)))
    return packed


def _bias(item: FoundSite) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    site, overlay = item.site, item.overlay
    if isinstance(site, ConvSite) and site.norm is not None:
        folded = fold_norm(overlay, site)[1]
        assert folded is not None
        return folded
    if site.bias is None:
        return np.zeros(site.out_features, np.float32)
    value: torch.Tensor = overlay.graph.operation(site.bias).attrs["value"]
    return value.float().reshape(-1).numpy()


def output_shape(site: Site, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a site's output for that of its input."""
    if isinstance(site, LinearSite):
        return (*shape[:-1], site.out_features)
    assert site.window is not None
    height, width = site.window.output(shape[2] if len(shape) == 4 else 1, shape[-1])
    return (shape[0], site.out_features, *((height, width) if len(shape) == 4 else (width,)))


def replace_sites(model: ir.Model, sites: Sequence[FoundSite]) -> None:
    """Put one operation in the place of each site, in place: it reads x and the residual, if there is one."""
    replaced: dict[ir.Value, ir.Value] = {}
    for index, item in enumerate(sites):
        overlay, site = item.overlay, item.site
        nodes: list[ir.Node] = []
        names = [site.x] if site.residual is None else [site.x, site.residual]
        operands = [_operand(overlay, name, nodes, replaced, f"site_{index}") for name in names]
        node = ir.Node("", SITE_OP, operands, [ir.AttrInt64("index", index)], name=site.name)
        node.outputs[0].name = f"site_{index}.output"
        nodes.append(node)
        old_value = overlay.origin(site.anchor)
        assert isinstance(old_value, ir.Value)
        anchor = old_value.producer()
        assert anchor is not None
        old = list(dict.fromkeys(node for name in site.operations for node in overlay.nodes.get(name, ())))
        ir.convenience.replace_nodes_and_values(overlay.owner, anchor, old, nodes, [old_value], [node.outputs[0]])
        replaced[old_value] = node.outputs[0]
    common.RemoveUnusedNodesPass()(model)


def _operand(
    overlay: Overlay, name: str, nodes: list[ir.Node], replaced: Mapping[ir.Value, ir.Value], stem: str
) -> ir.Value:
    origin = overlay.origin(name)
    if not isinstance(origin, Derived):
        return replaced.get(origin, origin)
    if origin.tensor is not None:
        node = ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.tensor(origin.tensor))])
    else:
        assert origin.transposed is not None
        source = replaced.get(origin.transposed, origin.transposed)
        node = ir.Node("", "Transpose", [source], [ir.AttrInt64s("perm", [1, 0])])
    node.outputs[0].name = f"{stem}.operand_{len(nodes)}"
    nodes.append(node)
    return node.outputs[0]
