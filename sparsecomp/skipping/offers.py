"""What linears may skip of their inputs, as options of a plan: thresholds, losses and predicted costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsecomp.planner.plan import SiteChoice
from sparsecomp.planner.quality import FLOOR
from sparsecomp.planner.skips import InputSkip
from sparsecomp.pruning.calibration import Call
from sparsecomp.pruning.sites import Site
from sparsecomp.skipping.emulate import emulate
from sparsecomp.skipping.forms import SkipChoice, SkipForm, SkipPlan
from sparsecomp.skipping.samples import sample_inputs
from sparsecomp.skipping.scores import Scores
from sparsecomp.skipping.sites import InputGroup
from sparsecomp.targets.base import Target, WeightFacts
from sparsecomp.targets.skip import FEW_TOKENS


@dataclass(frozen=True)
class Offer:
    """One rate of a linear.

    Attributes:
        skip: the rate and its threshold.
        loss: what it is estimated to add to the model's loss.
    """

    skip: InputSkip
    loss: float


def check_rates(rates: Iterable[float]) -> tuple[float, ...]:
    """Shares of inputs that linears may skip.

    Raises:
        ValueError: one is not above 0 and below 1.
    """
    found = tuple(sorted(set(rates)))
    for rate in found:
        if not 0 < rate < 1:
            raise ValueError(f"skips holds {rate:g}: expected shares of inputs from above 0 to below 1, such as [0.4]")
    return found


def can_skip(choice: SiteChoice, target: Target) -> bool:
    """Whether a site of a plan is a linear that the target can let skip."""
    few = 0 < choice.tokens <= FEW_TOKENS
    return target.skips and few and choice.window is None and choice.dtype == "float32" and not choice.declined


def offer_skips(
    model: nn.Module,
    calls: Sequence[Call],
    sites: Sequence[Site],
    rates: Sequence[float],
    *,
    loss: Callable[[], float],
    done: Callable[[], None],
) -> dict[str, list[Offer]]:
    """Thresholds on the inputs of linears (TEAL) and the losses that they cause; run it inside `calibrating(model)`.

    As for patterns the loss of the model is measured once for every linear, skipping alone at the middle rate; at the
    other rates it is taken to be in proportion to the error of the linear's output.

    Raises:
        ValueError: a linear did not run, or was given NaN or infinity.
    """
    linears = [site for site in sites if isinstance(site.module, nn.Linear)]
    groups = [InputGroup((site.name,), (site.module,)) for site in linears if isinstance(site.module, nn.Linear)]
    found: dict[str, list[Offer]] = {}
    for site, sample in zip(linears, sample_inputs(model, calls, groups), strict=True):
        matrix = site.weight.detach().float()
        scores = Scores((site.name,), "input", sample, sample, matrix, None, matrix.numel())
        skips = [InputSkip(rate, scores.threshold(rate)) for rate in rates]
        errors = [scores.error(rate) for rate in rates]
        middle = len(rates) // 2
        choice = SkipChoice(site.name, SkipForm("input", rates[middle]), skips[middle].threshold)
        with emulate(model, SkipPlan.of([choice])):
            measured = max(FLOOR, loss())
        each = [measured * error / errors[middle] if errors[middle] else measured for error in errors]
        found[site.name] = [Offer(skip, max(FLOOR, value)) for skip, value in zip(skips, each, strict=True)]
        done()
    return found


Cost = Callable[[WeightFacts, float, int], float]
"""`(weight, share that is read, tokens) -> microseconds`."""


def cost_of(target: Target, scale: float) -> Cost:
    """The predictions of a target for the present number of threads, multiplied."""
    threads = torch.get_num_threads()
    return lambda facts, kept, tokens: scale * target.predict_skip(facts, kept, tokens, threads)


def skip_costs(
    entries: Sequence[SiteChoice], weight: Tensor, offers: Sequence[Offer], cost: Cost
) -> list[tuple[Offer, list[float]]]:
    """Microseconds of every entry of a linear that skips, for the offers that are predicted to gain in sum.

    Args:
        entries: of the linear, one for every call of it; what was chosen for them is what is to be beaten.
        weight: `[O, I]` that they are for.
        offers: of the linear.
        cost: predicts.
    """
    facts = WeightFacts.of(weight)
    found = []
    for offer in offers:
        times = [cost(facts, 1 - offer.skip.rate, entry.tokens) for entry in entries]
        if sum(times) < sum(entry.chosen_us or 0.0 for entry in entries):
            found.append((offer, times))
    return found
