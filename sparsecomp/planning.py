"""`plan`: which pattern every layer of a model should be pruned to, under a budget of quality or latency."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from sparsecomp.blocks import UNNAMED
from sparsecomp.dryrun import explain
from sparsecomp.experts import warn_of_whole_experts
from sparsecomp.log import log
from sparsecomp.options import Options
from sparsecomp.patterns import Pattern
from sparsecomp.planner.budget import Budget, Summary, milliseconds
from sparsecomp.planner.plan import Option, Plan, SiteChoice
from sparsecomp.planner.pricing import Pricer, model_us, planned_us, scaled, with_gain
from sparsecomp.planner.quality import Quality, describe, mean_loss
from sparsecomp.planner.select import fastest, mildest, module_name, select
from sparsecomp.planner.sensitivity import Estimate, estimate
from sparsecomp.planner.skips import SkipForm
from sparsecomp.pruning.batchnorm import FollowingNorms
from sparsecomp.pruning.calibration import Call, as_calls, calibrating
from sparsecomp.pruning.criterion import Criterion, criterion_named
from sparsecomp.pruning.sites import FilterFn, Site, choose_sites
from sparsecomp.pruning.sparsify import sparsify_
from sparsecomp.skipping.calibrate import calibrate_forms
from sparsecomp.skipping.emulate import emulate
from sparsecomp.skipping.forms import SkipPlan
from sparsecomp.skipping.offers import Offer, can_skip, cost_of, offer_skips, parse_forms, skip_costs
from sparsecomp.skipping.sites import FFN, find_ffns
from sparsecomp.targets.base import Target

DEFAULT_PATTERNS = (
    "unstructured@0.5",
    "unstructured@0.6",
    "unstructured@0.7",
    "unstructured@0.8",
    "unstructured@0.9",
    "2:4",
    "4:8",
    "8:16",
    "4:2:4",
    "16:2:4",
    "16x1@0.5",
)
"""What a layer may be pruned to if nothing else is said."""

DEFAULT_SKIPS = ("relu", "threshold:0.25", "threshold:0.4", "threshold:0.5", "input:0.25", "input:0.4", "input:0.5")
"""Forms for `skips` that suit most models; `rsparse:P` takes long to fit, `block:T` has another T for every model."""

HELD_OUT = 8
"""One of this many calibration batches is kept for measuring losses, where there are at least so many."""

PROBE_TOKENS = 512
PROBE_IMAGES = 16
"""Losses of single sites are measured on as many held out batches as hold about so many tokens (images, where the first
site is a convolution), one at least."""

ROUNDS = 5
"""Plans that are tried at most until the measured loss keeps a quality budget."""

CLOSE = 0.9
"""A measured loss of this share of the budget is close enough."""


def plan(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    target: str | Target | None = None,
    max_quality_loss: float | None = None,
    max_latency: float | str | None = None,
    speedup: float | None = None,
    patterns: Iterable[str | Pattern] | None = None,
    skips: Iterable[str | SkipForm] = (),
    criterion: str = "sparsegpt",
    inputs: Any = None,
    filter_fn: FilterFn | None = None,
    quality: Quality | None = None,
    autotune: bool = False,
    progress: bool | None = None,
) -> Plan:
    """Choose a pattern for every layer, so that the model keeps a budget and is otherwise as fast or as good as can be.

    The latency of every layer under every pattern comes from the target's cost model, for the weight as the criterion
    would prune it; that of the rest from one measurement of the dense model under Inductor. The loss of every layer and
    pattern is estimated (see docs/planning.md), and the choice is a multiple-choice knapsack, solved exactly. Under a
    quality budget a copy of the model is then pruned as planned and its loss measured; where the estimates were off,
    they are corrected and the choice is made again. Layers are linears and convolutions, under one budget; depthwise
    convolutions are not pruned.

    Args:
        model: any module; it is not changed.
        calibration: batches of model inputs, as for `sparsify_`. With 8 batches or more, every eighth is not used for
            pruning but to measure losses.
        target: such as `"x86"`; this machine's CPU if None. For one that is not here, such as `"arm:cortex-a76"`,
            nothing is measured: latencies are those of the linears and convolutions together, as predicted.
        max_quality_loss: loss that the pruned model may have at most, measured as `quality` says.
        max_latency: of one call, such as `"8 ms"`, or a number of seconds.
        speedup: over the dense model under Inductor, at least.
        patterns: what a layer may be pruned to, each with its share of zeros; `DEFAULT_PATTERNS` if None. To leave a
            layer as it is, is always an option.
        skips: forms in which linears and FFN blocks may skip at run time, alone or on top of a pattern, such as
            `DEFAULT_SKIPS`; none if empty. Only where the latency is of a call with few tokens, as in decoding: give
            its `inputs`. `calibrate_skips(pruned_model, calibration, plan)` gives the option `skip` of the backend.
        criterion: that the model will be pruned by, as in `sparsify_`.
        inputs: the batch whose latency counts; the first calibration batch if None.
        filter_fn: `(module, qualified_name) -> bool`, which layers may be pruned; all of them if None. Layers that
            share their weight with others are left as they are in any case.
        quality: `(dense_output, pruned_output) -> loss` of one batch, 0 for equal outputs; if None, the
            Kullback-Leibler divergence in nats per token for models that give `.logits`, else 1 - mean cosine of the
            vectors in the output (along the channels, if it is maps).
        autotune: measure the kernels on the real shapes where their costs would otherwise be predicted.
        progress: whether to show a progress bar; None: on a terminal.

    Returns:
        The plan: for `sparsify_`, and for the option `plan` of the backend.

    Raises:
        ValueError: there is not exactly one budget, it is bad or cannot be reached (the message says what can; under a
            quality budget something must be pruned or skipped), a pattern does not say how much to prune, there is no
            calibration batch, nothing can skip though `skips` says so, a site cannot be pruned or has NaN in its
            inputs, no site of the model can become faster, or the outputs cannot be compared.
    """
    budget = Budget.of(max_quality_loss, max_latency, speedup)
    forms = parse_forms(skips)
    rule = criterion_named(criterion)
    model = getattr(model, "_orig_mod", model)  # below torch.compile
    warn_of_whole_experts(model)
    sites = choose_sites(model, filter_fn)
    wanted = as_patterns(patterns, sites)
    batches = as_calls(calibration)
    timed = batches[0] if inputs is None else as_calls([inputs])[0]
    resolved = Options.parse({"target": target, "autotune": autotune}).resolve_target(model.parameters())
    price = functools.partial(_priced, model, sites, timed, resolved, autotune)
    return under_budget(
        model, batches, price, wanted, budget, skips=forms, criterion=rule, quality=quality, progress=progress
    )


def under_budget(
    model: nn.Module,
    batches: list[Call],
    price: Callable[[], Priced],
    patterns: list[Pattern],
    budget: Budget,
    *,
    skips: Sequence[SkipForm] = (),
    criterion: Criterion,
    quality: Quality | None,
    progress: bool | None,
) -> Plan:
    """Choose patterns for a model whose sites are priced by whoever knows how it will run; see `plan`."""
    console = Console(stderr=True)
    hide = not (console.is_terminal if progress is None else progress)
    with Progress(console=console, disable=hide) as bar, calibrating(model):
        job = _Job(model, batches, criterion, quality, bar)
        priced = price()
        options = job.options(priced, patterns, skips)
        if priced.measure is not None:
            options = with_gain(options, priced.measure)
        if budget.kind == "max_quality_loss":
            return job.keep(options, budget)
        return select(options, budget)


def as_patterns(given: Iterable[str | Pattern] | None, sites: Collection[Site]) -> list[Pattern]:
    """Patterns to prune to; `DEFAULT_PATTERNS` if None.

    Raises:
        ValueError: one is wrong, does not say how much to prune or fits none of the sites, or there is none.
    """
    given = DEFAULT_PATTERNS if given is None else given
    if isinstance(given, (str, Pattern)):
        given = [given]
    found = []
    for item in given:
        pattern = Pattern.parse(item)
        if pattern.kind in ("unstructured", "block") and pattern.sparsity is None:
            raise ValueError(
                f"pattern '{pattern}' does not say how much to prune: give the share of zeros, such as '{pattern}@0.8'"
            )
        if not any(site.takes(pattern) for site in sites):
            raise ValueError(f"no site takes '{pattern}': it is for convolutions with kernels of {pattern.m} taps")
        if pattern.kind != "dense" and pattern not in found:
            found.append(pattern)
    if not found:
        raise ValueError("patterns holds nothing to prune to: give such as ['unstructured@0.7', '2:4']")
    return found


@dataclass(frozen=True)
class Priced:
    """The sites that may be pruned, and what is known of latencies.

    Attributes:
        plan: of the model as it is, with costs as they are now.
        sites: by name of the module, those with entries in the plan.
        pricer: for other weights.
        scale: of predicted costs.
        measure: microseconds of one call of the model as a plan has it; None where that cannot be measured.
    """

    plan: Plan
    sites: dict[str, Site]
    pricer: Pricer
    scale: float
    measure: Callable[[Plan], float] | None = None


def _priced(model: nn.Module, sites: Sequence[Site], timed: Call, target: Target, autotune: bool) -> Priced:
    report = explain(model, *timed.args, options=Options(target=target), **timed.kwargs)
    tied = _tied(model)
    free = {site.name: site for site in sites if id(site.weight) not in tied}
    entries = [choice for choice in report.plan if module_name(choice) in free and not choice.declined]
    if not entries:
        declined = next((f": {c.name} is {c.reason}" for c in report.plan if c.declined), "")
        notes = "".join(f"; {note}" for note in report.notes)
        raise ValueError(f"the model has no layer that could be pruned and run by a sparse kernel{declined}{notes}")
    found = {name: free[name] for name in dict.fromkeys(map(module_name, entries))}
    pricer = Pricer(target, autotune=autotune, nbytes=sum(choice.dense_bytes for choice in report.plan))
    scale = pricer.scale([(entry, _matrix(found[module_name(entry)])) for entry in entries])
    report.plan.sites = [
        scaled(pricer.price(choice, _matrix(found[module_name(choice)]), "") if choice in entries else choice, scale)
        for choice in report.plan
    ]
    # Of what is not here only the sites can be priced: the budget is then of their latencies alone.
    here = target.why_not_here() is None
    dense_us = model_us(model, timed) if here else sum(choice.dense_us or 0.0 for choice in report.plan)
    inside = sum(choice.dense_us or 0.0 for choice in report.plan if module_name(choice) in found)
    log.info("plan: dense model %.0f us, of which its %d sites %.0f us", dense_us, len(entries), inside)
    rest = max(0.0, dense_us - inside)
    result = replace(report.plan, summary=Summary(dense_us, rest, dense_us, "", 0.0))

    def measure(plan: Plan) -> float:
        return planned_us(model, timed, plan, target)

    return Priced(result, found, pricer, scale, measure if here else None)


def _matrix(site: Site) -> Tensor:
    return site.kind.to_matrix(site.weight).detach()


def _tied(model: nn.Module) -> set[int]:
    """Weights that are there under more than one name: what pruning them costs, no single site tells."""
    names: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)] = names.get(id(parameter), 0) + 1
    return {key for key, count in names.items() if count > 1}


class _Job:
    """Losses for one model: of its options, and of plans."""

    def __init__(
        self, model: nn.Module, batches: list[Call], criterion: Criterion, quality: Quality | None, bar: Progress
    ) -> None:
        enough = len(batches) >= HELD_OUT
        self._model = model
        self._used = [c for n, c in enumerate(batches) if not enough or n % HELD_OUT]
        self._held = batches[::HELD_OUT] if enough else batches
        self._criterion, self._quality, self._bar = criterion, quality, bar

    def options(self, priced: Priced, patterns: list[Pattern], forms: Sequence[SkipForm]) -> Plan:
        """The plan with what every site could be pruned to; nothing is chosen yet."""
        first = next(iter(priced.sites.values()))
        probes = _as_many(self._model, first, self._held)
        outputs = [call.run(self._model) for call in probes]
        norms = FollowingNorms(self._model, _as_many(self._model, first, self._used))
        entries: dict[str, list[SiteChoice]] = {}
        for choice in priced.plan:
            if (name := module_name(choice)) in priced.sites and not choice.declined:
                entries.setdefault(name, []).append(choice)
        offers: dict[tuple[str, str], list[SiteChoice]] = {}
        skipping: dict[tuple[str, str], list[tuple[Offer, list[float]]]] = {}
        cost = cost_of(priced.pricer.target, priced.scale)

        def wanted(site: Site, prune: str, weight: Tensor) -> bool:
            offer = [priced.pricer.price(choice, weight, prune) for choice in entries[site.name]]
            offer = [scaled(choice, priced.scale) for choice in offer]
            offers[site.name, prune] = offer
            skipping[site.name, prune] = skip_costs(offer, weight, may_skip.get(site.name, []), cost)
            return sum(map(_us, offer)) < sum(map(_us, entries[site.name]))

        def loss() -> float:
            with norms.moved():
                return mean_loss(self._model, probes, outputs, self._quality)

        target = priced.pricer.target
        offered = [form for form in forms if form.kind in target.skips]
        skippers = [site for name, site in priced.sites.items() if offered and _can_skip(entries[name], priced)]
        if forms and not skippers:
            tokens = max(entry.tokens for site in entries.values() for entry in site)
            raise ValueError(
                f"skips are for linears at up to {target.skip_tokens} tokens, in forms that a target has kernels for: "
                f"{target.name} has kernels of {' and '.join(target.skips) or 'no form'}; the call that the latency is "
                f"of has {tokens} tokens (inputs=... of one token make it another)"
            )
        ffns = _blocks_of(self._model, entries) if skippers else []
        task = self._bar.add_task("estimating losses", total=len(priced.sites) + len(skippers) + len(ffns))
        may_skip = offer_skips(
            self._model,
            self._used,
            skippers,
            ffns,
            offered,
            entries=entries,
            cost=cost,
            loss=loss,
            done=lambda: self._bar.advance(task),
        )
        for site in skippers:
            skipping[site.name, ""] = skip_costs(entries[site.name], _matrix(site), may_skip[site.name], cost)
        found = estimate(
            self._model,
            self._used,
            list(priced.sites.values()),
            patterns,
            self._criterion,
            loss=loss,
            wanted=wanted,
            done=lambda: self._bar.advance(task),
        )
        if not any(found.values()) and not any(skipping.values()):
            raise ValueError(
                "no pattern is predicted to make any layer faster on these inputs: the layers are too small, the call "
                f"has too few tokens, or the patterns leave too much ({', '.join(map(str, patterns))})"
            )
        sites = []
        for choice in priced.plan:
            name = module_name(choice)
            estimates = found.get(name, []) if not choice.declined else []
            if estimates or (not choice.declined and skipping.get((name, ""))):
                place = entries[name].index(choice)
                choice = _with_options(choice, estimates, [offers[name, item.prune][place] for item in estimates])
                more = [
                    replace(option, us=times[place], loss=option.loss + offer.loss, skip=offer.form)
                    for option in choice.options
                    for offer, times in skipping.get((name, option.prune), ())
                ]
                choice = replace(choice, options=(*choice.options, *more))
            sites.append(choice)
        assert priced.plan.summary is not None
        inside = sum(_us(choice) for choice in sites if choice.options)
        dense = sum(choice.dense_us or 0.0 for choice in sites if choice.options)
        summary = replace(priced.plan.summary, quality=describe(self._quality, outputs[0]))
        # Sites without options belong to the rest: they stay as they are.
        rest = max(0.0, summary.dense_us - dense)
        return replace(priced.plan, sites=sites, summary=replace(summary, rest_us=rest, planned_us=rest + inside))

    def keep(self, options: Plan, budget: Budget) -> Plan:
        """Choose under a quality budget such that the measured loss keeps it.

        The sum of the estimates that is allowed is searched: the measured loss grows with it, nearly in proportion.
        """
        best: Plan | None = None
        # (estimated, measured): the most that kept the budget, and the least that did not.
        low: tuple[float, float] = (0.0, 0.0)
        high: tuple[float, float] | None = None
        allowed = budget.value
        task = self._bar.add_task("measuring plans", total=ROUNDS)
        for _ in range(ROUNDS):
            tried = select(options, Budget("max_quality_loss", allowed))
            estimated, measured = _estimated(tried), self._measured(tried)
            log.info("plan: estimated loss %.4g, measured %.4g, budget %.4g", estimated, measured, budget.value)
            self._bar.advance(task)
            if measured <= budget.value:
                low = (estimated, measured)
                best = _corrected(tried, measured, budget)
                if measured >= CLOSE * budget.value or estimated >= _most(options):
                    break
            else:
                high = (estimated, measured)
            if high is not None:
                allowed = _between(low, high, budget.value)
            else:
                # In proportion, but to another choice, and not far beyond what is known.
                wanted = budget.value * estimated / measured if measured else float("inf")
                allowed = min(max(wanted, 1.01 * estimated), 4 * estimated) if estimated else 4 * allowed
        self._bar.update(task, completed=ROUNDS)
        if best is None or not _prunes(best):
            best = self._mildest(options, budget)
        return best

    def _mildest(self, options: Plan, budget: Budget) -> Plan:
        """The plan that prunes least, if it keeps the budget.

        Raises:
            ValueError: it does not, so that nothing can be pruned.
        """
        least = mildest(options)
        measured = self._measured(least)
        if measured > budget.value:
            assert least.summary is not None
            what = ", ".join(f"{c.name} to {c.prune or c.skip}" for c in least if c.prune or c.skip)
            raise ValueError(
                f"a {budget} is not kept by any plan that prunes: the least ({what}) loses {measured:.3g} as measured, "
                f"for {milliseconds(least.summary.planned_us)} instead of {milliseconds(least.summary.dense_us)}; "
                "allow more loss, or give milder patterns or more calibration"
            )
        return _corrected(least, measured, budget)

    def _measured(self, plan: Plan) -> float:
        """The loss of the model pruned as planned, on what was held out."""
        if not _prunes(plan):
            return 0.0
        pruned = copy.deepcopy(self._model)
        batches = [call.kwargs or call.args for call in self._used]
        sparsify_(pruned, plan, criterion=self._criterion.name, calibration=batches, progress=False)
        with calibrating(pruned):
            forms = plan.skips()
            skips = calibrate_forms(pruned, self._used, forms) if forms else SkipPlan()
            with emulate(pruned, skips):
                return mean_loss(pruned, self._held, self._model, self._quality)


def _as_many(model: nn.Module, site: Site, calls: Sequence[Call]) -> list[Call]:
    """The first calls that hold about as many inputs of a site as losses of single sites are measured on."""
    linear = isinstance(site.module, nn.Linear)
    seen = 0

    def count(_: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal seen
        seen += args[0].shape[:-1].numel() if linear else args[0].shape[0]

    handle = site.module.register_forward_pre_hook(count)
    try:
        for number, call in enumerate(calls, 1):
            call.run(model)
            if seen >= (PROBE_TOKENS if linear else PROBE_IMAGES):
                return list(calls[:number])
    finally:
        handle.remove()
    return list(calls)


def _prunes(plan: Plan) -> bool:
    return any(choice.prune or choice.skip for choice in plan)


def _can_skip(entries: Sequence[SiteChoice], priced: Priced) -> bool:
    return all(can_skip(entry, priced.pricer.target) for entry in entries)


def _blocks_of(model: nn.Module, entries: Mapping[str, Sequence[SiteChoice]]) -> list[FFN]:
    """The FFN blocks that may be rewritten as a whole and all of whose linears are in the plan."""

    def whole(ffn: FFN) -> bool:
        found = [entry.block.partition("#")[0] for name in ffn.linears for entry in entries.get(name, [])]
        return all(name in entries for name in ffn.linears) and set(found) == {ffn.name or UNNAMED}

    return [ffn for ffn in find_ffns(model) if whole(ffn)]


def _estimated(plan: Plan) -> float:
    assert plan.summary is not None
    return plan.summary.estimated_loss


def _most(options: Plan) -> float:
    """The estimated loss of the fastest choice: allowing more changes nothing."""
    return _estimated(fastest(options))


def _between(low: tuple[float, float], high: tuple[float, float], wanted: float) -> float:
    """The estimate at which a measured loss is expected, from the nearest known ones on both sides."""
    # A little less than wanted, so that the next one is likely to keep the budget.
    share = (0.97 * wanted - low[1]) / (high[1] - low[1]) if high[1] > low[1] else 0.5
    return low[0] + (high[0] - low[0]) * min(max(share, 0.1), 0.9)


def _corrected(plan: Plan, measured: float, budget: Budget) -> Plan:
    """A plan with its measured loss, and with the losses of its options scaled to agree with that."""
    assert plan.summary is not None
    estimated = plan.summary.estimated_loss
    scale = measured / estimated if estimated and measured > 0 else 1.0
    sites = [
        replace(choice, options=tuple(replace(option, loss=option.loss * scale) for option in choice.options))
        for choice in plan
    ]
    return replace(plan, budget=budget, sites=sites, summary=replace(plan.summary, measured_loss=max(0.0, measured)))


def _us(choice: SiteChoice) -> float:
    return choice.chosen_us or 0.0


def _with_options(choice: SiteChoice, estimates: list[Estimate], offers: list[SiteChoice]) -> SiteChoice:
    """An entry with its options, and the costs of every candidate that one of them needs."""
    kept = Option("", choice.chosen, _us(choice), 0.0)
    pruned = [Option(e.prune, offer.chosen, _us(offer), e.loss) for e, offer in zip(estimates, offers, strict=True)]
    return replace(choice, options=(kept, *pruned))
