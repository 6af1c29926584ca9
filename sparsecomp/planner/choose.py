"""The choice for one site: the candidate of the lowest cost, where a sparse one must win by a margin.

Costs are what the target's model predicts, or what was measured on the real shapes. A plan that was given back goes
before both, as far as the weight satisfies the pattern that it asks for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from sparsecomp.ir import ConvSite, Site
from sparsecomp.patterns import Pattern
from sparsecomp.planner.plan import Prediction, SiteChoice
from sparsecomp.targets.base import DENSE, Candidate, Problem, Target, WeightFacts

if TYPE_CHECKING:
    from sparsecomp.options import Options

MARGIN = 1.05
"""Dense must take this many times as long as a sparse kernel: a model's error must not make anybody slower."""


def choose(
    facts: WeightFacts,
    problem: Problem,
    target: Target,
    options: Options,
    *,
    name: str = "",
    dynamic: bool = False,
    measured: Mapping[Candidate, float] | None = None,
) -> SiteChoice:
    """Choose what a site becomes.

    Args:
        facts: of the weight.
        problem: what the site computes; its facts are not read again.
        target: offers and prices the candidates.
        options: `patterns` restricts the candidates, `plan` forces the choice.
        name: of the site, to find it in the plan.
        dynamic: whether the number of tokens may change, for the report.
        measured: microseconds of one call by candidate, where measured; a candidate that is not in it is priced by the
            model. If there are any, candidates without a measurement cannot win.

    Returns:
        The choice, with its reason and the costs of all candidates.
    """
    predictions = _predict(facts, problem, target, options, measured or {})
    chosen, reason = _lowest(facts, predictions, options, bool(measured))
    if options.plan is not None and (asked := options.plan.site(name, problem.tokens, problem.maps)) is not None:
        forced, note = _forced(asked, facts, problem, target, predictions)
        if forced is None:
            reason = f"{note}; {reason}"
        else:
            chosen, reason = forced.candidate, note
            if forced not in predictions:
                predictions = (*predictions, forced)
    return SiteChoice(
        name=name,
        shape=(facts.out_features, facts.in_features),
        tokens=problem.tokens,
        density=facts.density,
        chosen=chosen,
        reason=reason,
        dtype=str(problem.dtype).removeprefix("torch."),
        patterns=tuple(str(found.pattern) for found in facts.patterns),
        predictions=predictions,
        activation=problem.activation,
        residual=problem.residual,
        dynamic=dynamic,
        window=problem.window,
        maps=problem.maps,
    )


def decline(site: Site, reason: str, facts: WeightFacts | None = None) -> SiteChoice:
    """The choice for a site that stays dense whatever the costs, for a reason that is not a matter of costs."""
    window = site.window if isinstance(site, ConvSite) else None
    return SiteChoice(
        name=site.name,
        shape=(site.out_features, site.in_features),
        tokens=site.tokens,
        density=1.0 if facts is None else facts.density,
        chosen=DENSE,
        reason=f"dense: {reason}",
        dtype=str(site.dtype).removeprefix("torch."),
        patterns=() if facts is None else tuple(str(found.pattern) for found in facts.patterns),
        activation=site.activation,
        residual=site.residual is not None,
        dynamic=site.dynamic,
        declined=True,
        window=window,
        maps=site.maps if isinstance(site, ConvSite) and window is not None else None,
    )


def _predict(
    facts: WeightFacts, problem: Problem, target: Target, options: Options, measured: Mapping[Candidate, float]
) -> tuple[Prediction, ...]:
    """Costs of the candidates that can take the problem, dense first."""
    offered = offered_candidates(facts, problem, target, options.patterns)
    priced = ((candidate, target.predict(candidate, problem)) for candidate in offered)
    return tuple(
        Prediction(
            candidate=candidate,
            us=us,
            nbytes=target.packed_bytes(candidate, facts, problem.dtype),
            measured_us=measured.get(candidate),
        )
        for candidate, us in priced
        if us != float("inf")
    )


def offered_candidates(
    facts: WeightFacts, problem: Problem, target: Target, patterns: Collection[str] | None
) -> list[Candidate]:
    """What a target offers for a problem, dense first."""
    if problem.window is not None:
        return target.conv_candidates(facts, problem.window, patterns)
    return target.candidates(facts, patterns)


def _lowest(
    facts: WeightFacts, predictions: tuple[Prediction, ...], options: Options, only_measured: bool
) -> tuple[Candidate, str]:
    """The candidate of the lowest cost and the reason, without a plan."""
    dense = next(item for item in predictions if item.candidate.is_dense)
    sparse = [item for item in predictions if not item.candidate.is_dense]
    keeps_all = [item for item in sparse if item.candidate.pattern == DENSE.pattern]
    if facts.nonzeros == facts.out_features * facts.in_features and not keeps_all:
        return DENSE, "dense: the weight has no zeros"
    if not sparse:
        found = ", ".join(str(item.pattern) for item in facts.patterns)
        allowed = "" if options.patterns is None else f" among patterns={list(options.patterns)}"
        return (
            DENSE,
            f"dense: no kernel{allowed} for this weight, which satisfies {found} (density {facts.density:.2f})",
        )
    if only_measured:
        sparse = [item for item in sparse if item.measured_us is not None] or sparse
    best = min(sparse, key=lambda item: item.cost)
    how = "measured" if best.measured_us is not None else "predicted"
    costs = f"{how} {_us(best.cost)} us against dense {_us(dense.cost)} us"
    if best.cost * MARGIN <= dense.cost:
        speed = dense.cost / best.cost if best.cost else float("inf")
        return best.candidate, f"{best.candidate}: {costs} ({speed:.1f} times as fast, density {facts.density:.2f})"
    margin = f", a gain below {MARGIN - 1:.0%}" if best.cost < dense.cost else ""
    return DENSE, f"dense: best sparse candidate {best.candidate} {costs}{margin} (density {facts.density:.2f})"


def _forced(
    asked: SiteChoice,
    facts: WeightFacts,
    problem: Problem,
    target: Target,
    predictions: tuple[Prediction, ...],
) -> tuple[Prediction | None, str]:
    """What a plan's entry makes of a site, and the reason; None and why the entry cannot be followed otherwise.

    At the number of tokens of the entry (0: at every one), or at its maps, the kernel is the plan's. Elsewhere only its
    pattern is, and the cheapest of its kernels or dense is taken: the best kernel for 128 tokens may be a bad one for a
    single token.
    """
    wanted = asked.chosen
    if wanted.is_dense:
        return next(item for item in predictions if item.candidate.is_dense), "dense: the plan says so"
    shape = (facts.out_features, facts.in_features)
    if asked.shape not in ((0, 0), shape):
        return None, f"the plan's entry is for a weight of {_shape(asked.shape)}, not {_shape(shape)}"
    pattern = Pattern.parse(wanted.pattern)
    if not any(pattern.admits(found.pattern) for found in facts.patterns):
        return None, f"the plan asks for {wanted}, but the weight does not satisfy {wanted.pattern}"
    # The option `patterns` is about free choice; a plan names its pattern.
    of_pattern = offered_candidates(facts, problem, target, [wanted.pattern])
    offered = [candidate for candidate in of_pattern if not candidate.is_dense]
    priced = {candidate: target.predict(candidate, problem) for candidate in offered}
    same = [c for c, us in priced.items() if us != float("inf") and c.pattern == wanted.pattern]
    here = asked.tokens in (0, problem.tokens) and asked.maps in (None, problem.maps)
    if here:
        same = [c for c in same if c.kernel == wanted.kernel]
        if wanted.params:
            same = [c for c in same if c.params == wanted.params] or same
    if not same:
        return None, f"the plan asks for {wanted}, which target {target.name} does not offer for this weight"
    best = min(same, key=priced.__getitem__)
    dense = next(item for item in predictions if item.candidate.is_dense)
    if not here and priced[best] * MARGIN > dense.us:
        there = f"{asked.tokens} tokens" if asked.maps is None else str(asked.maps)
        return dense, (
            f"dense: the plan asks for {wanted} at {there}; at {problem.maps or problem.tokens} {best} is predicted "
            f"{_us(priced[best])} us against dense {_us(dense.us)} us"
        )
    known = next((item for item in predictions if item.candidate == best), None)
    forced = known or Prediction(best, priced[best], target.packed_bytes(best, facts, problem.dtype))
    return forced, f"{best}: the plan says so (predicted {_us(priced[best])} us against dense {_us(dense.us)} us)"


def _us(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _shape(shape: tuple[int, int]) -> str:
    return f"{shape[1]} to {shape[0]}"
