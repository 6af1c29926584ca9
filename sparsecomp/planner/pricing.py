"""Latencies for a plan: of whole models, and of sites for weights that are not in the model yet."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsecomp.log import log
from sparsecomp.options import Options
from sparsecomp.planner.budget import GAINS
from sparsecomp.planner.choose import choose, offered_candidates
from sparsecomp.planner.measure import measure
from sparsecomp.planner.plan import Plan, SiteChoice
from sparsecomp.planner.select import fastest
from sparsecomp.pruning.calibration import Call
from sparsecomp.pruning.sparsify import sparsify_
from sparsecomp.targets.base import DENSE, Candidate, Problem, Target, WeightFacts

HOPELESS = 2.0
"""No candidate is measured that is predicted to take this many times as long as dense."""

_ROUNDS = (5, 30)
_SECONDS = 2.0


def model_us(model: nn.Module, call: Call) -> float:
    """Median microseconds of one call of a model compiled by Inductor."""
    return _compiled_us(model, call, "inductor", None)


def planned_us(model: nn.Module, call: Call, plan: Plan, target: Target) -> float:
    """Median microseconds of one call of a copy of a model, pruned and compiled as planned.

    It is pruned by magnitude: kernels take the same time for any mask of a pattern.
    """
    pruned = copy.deepcopy(model)
    sparsify_(pruned, plan, progress=False)
    return _compiled_us(pruned, call, "sparse", {"plan": plan, "target": target})


def _compiled_us(model: nn.Module, call: Call, backend: str, options: dict[str, Any] | None) -> float:
    compile_model: Any = torch.compile  # whose overloads do not know all of its arguments
    compiled: Callable[..., Any] = compile_model(
        model, backend=backend, options=options, dynamic=False, isolate_recompiles=True
    )
    times: list[float] = []
    with torch.inference_mode():
        for _ in range(3):
            compiled(*call.args, **call.kwargs)
        begin = time.perf_counter()
        while len(times) < _ROUNDS[0] or (len(times) < _ROUNDS[1] and time.perf_counter() - begin < _SECONDS):
            start = time.perf_counter()
            compiled(*call.args, **call.kwargs)
            times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times)


def with_gain(options: Plan, time_plan: Callable[[Plan], float]) -> Plan:
    """The options of a plan, with what the fastest choice of patterns gains as measured.

    Sites are timed one by one with their weights in the nearest cache. In a model dense weights come from further away
    than packed ones, and other operations are fused, so that the rest of the model does not take the same under both.

    Args:
        options: what can be chosen, skips aside.
        time_plan: measures microseconds of one call of the model as planned.
    """
    unskipped = [replace(site, options=tuple(o for o in site.options if o.skip is None)) for site in options]
    tried = fastest(replace(options, sites=unskipped))
    before, after = options.summary, tried.summary
    assert before is not None
    assert after is not None
    if after.planned_us >= before.dense_us or not any(site.prune for site in tried):
        return options
    measured = time_plan(tried)
    gain = (before.dense_us - measured) / (before.dense_us - after.planned_us)
    log.info("plan: the fastest is predicted to take %.0f us and takes %.0f us", after.planned_us, measured)
    low, high = GAINS
    summary = replace(before, gain=min(max(gain, low), high))
    return replace(options, summary=replace(summary, planned_us=summary.call_us(before.planned_us)))


class Pricer:
    """What sites would take with other weights.

    Args:
        target: offers and prices the candidates.
        autotune: measure the candidates, once for sites that are alike, where they would otherwise be predicted.
        nbytes: of the weights of the model.
    """

    def __init__(self, target: Target, *, autotune: bool, nbytes: int = 0) -> None:
        self.target, self._near, self._autotune = target.for_model(nbytes), target, autotune
        self._threads = torch.get_num_threads()
        self._known: dict[tuple[Any, ...], dict[Candidate, float]] = {}
        self._dense: dict[tuple[Any, ...], float] = {}

    def scale(self, sites: list[tuple[SiteChoice, Tensor]]) -> float:
        """Microseconds of dense products as they are measured now over those predicted, all sites together.

        The clock may differ from that of the calibration, which changes all costs alike. The latency of the model is
        measured now, and what the sites take is subtracted from it. 1 for a target that is not here.
        """
        if self.target.why_not_here() is not None:
            return 1.0
        measured = sum(self._dense_us(site, weight) for site, weight in sites)
        # Measured one by one they lie in the caches, wherever those of the model do.
        problems = [_problem(site, WeightFacts.of(weight), self._threads, self.target) for site, weight in sites]
        predicted = sum(self._near.predict(DENSE, problem) for problem in problems)
        return measured / predicted if predicted else 1.0

    def _dense_us(self, site: SiteChoice, weight: Tensor) -> float:
        key = _likeness(site)
        if key not in self._dense:
            problem = _problem(site, WeightFacts.of(weight), self._threads, self.target)
            self._dense[key] = measure([], _tensor(site, weight), problem, self.target)[DENSE]
        return self._dense[key]

    def price(self, site: SiteChoice, weight: Tensor, prune: str) -> SiteChoice:
        """The entry of a site if it had this weight.

        Args:
            site: as it is.
            weight: `[O, I]`; of a convolution `[O, I / groups * taps]`.
            prune: what the weight was pruned to: sites that are alike are measured once for each.
        """
        facts = WeightFacts.of(weight)
        problem = _problem(site, facts, self._threads, self.target)
        measured = self._measure(site, weight, problem, prune) if self._autotune else None
        priced = choose(facts, problem, self.target, Options(), name=site.name, dynamic=site.dynamic, measured=measured)
        return replace(priced, block=site.block)

    def _measure(self, site: SiteChoice, weight: Tensor, problem: Problem, prune: str) -> dict[Candidate, float]:
        priced = {
            candidate: self.target.predict(candidate, problem)
            for candidate in offered_candidates(problem.facts, problem, self.target, None)
        }
        hopeful = [c for c, us in priced.items() if not c.is_dense and us < HOPELESS * priced[DENSE]]
        dense = self._dense_us(site, weight)
        if not hopeful:
            return {DENSE: dense}
        key = (*_likeness(site), prune, round(problem.facts.density, 2), tuple(hopeful))
        if key not in self._known:
            times = measure(hopeful, _tensor(site, weight), problem, self.target)
            # Against one measurement of dense, so that a change of the clock between two calls favours none.
            self._known[key] = {candidate: us * dense / times[DENSE] for candidate, us in times.items()}
        return self._known[key]


def _problem(site: SiteChoice, facts: WeightFacts, threads: int, target: Target) -> Problem:
    dtype = next(dtype for dtype in target.dtypes if str(dtype) == f"torch.{site.dtype}")
    return Problem(facts, site.tokens, threads, site.activation, site.residual, dtype, site.window, site.maps)


def _likeness(site: SiteChoice) -> tuple[Hashable, ...]:
    """What sites have in common that take the same time."""
    return site.shape, site.tokens, site.dtype, site.window, site.maps


def _tensor(site: SiteChoice, weight: Tensor) -> Tensor:
    """The weight `[O, I]` of a site as its product takes it: of a convolution `[O, I / groups, kh, kw]`."""
    return weight if site.window is None else weight.reshape(weight.shape[0], -1, *site.window.kernel)


def scaled(choice: SiteChoice, scale: float) -> SiteChoice:
    """An entry whose predicted costs are multiplied."""
    return replace(choice, predictions=tuple(replace(item, us=item.us * scale) for item in choice.predictions))
