"""From Dynamo's graph to a choice for every site: what `torch.compile` and `explain` have in common."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from sparsecomp.frontends.fx import build
from sparsecomp.frontends.fx_expand import Expansion, expand
from sparsecomp.ir import ConvSite, Site, SparseGraph
from sparsecomp.log import GRAPHS, DebugFolder, log
from sparsecomp.options import Options
from sparsecomp.passes import Pass, PassResult, default_passes, run_passes
from sparsecomp.patterns import Pattern
from sparsecomp.planner import Prediction, SiteChoice, choose, decline, measure
from sparsecomp.planner.choose import offered_candidates
from sparsecomp.planner.layouts import SiteCosts, choose_layouts
from sparsecomp.runtime.facts import facts_of
from sparsecomp.runtime.failures import failures_of
from sparsecomp.skip_planning import PlannedSkip, plan_skips
from sparsecomp.targets.base import DENSE, DEPTHWISE, Candidate, Problem, Target, WeightFacts
from sparsecomp.window import Maps

HOPELESS = 3.0
"""Autotuning measures no candidate that is predicted to take this many times as long as dense."""


class SiteChooser:
    """Chooses a candidate for a site, also for a number of tokens or a weight that was not there at compile time.

    Args:
        site: gives name, activation, residual and type; it is not kept.
        target: offers and prices the candidates.
        options: as given to the backend.
        measured: microseconds by candidate at the site's number of tokens, if it was autotuned.
        threads: that a call may use; those of PyTorch if None.

    Attributes:
        instead: what takes the place of dense, where the layout of its neighbours decides; None elsewhere.
    """

    instead: Candidate | None = None

    def __init__(
        self,
        site: Site,
        target: Target,
        options: Options,
        measured: dict[Candidate, float] | None = None,
        threads: int | None = None,
    ) -> None:
        self._name, self._dynamic, self._tokens = site.name, site.dynamic, site.tokens
        self._activation, self._residual, self._dtype = site.activation, site.residual is not None, site.dtype
        self._target, self._options, self._measured, self._threads = target, options, measured, threads
        self._window = site.window if isinstance(site, ConvSite) else None
        self._maps = site.maps if isinstance(site, ConvSite) else None

    def problem(self, facts: WeightFacts, call: int | Maps | None = None) -> Problem:
        """What the site computes for a weight and a number of tokens, or maps; for those that were seen if None."""
        tokens, maps = (call, self._maps) if isinstance(call, int) else (self._tokens, call or self._maps)
        if self._window is not None and maps is not None:
            tokens = maps.positions(self._window)
        return Problem(
            facts,
            tokens,
            torch.get_num_threads() if self._threads is None else self._threads,
            self._activation,
            self._residual,
            self._dtype,
            self._window,
            maps,
        )

    def choice(self, facts: WeightFacts, call: int | Maps | None = None) -> SiteChoice:
        """The choice with its reason."""
        problem = self.problem(facts, call)
        return choose(
            facts,
            problem,
            self._target,
            self._options,
            name=self._name,
            dynamic=self._dynamic,
            measured=self._measured if (problem.tokens, problem.maps) == (self._tokens, self._maps) else None,
        )

    def __call__(self, facts: WeightFacts, call: int | Maps | None = None) -> Candidate:
        """The candidate alone, as the run time asks for it."""
        chosen = self.choice(facts, call).chosen
        return self.instead if chosen.is_dense and self.instead is not None else chosen


class StaysDense:
    """Whether the choice for a weight is still dense; a guard asks at every call, so it is quick for known weights.

    Args:
        site: that was left dense; its own weight counts as known.
        chooser: of the site.
    """

    def __init__(self, site: Site, chooser: SiteChooser) -> None:
        self._transposed, self._chooser = site.transposed, chooser
        self._known: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        if site.weight is not None:
            self._remember(site.weight)

    def _remember(self, weight: Tensor) -> None:
        # An id may be used again after its tensor died: the reference tells.
        self._known[id(weight)] = (weakref.ref(weight), weight._version)

    def __call__(self, weight: Any) -> bool:
        """False sends the call to another compiled graph, or to the compiler."""
        known = self._known.get(id(weight))
        if known is not None and known[1] == weight._version and known[0]() is weight:
            return True
        if type(weight) not in (Tensor, torch.nn.Parameter) or weight.is_inference():
            return True  # such a weight stays dense whatever it holds
        with torch.no_grad():
            dense = self._chooser(facts_of(weight, self._transposed)).is_dense
        if dense:
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            self._remember(weight)
        return dense


_MAX_KNOWN = 4096


@dataclass
class PlannedSite:
    """A site and what it becomes.

    Attributes:
        site: as the passes left it.
        choice: the decision for the shapes that were seen.
        chooser: makes the decision for other shapes; None where the site cannot be rewritten.
        dry: whether nothing is going to run, and the weight is not looked at; there is no chooser then.
    """

    site: Site
    choice: SiteChoice
    chooser: SiteChooser | None = None
    dry: bool = False

    @property
    def can_run(self) -> bool:
        """Whether the site could be rewritten, as far as is known without its weight."""
        return self.dry or self.chooser is not None


@dataclass
class Analysis:
    """What is known of one graph before it is rewritten.

    Attributes:
        graph: the overlay, with its sites.
        sites: the decisions, in graph order.
        reasons: why the whole graph stays dense, if it does.
        expansions: PyTorch's composites that were taken apart; `settle` has to decide them before the graph is used.
        skips: what skips at run time; the linears of these are not rewritten by themselves.
    """

    graph: SparseGraph
    sites: list[PlannedSite] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    expansions: list[Expansion] = field(default_factory=list)
    skips: list[PlannedSkip] = field(default_factory=list)

    @property
    def choices(self) -> list[SiteChoice]:
        """The decisions alone."""
        return [planned.choice for planned in self.sites]


@dataclass(frozen=True)
class DryRun:
    """That nothing is going to run, so that weights may be missing, and on any device.

    Attributes:
        assume: what all weights are taken to satisfy, whatever they hold; None: what they hold counts.
    """

    assume: Pattern | None = None

    def choice(self, site: Site, chooser: SiteChooser) -> SiteChoice | None:
        """The choice for a weight that is not looked at; None if it has to be."""
        shape = (site.out_features, site.in_features)
        if self.assume is not None:
            choice = chooser.choice(WeightFacts.assumed(*shape, self.assume))
            return replace(choice, reason=f"{choice.reason}; assuming {self.assume}")
        if not _valueless(site.weight):
            return None
        # Priced as a full weight, which is what dense computes.
        choice = chooser.choice(replace(WeightFacts.assumed(*shape, Pattern("dense")), patterns=()))
        return replace(choice, reason="dense: its zeros are not known, as its weight has no values; assume a pattern")


def analyse(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    target: Target,
    debug: DebugFolder,
    dry: DryRun | None = None,
) -> Analysis:
    """Find the sites of a graph and choose what each becomes.

    Composites are taken apart in the graph so that their sites show: `settle` puts those back that are not needed.

    Args:
        gm: as Dynamo hands it to a backend.
        example_inputs: one for each placeholder, real for parameters and buffers.
        options: of the backend.
        target: to choose for.
        debug: receives the graphs.
        dry: of `explain`; None if the graph is going to run.

    Raises:
        IRError: a pass broke the graph.
    """
    expansions = expand(gm)
    graph = build(gm, example_inputs)
    run_passes(graph, default_passes(target.fuses), observer=_observer(debug))
    analysis = Analysis(graph, expansions=expansions)
    autocast = autocast_reason(gm)
    if autocast is not None:
        analysis.reasons.append(autocast)
    tuner = _Tuner(target, options) if options.autotune else None
    # Under Dynamo fake tensors may be active; the weights are real and are looked at for real.
    with _disable_current_modes(), torch.no_grad():
        target = target.for_model(_weight_bytes(graph))
        for site in graph.sites:
            analysis.sites.append(_plan_site(site, options, target, autocast, tuner, dry))
        analysis.skips = plan_skips(graph, analysis.sites, options, target, torch.get_num_threads())
    _settle_layouts(analysis, options, target)
    _leave_lone_depthwise(analysis)
    return analysis


def _weight_bytes(graph: SparseGraph) -> int:
    """Of the weights of all sites; one that several share is counted once."""
    weights = {id(site.weight): site.weight for site in graph.sites}
    return sum(weight.numel() * weight.element_size() for weight in weights.values())


def _settle_layouts(analysis: Analysis, options: Options, target: Target) -> None:
    """Leave sparse convolutions dense whose gain is less than the conversions of layout around them, and name these."""
    threads = torch.get_num_threads()
    sites = {
        planned.site.anchor: planned
        for planned in analysis.sites
        if isinstance(planned.site, ConvSite) and planned.site.declined is None and planned.choice.dense_us is not None
    }
    costs = {anchor: _layout_costs(planned.choice, options) for anchor, planned in sites.items()}
    if all(cost.first == float("inf") for cost in costs.values()):
        return
    owner = {name: anchor for anchor, planned in sites.items() for name in planned.site.operations}
    found = choose_layouts(analysis.graph, costs, owner, lambda values: target.layout_us(values, threads))
    for anchor, planned in sites.items():
        choice = planned.choice
        if choice.chosen.is_dense:
            if anchor not in found.last:
                _follow_neighbours(planned)
            continue
        if anchor in found.last:
            reason = f"dense: beside dense convolutions, whose maps are channels last, {choice.reason} does not pay"
            planned.choice = replace(choice, chosen=DENSE, reason=f"{reason} for the conversions")
            continue
        notes = [
            f"{'its input' if item.consumer == anchor else 'its output'} of {4e-6 * item.values:.2f} MB changes to "
            f"{item.to} ({item.us:.0f} us)"
            for item in found.conversions
            if item.us and anchor in (item.producer, item.consumer)  # a target without prices for them has none
        ]
        planned.choice = replace(choice, reason="; ".join([choice.reason, *notes]))


def _layout_costs(choice: SiteChoice, options: Options) -> SiteCosts:
    """Microseconds channels first and channels last."""
    dense, chosen = choice.dense_us or 0.0, choice.chosen_us
    asked = options.plan is not None and options.plan.site(choice.name, choice.tokens, choice.maps) is not None
    # What a plan asks for is not for the layouts to decide.
    if choice.chosen.is_dense:
        beside = _best_beside_dense(choice)
        return SiteCosts(float("inf") if asked or beside is None else beside.cost, dense)
    return SiteCosts(dense if chosen is None else chosen, float("inf") if asked else dense)


def _best_beside_dense(choice: SiteChoice) -> Prediction | None:
    """The cheapest of the other candidates, though dense is cheaper by itself."""
    others = [item for item in choice.predictions if not item.candidate.is_dense]
    return min(others, key=lambda item: item.cost, default=None)


def _follow_neighbours(planned: PlannedSite) -> None:
    """Take the best kernel that works channels first where dense would cost its neighbours more in conversions."""
    best, choice = _best_beside_dense(planned.choice), planned.choice
    if best is None or planned.chooser is None:
        return
    reason = (
        f"{best.candidate}: predicted {best.cost:.0f} us against dense {choice.dense_us:.0f} us, which would need "
        "its maps in another layout"
    )
    planned.choice = replace(choice, chosen=best.candidate, reason=reason)
    planned.chooser.instead = best.candidate


def _leave_lone_depthwise(analysis: Analysis) -> None:
    """Leave depthwise convolutions to Inductor where no sparse convolution asks for their layout."""
    chosen = [planned.choice.chosen for planned in analysis.sites if isinstance(planned.site, ConvSite)]
    if any(not candidate.is_dense and candidate != DEPTHWISE for candidate in chosen):
        return
    for planned in analysis.sites:
        if planned.choice.chosen == DEPTHWISE:
            reason = "dense: it is a depthwise convolution, and no convolution of the graph runs a sparse kernel"
            planned.choice, planned.chooser = replace(planned.choice, chosen=DENSE, reason=reason), None


def _plan_site(
    site: Site, options: Options, target: Target, autocast: str | None, tuner: _Tuner | None, dry: DryRun | None
) -> PlannedSite:
    reason = site.declined or autocast or _unfit(site, target, dry) or _excluded(site, options)
    try:
        if reason is None and dry is not None:
            choice = dry.choice(site, SiteChooser(site, target, options))
            if choice is not None:
                return PlannedSite(site, choice, dry=True)
        facts = facts_of(site.weight, site.transposed) if _countable(site.weight) else None
        if reason is not None or facts is None:
            return PlannedSite(site, decline(site, reason or "its weight cannot be read", facts))
        measured = tuner.measure(site, facts) if tuner is not None else None
        chooser = SiteChooser(site, target, options, measured)
        choice = chooser.choice(facts)
        if failed := failures_of(site.weight):
            choice = replace(choice, reason=f"{choice.reason}; {failed}")
        return PlannedSite(site, choice, chooser)
    except Exception as error:  # noqa: BLE001 -- logged with its traceback
        # One odd weight must not keep the other sites, or the user's model, from running.
        log.warning("site %s stays dense: its analysis failed", site.name, exc_info=True)
        return PlannedSite(site, decline(site, f"its analysis failed with {type(error).__name__}: {error}"))


def _excluded(site: Site, options: Options) -> str | None:
    rule = options.excluding(site.name)
    return None if rule is None else f"excluded by {rule!r}"


_DEVICES = {"cpu": "CPU", "cuda": "GPU"}


def _unfit(site: Site, target: Target, dry: DryRun | None) -> str | None:
    """Why the weight of a site cannot be packed or watched, None if it can."""
    weight = site.weight
    missing = dry is not None and _valueless(weight)
    if not missing and type(weight) not in (Tensor, torch.nn.Parameter):
        return f"its weight is a {type(weight).__name__}, not a plain tensor"
    if weight.device.type != target.device and not missing and (dry is None or target.why_not_here() is None):
        return f"its weight is on {weight.device}; the kernels run on the {_DEVICES[target.device]}"
    if weight.layout != torch.strided:
        return f"its weight has layout {weight.layout}, not a strided one"
    if site.dtype not in target.dtypes or weight.dtype != site.dtype:
        types = " and ".join(map(_dtype, target.dtypes))
        are = "is" if len(target.dtypes) == 1 else "are"
        return f"it computes in {_dtype(site.dtype)} with a weight of {_dtype(weight.dtype)}; {types} {are} supported"
    if weight.is_inference() and not missing:
        return "its weight was made under torch.inference_mode, so that changes to it cannot be seen"
    return None


def _valueless(weight: Tensor) -> bool:
    return isinstance(weight, FakeTensor) or weight.device.type == "meta"


def _countable(weight: Tensor) -> bool:
    """Whether facts can be counted, also for a site that stays dense: the report shows the density of those too."""
    return (
        type(weight) in (Tensor, torch.nn.Parameter)
        and weight.device.type in _DEVICES
        and weight.layout == torch.strided
        and weight.ndim >= 2
        and weight.numel() > 0
        and not weight.is_inference()
        and not weight.is_complex()
    )


def autocast_reason(gm: fx.GraphModule) -> str | None:
    """Why autocast keeps a graph dense, None if it is not active in it.

    Autocast picks the type of every product when it runs. The sparse op has no such rule, and a type chosen at compile
    time would be wrong as soon as a call comes with autocast off.
    """
    inside = any(
        "autocast" in getattr(node.target, "__name__", "") for node in gm.graph.nodes if node.op == "call_function"
    )
    if inside or any(map(torch.is_autocast_enabled, _DEVICES)):
        return "autocast is active, which chooses types when it runs; cast the model instead (model.bfloat16())"
    return None


def gradient_reason(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> str | None:
    """Why a graph has to be differentiable, None if it has not: the sparse op has no gradient."""
    if torch.is_grad_enabled():
        needing = sum(isinstance(value, Tensor) and value.requires_grad for value in example_inputs)
        if needing:
            return (
                f"gradients are enabled and {needing} of {len(example_inputs)} inputs of the graph require them, so "
                f"that it runs as under Inductor; under torch.no_grad() or torch.inference_mode() it can run sparse"
            )
    for node in gm.graph.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, torch.nn.Parameter):
            continue  # one that is converted keeps the mark, also where nothing is recorded
        if node.op not in ("placeholder", "get_attr") and isinstance(value, Tensor) and value.requires_grad:
            return f"the graph enables gradients itself, first at {node.name}, so that it runs as under Inductor"
    return None


class _Tuner:
    """Measures candidates on the real shapes, once for sites that are alike."""

    def __init__(self, target: Target, options: Options) -> None:
        self._target, self._options = target, options
        self._known: dict[tuple[Any, ...], dict[Candidate, float]] = {}

    def measure(self, site: Site, facts: WeightFacts) -> dict[Candidate, float] | None:
        """Microseconds by candidate, None if there is nothing to choose from."""
        problem = SiteChooser(site, self._target, self._options).problem(facts)
        offered = offered_candidates(facts, problem, self._target, self._options.patterns)
        costs = {candidate: self._target.predict(candidate, problem) for candidate in offered}
        hopeful = [c for c, us in costs.items() if not c.is_dense and us < HOPELESS * costs[DENSE]]
        if not hopeful:
            return None
        shape = (facts.out_features, facts.in_features, round(facts.density, 2))
        key = (shape, site.tokens, site.dtype, problem.window, problem.maps, tuple(hopeful))
        if key not in self._known:
            weight = site.weight.detach()
            matrix = weight.t().contiguous() if site.transposed else weight
            self._known[key] = measure(hopeful, matrix, problem, self._target)
            times = ", ".join(f"{candidate} {us:.0f} us" for candidate, us in self._known[key].items())
            log.info("measured %s at %d tokens: %s", site.name, site.tokens, times)
        return self._known[key]


def _observer(debug: DebugFolder) -> Callable[[Pass, SparseGraph, PassResult | None], None] | None:
    if not debug.wants(GRAPHS):
        return None

    def observe(step: Pass, graph: SparseGraph, result: PassResult | None) -> None:
        moment = "before" if result is None else "after"
        notes = "" if result is None else "".join(f"# {note}\n" for note in result.notes)
        debug.write(GRAPHS, f"{moment}_{step.name}.txt", f"{graph}\n{notes}", numbered=True)

    return observe


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
