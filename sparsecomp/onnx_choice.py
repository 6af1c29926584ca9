"""What every site of an ONNX model becomes: the kernel for the sizes of the report, and what other sizes need."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, prod
from typing import TYPE_CHECKING

import onnx_ir as ir
import torch

from sparsecomp.analysis import SiteChooser
from sparsecomp.frontends.onnx import Overlay, build
from sparsecomp.frontends.onnx_fallback import OLDEST_OPSET
from sparsecomp.frontends.onnx_layout import best_mixture
from sparsecomp.frontends.onnx_norm import folds
from sparsecomp.frontends.onnx_shapes import infer
from sparsecomp.ir import ConvSite, LinearSite, Site
from sparsecomp.options import Options
from sparsecomp.passes import DetectConv, DetectLinear, FuseEpilogue, run_passes
from sparsecomp.planner import SiteChoice, decline
from sparsecomp.runtime.facts import facts_of
from sparsecomp.targets.base import DENSE, Candidate, WeightFacts
from sparsecomp.window import Maps

if TYPE_CHECKING:
    from sparsecomp.targets.x86.ort_target import Forms, LibraryTarget


@dataclass(frozen=True)
class Planned:
    """A site and what it becomes.

    Attributes:
        overlay: that it was found in.
        site: as the passes left it.
        choice: for the sizes of the report.
        forms: of the weight of a linear that becomes sparse.
        forced: whether a plan asked for it.
    """

    overlay: Overlay
    site: Site
    choice: SiteChoice
    forms: Forms | None = None
    forced: bool = False


def plan_sites(
    model: ir.Model, options: Options, target: LibraryTarget, shapes: Mapping[str, Sequence[int]] | None
) -> list[Planned]:
    """Find the sites of all graphs of a model and choose what each becomes."""
    if model.opset_imports.get("", OLDEST_OPSET) < OLDEST_OPSET:
        return []
    found = [*found_sites(build(model, infer(model, shapes)))]
    weights = {site.weight_op: site.weight for _, site, facts in found if facts is not None}
    target.weight_bytes = sum(4 * weight.numel() for weight in weights.values())
    return _settle_layouts([_choose(overlay, site, facts, options, target) for overlay, site, facts in found], target)


def found_sites(overlays: Sequence[Overlay]) -> Iterator[tuple[Overlay, Site, WeightFacts | None]]:
    """Find the sites of graphs, under names that differ, with what their weights hold; None where that is not known."""
    taken: dict[str, int] = {}
    for overlay in overlays:
        run_passes(overlay.graph, [DetectLinear(), DetectConv(), FuseEpilogue()])
        for site in overlay.graph.sites:
            # A subgraph has names of its own.
            taken[site.name] = taken.get(site.name, 0) + 1
            if taken[site.name] > 1:
                site.name = f"{site.name}#{taken[site.name]}"
            fits = site.weight.ndim == 2 if isinstance(site, LinearSite) else site.weight.ndim > 2
            known = not site.weight.is_meta and fits and site.weight.numel() > 0
            yield overlay, site, facts_of(site.weight, site.transposed) if known else None


def why_not_ours(overlay: Overlay, site: Site) -> str | None:
    """Why kernels of ours cannot compute a site, None if they can."""
    if site.dtype in (torch.float16, torch.bfloat16):
        return f"it computes in {_plain(site.dtype)}; the kernels are float32: convert the model to that"
    if site.declined is not None:
        return site.declined
    if site.dtype != torch.float32:
        return f"it computes in {_plain(site.dtype)}; the kernels are float32"
    if isinstance(site, ConvSite) and site.norm is not None and not folds(overlay, site):
        return "its batch normalisation is computed at each call"
    return None


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _settle_layouts(planned: list[Planned], target: LibraryTarget) -> list[Planned]:
    """Leave convolutions dense whose gain would be lost in changes of layout beside dense ones."""
    kept: set[int] = set()
    for overlay in {id(item.overlay): item.overlay for item in planned}.values():
        here = [item for item in planned if item.overlay is overlay and isinstance(item.site, ConvSite)]
        gains = {item.site.name: _gain(item) for item in here if not item.choice.chosen.is_dense}
        best = best_mixture(overlay, gains, target.reorder_us(1))
        kept.update(id(item) for item in here if item.site.name in best or item.choice.chosen.is_dense)
    return [item if not isinstance(item.site, ConvSite) or id(item) in kept else _left_dense(item) for item in planned]


def _gain(item: Planned) -> float:
    """Microseconds; what a plan asks for gains more than any layout costs."""
    if item.forced or item.choice.dense_us is None or item.choice.chosen_us is None:
        return inf
    return item.choice.dense_us - item.choice.chosen_us


def _left_dense(item: Planned) -> Planned:
    reason = f"dense: {item.choice.chosen} would gain {_gain(item):.0f} us, less than other layouts of its maps cost "
    reason += "beside convolutions that stay dense"
    return replace(item, choice=replace(item.choice, chosen=DENSE, reason=reason))


def _choose(
    overlay: Overlay, site: Site, facts: WeightFacts | None, options: Options, target: LibraryTarget
) -> Planned:
    reason, rule = why_not_ours(overlay, site), options.excluding(site.name)
    if reason is None and rule is not None:
        reason = f"excluded by {rule!r}"
    if reason is not None or facts is None:
        return Planned(overlay, site, decline(site, reason or "its weight cannot be read", facts))
    chooser = SiteChooser(site, target, options)
    choice = chooser.choice(facts)
    if choice.chosen.is_dense:
        return Planned(overlay, site, choice)
    asked = None if options.plan is None else options.plan.site(site.name, site.tokens)
    forced = asked is not None and asked.chosen == choice.chosen
    if isinstance(site, ConvSite):
        slower = None if forced else _slower_maps(overlay, site, chooser, facts, target, choice.chosen)
        forms = None
    else:
        forms, slower = _forms(
            overlay, site, chooser, facts, target, choice, every=asked is not None and forced and asked.tokens == 0
        )
        slower = None if forced else slower
        if len(forms.candidates) > 1:
            choice = replace(choice, reason=f"{choice.reason}; {forms}")
    if slower is not None:
        choice = replace(choice, chosen=DENSE, reason=f"dense: {slower}")
    return Planned(overlay, site, choice, forms, forced)


def _forms(
    overlay: Overlay,
    site: LinearSite,
    chooser: SiteChooser,
    facts: WeightFacts,
    target: LibraryTarget,
    choice: SiteChoice,
    *,
    every: bool,
) -> tuple[Forms, str | None]:
    """The forms of a weight, and where a call would be slower than dense.

    `every` says that the chosen form is for every number of tokens.
    """
    from sparsecomp.targets.x86.ort_target import Forms, choose_forms, slower_than_dense

    leading = (overlay.graph.operation(site.x).sizes or ())[:-1]
    if every or all(isinstance(size, int) for size in leading):
        return Forms((choice.chosen,)), None

    def price(candidate: Candidate, tokens: int) -> float:
        return target.predict(candidate, chooser.problem(facts, tokens))

    offered = [item.candidate for item in choice.predictions if not item.candidate.is_dense]
    # What was forced may not be among those that are offered for the sizes of the report.
    offered = list(
        dict.fromkeys(
            [*offered, *(c for c in target.candidates(facts) if c.pattern == choice.chosen.pattern and not c.is_dense)]
        )
    )
    unit = prod(size for size in leading if isinstance(size, int))
    forms = choose_forms(price, offered, choice.chosen, max(unit, 1))
    return forms, slower_than_dense(price, forms, max(unit, 1))


def _slower_maps(
    overlay: Overlay, site: ConvSite, chooser: SiteChooser, facts: WeightFacts, target: LibraryTarget, chosen: Candidate
) -> str | None:
    """The maps, of those that a call may have, at which a convolution would be slower than dense; None for none."""
    from sparsecomp.targets.x86.ort_target import slower_maps

    sizes = overlay.graph.operation(site.x).sizes or ()
    images, height, width = (
        isinstance(size, str) for size in (sizes[0], sizes[2] if len(sizes) == 4 else 1, sizes[-1])
    )

    def price(candidate: Candidate, maps: Maps) -> float:
        return target.predict(candidate, chooser.problem(facts, maps))

    return slower_maps(price, chosen, site.maps, (images, height, width))
