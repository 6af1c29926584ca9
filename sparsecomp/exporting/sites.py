"""The sites of an ONNX model that is exported: found, chosen, packed, and one operation each in the graph."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common

from sparsecomp.analysis import SiteChooser
from sparsecomp.exporting.lowering import SITE_OP
from sparsecomp.exporting.program import Count, SiteStep, product
from sparsecomp.exporting.quantised import is_dequantised, quantised
from sparsecomp.frontends.onnx import Derived, Overlay, build
from sparsecomp.frontends.onnx_norm import fold_norm
from sparsecomp.frontends.onnx_shapes import infer
from sparsecomp.ir import ConvSite, LinearSite, Site
from sparsecomp.kernels.epilogue import Epilogue
from sparsecomp.onnx_choice import found_sites, why_not_ours
from sparsecomp.options import Options
from sparsecomp.planner import SiteChoice, decline
from sparsecomp.targets.arm.cpu import ArmLevel
from sparsecomp.targets.arm.dot import INT8, Quantised, QuantisedWeight
from sparsecomp.targets.arm.kernels import CONV_HALF, Call, LinearWeight, SiteCall, pack_conv
from sparsecomp.targets.arm.target import ArmTarget
from sparsecomp.targets.base import DENSE, Candidate, WeightFacts

_MOST_IMAGES = 64
"""Images up to which the calls of convolutions are cut for a range."""


@dataclass(frozen=True)
class FoundSite:
    """A site of the model's main graph.

    Attributes:
        overlay: that it was found in.
        site: as the passes left it.
        choice: what it becomes.
        computed: whether our kernels compute it, dense ones included; TVM computes what they do not take.
        price: microseconds of a candidate with so many tokens; None where a plan or an option chose.
        integers: of a linear that computes in int8, with the value that its input is quantised from.
    """

    overlay: Overlay
    site: Site
    choice: SiteChoice
    computed: bool
    price: Callable[[Candidate, int], float] | None = None
    integers: tuple[Quantised, ir.Value] | None = None


def find_sites(
    model: ir.Model, shapes: Mapping[str, Sequence[int]], target: ArmTarget, options: Options, threads: int
) -> list[FoundSite]:
    """Find the sites of the main graph and choose what each becomes.

    Args:
        model: is not changed.
        shapes: of all inputs.
        target: that they are chosen for.
        options: `plan`, `patterns` and `exclude` count.
        threads: that a call may use.
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
        integers, why_not = _integers(overlay, site, target)
        offers = target if integers is None else ArmTarget(target.cpu, target.half, quantised=True)
        chooser = SiteChooser(site, offers, options, threads=threads)
        choice = chooser.choice(facts)
        if why_not:
            choice = replace(choice, reason=f"{choice.reason}; not int8: {why_not}")
        if choice.chosen.kernel != INT8:
            integers = None
        asked = None if options.plan is None else options.plan.site(site.name, site.tokens)
        # In int8 dense and sparse take other inputs than in float32: one of both for all sizes.
        price = None if asked is not None or integers else functools.partial(_price, chooser, facts, target)
        found.append(FoundSite(overlay, site, choice, True, price, integers))
    return found


def _integers(overlay: Overlay, site: Site, target: ArmTarget) -> tuple[tuple[Quantised, ir.Value] | None, str]:
    """What a linear of a QDQ model computes with, None for others; why one whose weight is quantised has none."""
    if not isinstance(site, LinearSite) or not is_dequantised(overlay, site):
        return None, ""
    if not target.cpu.dotprod:
        return None, f"{target.cpu.name} has no dot products"
    try:
        return quantised(overlay, site), ""
    except ValueError as error:
        return None, str(error)


def _price(chooser: SiteChooser, facts: WeightFacts, target: ArmTarget, candidate: Candidate, tokens: int) -> float:
    return target.predict(candidate, chooser.problem(facts, tokens))


def _not_ours(overlay: Overlay, site: Site) -> str | None:
    """Why TVM computes a site, None if our kernels do."""
    reason = why_not_ours(overlay, site)
    if reason is not None:
        return reason
    if site.bias is not None and "value" not in overlay.graph.operation(site.bias).attrs:
        return "its bias is computed at each call"
    return None


def pack_sites(
    found: Sequence[FoundSite], shapes: Sequence[tuple[Count, ...]], target: ArmTarget, level: ArmLevel, threads: int
) -> list[SiteStep]:
    """Pack the weights of sites that our kernels compute, and cut their calls for all sizes that these may have.

    Args:
        found: the sites.
        shapes: of the x of each.
        target: that they were chosen for.
        level: of the schedules.
        threads: that a call may use.

    Raises:
        ValueError: a site is too large for the kernels.
    """
    return [_packed(item, shape, target, level, threads) for item, shape in zip(found, shapes, strict=True)]


def _packed(item: FoundSite, shape: tuple[Count, ...], target: ArmTarget, level: ArmLevel, threads: int) -> SiteStep:
    site, chosen, bias = item.site, item.choice.chosen, _bias(item)
    calls: list[tuple[int, SiteCall]] = []
    if isinstance(site, LinearSite):
        epilogue = Epilogue(site.activation, site.residual is not None)
        matrix = site.weight.t() if site.transposed else site.weight
        packed: dict[Candidate, LinearWeight | QuantisedWeight] = {}
        for most in range_ends(product(shape[:-1])):
            best = _best(item, most)
            if best not in packed and item.integers is not None:
                packed[best] = whole = QuantisedWeight.pack(level, best, item.integers[0], bias)
                bias = whole.terms
            elif best not in packed:
                packed[best] = LinearWeight.pack(level, target.cpu.caches, best, matrix)
            call = packed[best].call(most, threads, epilogue)
            if calls and _same_cut(calls[-1][1].call, call.call):
                calls.pop()
            calls.append((most, call))
        kernel = chosen.kernel
    else:
        assert site.window is not None
        epilogue = Epilogue(site.activation, site.residual is not None, site.residual_first)
        weight, _ = fold_norm(item.overlay, site)
        if shape[0].most > _MOST_IMAGES and not shape[0].fixed:
            raise ValueError(
                f"{site.name}: a call is cut for each number of images, so that a range may end at {_MOST_IMAGES} of "
                f"them; given {shape[0].most}"
            )
        half = chosen.kernel == CONV_HALF
        maps_weight = pack_conv(level, target.cpu.caches, weight, site.window, half=half)
        for images in range(shape[0].least, shape[0].most + 1):
            maps = replace(site.maps, images=images)
            calls.append((images, maps_weight.call(maps, threads, epilogue)))
        bias = np.concatenate([bias, np.ones_like(bias)])
        kernel = CONV_HALF if half else calls[-1][1].call.source.name.partition("_")[0]
        kernel = "dense_conv" if kernel == "conv" and chosen.is_dense else kernel
    us = next((p.us for p in item.choice.predictions if p.candidate == chosen), 0.0) / target.scale(kernel)
    return SiteStep(site.name, kernel, chosen.pattern, tuple(calls), bias, us)


def _same_cut(a: Call, b: Call) -> bool:
    """Whether two calls of a linear differ in the number of tokens alone."""
    return (a.source.name, a.dims[1:], a.step) == (b.source.name, b.dims[1:], b.step) and a.arrays is b.arrays


def range_ends(tokens: Count) -> list[int]:
    """The most tokens of ranges of sizes whose calls are cut alike: no tile has much less to do than it could."""
    ends = [end for power in range(31) for end in (2**power, 3 * 2**power) if tokens.least <= end < tokens.most]
    return [*sorted(ends), tokens.most]


def _best(item: FoundSite, tokens: int) -> Candidate:
    """What was chosen for the largest sizes, or dense where that is predicted to be faster with fewer tokens."""
    chosen = item.choice.chosen
    if item.price is None or chosen.is_dense or item.price(chosen, tokens) <= item.price(DENSE, tokens):
        return chosen
    return DENSE


def dense_up_to(item: FoundSite, step: SiteStep) -> int:
    """The most tokens with which a site that is sparse with more runs dense; 0 for none."""
    return max((most for most, _ in step.calls if _best(item, most) != item.choice.chosen), default=0)


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


def output_shape(site: Site, shape: tuple[Any, ...]) -> tuple[Any, ...]:
    """The shape of a site's output for that of its input, whose dimensions may be numbers or what TVM computes with.

    Raises:
        ValueError: a convolution has maps whose height or width changes from call to call.
    """
    if isinstance(site, LinearSite):
        return (*shape[:-1], site.out_features)
    assert site.window is not None
    if not all(isinstance(size, int) for size in shape[1:]):
        raise ValueError(f"the maps of the convolution {site.name} must have a fixed height and width")
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
        if item.integers is not None:
            source = item.integers[1]
            operands[0] = replaced.get(source, source)
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
