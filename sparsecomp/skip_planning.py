"""Which blocks and linears of a graph skip at run time: what a skip plan asks for, and what is lossless and pays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsecomp.blocks import UNNAMED, FfnSite
from sparsecomp.ir import LinearSite, SparseGraph
from sparsecomp.options import Options
from sparsecomp.patterns import Pattern
from sparsecomp.planner.choose import MARGIN
from sparsecomp.planner.plan import Prediction, SiteChoice
from sparsecomp.runtime.facts import facts_of
from sparsecomp.runtime.ffn_site import SkipForms
from sparsecomp.runtime.skip_rates import rest_of, skip_rate_of
from sparsecomp.skipping import SkipChoice, SkipForm, SkipPlan
from sparsecomp.targets.base import Candidate, Target, WeightFacts
from sparsecomp.targets.skip import SkipSpec

if TYPE_CHECKING:
    from sparsecomp.analysis import PlannedSite

USUAL_ZEROS = 0.5
"""Share of exact zeros that a ReLU is taken to give before any were counted: what a centred input gives."""
KEEP_ALL = -1.0
"""A threshold that no size is below."""


@dataclass(frozen=True)
class BlockSkip:
    """What `block` needs beside the computation of a block.

    Attributes:
        threshold: of the cosine.
        number: of the block in its graph.
        first: the first such block of the graph.
        warmup, span: see `SkipPlan`.
    """

    threshold: float
    number: int
    first: FfnSite
    warmup: int
    span: int


@dataclass
class PlannedSkip:
    """A block or a linear that skips.

    Attributes:
        site: which.
        form: printed, for people.
        linears: its linears as they were planned; they compute what is not skipped.
        forms: what the run time needs.
        expected: share that it is taken to skip before any call was counted.
        block: for a block that is skipped as a whole, else None.
    """

    site: FfnSite | LinearSite
    form: str
    linears: tuple[PlannedSite, ...]
    forms: SkipForms
    expected: float = USUAL_ZEROS
    block: BlockSkip | None = None


class _Declined(ValueError):
    """A skip that was asked for is not done, with the reason."""


def plan_skips(
    graph: SparseGraph, sites: Sequence[PlannedSite], options: Options, target: Target, threads: int
) -> list[PlannedSkip]:
    """Choose what skips, and write it to the choices of the linears concerned.

    Args:
        graph: with its blocks.
        sites: the decisions for its sites so far; those of what skips, or was asked to and cannot, are replaced.
        options: `skip` asks; what is excluded there does not skip.
        target: may have kernels.
        threads: of a call.

    Returns:
        What skips, in graph order.
    """
    planner = _Planner(graph, sites, options, target, threads)
    return planner.run() if target.skips else []


class _Planner:
    def __init__(
        self, graph: SparseGraph, sites: Sequence[PlannedSite], options: Options, target: Target, threads: int
    ) -> None:
        self._graph, self._target, self._threads = graph, target, threads
        self._planned = {id(planned.site): planned for planned in sites}
        self._plan = options.skip if options.skip is not None else SkipPlan()
        self._found: list[PlannedSkip] = []
        self._taken: set[int] = set()
        self._first_block: FfnSite | None = None

    def run(self) -> list[PlannedSkip]:
        """See `plan_skips`."""
        for number, ffn in enumerate(self._graph.ffns):
            linears = tuple(self._planned[id(linear)] for linear in ffn.linears)
            for planned in linears if ffn.declined is None else ():
                planned.choice = replace(planned.choice, block=ffn.name)
            # Where nothing holds the linears but the model itself, the plan calls it by an empty name.
            choice = self._asked(ffn.name) or (self._plan.get("") if ffn.name == UNNAMED else None)
            inputs = [self._asked(linear.name) for linear in ffn.linears]
            if choice is not None:
                self._try(linears, choice.form, partial(self._ffn, ffn, linears, choice, number))
            elif any(inputs) and _one_op(ffn, inputs):
                self._try(linears, _form(inputs), partial(self._ffn_inputs, ffn, linears, inputs))
            elif not any(inputs) and ffn.exact_zeros and self._relu_pays(ffn, linears):
                relu = SkipChoice(ffn.name, SkipForm("relu"))
                self._try(linears, relu.form, partial(self._ffn, ffn, linears, relu, number))
        for site in self._graph.sites:
            choice = self._asked(site.name)
            if choice is not None and isinstance(site, LinearSite) and id(site) not in self._taken:
                planned = self._planned[id(site)]
                self._try((planned,), choice.form, partial(self._linear, site, planned, choice))
        self._found.sort(key=lambda skip: self._graph.position(skip.site.anchor))
        return self._found

    def _asked(self, name: str) -> SkipChoice | None:
        """What the plan says of a module, whose calls are told apart by a suffix."""
        return self._plan.get(name.partition("#")[0])

    def _try(self, linears: tuple[PlannedSite, ...], form: SkipForm, plan: Callable[[], PlannedSkip]) -> None:
        try:
            if form.kind not in self._target.skips:
                raise _Declined(f"target {self._target.name} skips {' and '.join(self._target.skips)} alone")
            skip = plan()
            if not self._target.watches_skips:
                self._check_price(skip)
        except _Declined as declined:
            for planned in linears:
                reason = f"{planned.choice.reason}; does not skip {form}: {declined}"
                planned.choice = replace(planned.choice, reason=reason)
            return
        self._found.append(skip)
        for planned in linears:
            self._taken.add(id(planned.site))
            planned.choice = self._chosen(skip, planned)

    # -- what is possible ---------------------------------------------------------------------------------------------

    def _check(self, linears: Sequence[PlannedSite], *, few: bool = True) -> None:
        for planned in linears:
            site = planned.site
            if not planned.can_run:
                raise _Declined(f"{site.name} is {planned.choice.reason}")
            if few and site.tokens > (most := self._target.skip_tokens) and not site.dynamic:
                raise _Declined(f"{site.tokens} tokens together keep nearly everything; up to {most} skip")

    def _check_price(self, skip: PlannedSkip) -> None:
        """Decline what is not predicted to win, where nothing looks at run time whether it does."""
        us = sum(self._predicted(planned, skip) for planned in skip.linears)
        without = sum(planned.choice.chosen_us or 0.0 for planned in skip.linears)
        if us == float("inf"):
            site = skip.linears[0].site
            raise _Declined(
                f"target {self._target.name} has no kernel for {site.tokens} tokens of {skip.linears[0].choice.dtype}"
            )
        if us * MARGIN > without:
            raise _Declined(f"predicted {us:.1f} us against {without:.1f} us without")

    def _ffn(self, ffn: FfnSite, linears: tuple[PlannedSite, ...], choice: SkipChoice, number: int) -> PlannedSkip:
        kind = choice.form.kind
        if kind in ("input", "rsparse"):
            raise _Declined(f"{choice.form} is for linears, and {ffn.name} is a block")
        if ffn.declined is not None:
            raise _Declined(ffn.declined)
        if kind == "relu" and not ffn.exact_zeros:
            raise _Declined(f"its activation {ffn.activation} gives no exact zeros")
        self._check(linears, few=kind == "threshold")
        hidden = ffn.hidden
        if kind == "block":
            thresholds = _vector(ffn.floor or KEEP_ALL, hidden, ffn.name)
        else:
            thresholds = _vector(choice.threshold if kind == "threshold" else 0.0, hidden, ffn.name)
            thresholds = thresholds.clamp(min=ffn.floor)
        spec = SkipSpec("units", _sizes(ffn), (thresholds,), ffn.activation, ffn.gated, ffn.fused)
        forms = SkipForms(spec, ffn.floor, exact=kind == "relu")
        expected = _expected(choice)
        block = None
        if kind == "block":
            if ffn.residual is None:
                raise _Declined("nothing is added to its output, so that there is no stream to compare")
            if isinstance(choice.threshold, Tensor):
                raise _Declined("the threshold of block is one number, the plan has several")
            self._first_block = self._first_block or ffn
            block = BlockSkip(choice.threshold, number, self._first_block, self._plan.warmup, self._plan.span)
        return PlannedSkip(ffn, str(choice.form), linears, forms, expected, block)

    def _ffn_inputs(
        self, ffn: FfnSite, linears: tuple[PlannedSite, ...], choices: Sequence[SkipChoice | None]
    ) -> PlannedSkip:
        self._check(linears)
        thresholds = [_inputs(choice, linear) for choice, linear in zip(choices, ffn.linears, strict=True)]
        if ffn.fused:
            thresholds.insert(0, thresholds[0])
        spec = SkipSpec("inputs", _sizes(ffn), tuple(thresholds), ffn.activation, ffn.gated, ffn.fused)
        given = [_expected(choice) for choice in choices if choice is not None]
        return PlannedSkip(ffn, str(_form(choices)), linears, SkipForms(spec, ffn.floor), sum(given) / len(given))

    def _linear(self, site: LinearSite, planned: PlannedSite, choice: SkipChoice) -> PlannedSkip:
        if choice.form.kind not in ("input", "rsparse"):
            raise _Declined(f"{choice.form} is for blocks, and {site.name} is a linear")
        self._check((planned,))
        low_rank = choice.low_rank
        if low_rank is not None:
            a, b = low_rank
            if a.shape[:1] != (site.out_features,) or b.shape[1:] != (site.in_features,) or a.shape[1:] != b.shape[:1]:
                raise _Declined(f"its low-rank factors have shapes {tuple(a.shape)} and {tuple(b.shape)}")
        spec = SkipSpec(
            "inputs",
            (site.in_features, site.out_features),
            (_inputs(choice, site),),
            "none" if low_rank is not None else site.activation,
        )
        after = "none" if low_rank is None else site.activation
        forms = SkipForms(spec, low_rank=low_rank, after=after)
        return PlannedSkip(site, str(choice.form), (planned,), forms, _expected(choice))

    # -- what it costs ------------------------------------------------------------------------------------------------

    def _relu_pays(self, ffn: FfnSite, linears: tuple[PlannedSite, ...]) -> bool:
        """Whether skipping exact zeros is predicted to win, at the rate that was seen or the usual one."""
        if ffn.declined is not None or not all(planned.can_run for planned in linears):
            return False
        if ffn.gate.tokens > self._target.skip_tokens or "relu" not in self._target.skips:
            return False
        costs = [planned.choice.chosen_us for planned in linears]
        skip = self._ffn(ffn, linears, SkipChoice(ffn.name, SkipForm("relu")), 0)
        skipped = sum(self._predicted(planned, skip) for planned in linears)
        return all(cost is not None for cost in costs) and skipped * MARGIN <= sum(cost or 0.0 for cost in costs)

    def _predicted(self, planned: PlannedSite, skip: PlannedSkip) -> float:
        site, block = planned.site, skip.site
        rate = skip_rate_of(site.weight)
        if rate is None:
            rate = skip.expected
        by_input = True
        if skip.forms.spec.kind == "units" and isinstance(block, FfnSite):
            by_input = site is block.down
            if site is block.gate:
                rate = 0.0 if not block.fused else rate / 2
        if planned.chooser is None:
            facts = WeightFacts.assumed(site.out_features, site.in_features, Pattern("dense"))
        else:
            facts = facts_of(site.weight, site.transposed)
        return self._target.predict_skip(facts, 1.0 - rate, site.tokens, self._threads, site.dtype, by_input)

    def _chosen(self, skip: PlannedSkip, planned: PlannedSite) -> SiteChoice:
        site, choice = planned.site, planned.choice
        ffn = skip.site if isinstance(skip.site, FfnSite) else None
        candidate = Candidate(f"skip_{skip.form.partition(':')[0]}", "dense")
        us = self._predicted(planned, skip)
        rate = skip_rate_of(site.weight)
        seen = "not run yet" if rate is None else f"{rate:.0%} skipped so far"
        if (kept := rest_of(site.weight)) is not None:
            seen += f"; takes the dense way for now, since keeping {kept:.0%} is not worth it"
        where = f" of {ffn.name}" if ffn is not None else ""
        reason = f"skips {skip.form}{where}, {seen}"
        prediction = Prediction(candidate, us, choice.dense_bytes)
        return replace(choice, chosen=candidate, reason=reason, predictions=(*choice.predictions, prediction))


def _expected(choice: SkipChoice) -> float:
    """The share that a choice is taken to skip: as calibrated, as its form says, or what a ReLU usually gives."""
    asked = choice.form.parameter if choice.form.kind in ("threshold", "input", "rsparse") else None
    return choice.expected or asked or USUAL_ZEROS


def _one_op(ffn: FfnSite, choices: Sequence[SkipChoice | None]) -> bool:
    """Whether the linears of a block that skip inputs can be one op."""
    plain = all(choice is None or choice.form.kind == "input" for choice in choices)
    return plain and ffn.declined is None and not ffn.floor


def _sizes(ffn: FfnSite) -> tuple[int, int, int]:
    return ffn.gate.in_features, ffn.hidden, ffn.down.out_features


def _form(choices: Sequence[SkipChoice | None]) -> SkipForm:
    return next(choice.form for choice in choices if choice is not None)


def _inputs(choice: SkipChoice | None, linear: LinearSite) -> Tensor:
    """Thresholds on the inputs of a linear: those of WINA are divided by the scales, which says the same."""
    if choice is None:
        return torch.full((linear.in_features,), KEEP_ALL)
    thresholds = _vector(choice.threshold, linear.in_features, linear.name)
    if choice.scale is None:
        return thresholds
    scale = _vector(choice.scale, linear.in_features, linear.name)
    return torch.where(scale > 0, thresholds / scale, torch.inf)


def _vector(value: float | Tensor, size: int, name: str) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.full((size,), float(value))
    if value.shape != (size,):
        raise _Declined(f"the plan has {tuple(value.shape)} thresholds or scales for {name}, expected ({size},)")
    return value.detach().float().clone()
