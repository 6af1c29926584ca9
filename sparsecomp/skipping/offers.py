"""What FFN blocks and linears may skip, as options of a plan: forms, losses and predicted costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsecomp.log import log
from sparsecomp.planner.plan import SiteChoice
from sparsecomp.planner.quality import FLOOR
from sparsecomp.planner.skips import SkipForm
from sparsecomp.pruning.calibration import Call
from sparsecomp.pruning.sites import Site
from sparsecomp.skipping.block import calibrate_block
from sparsecomp.skipping.emulate import emulate
from sparsecomp.skipping.forms import SkipChoice, SkipPlan
from sparsecomp.skipping.lowrank import error_of, with_low_rank
from sparsecomp.skipping.samples import sample_hidden, sample_inputs
from sparsecomp.skipping.scores import Scores, ffn_scores, input_scores
from sparsecomp.skipping.sites import FFN, InputGroup
from sparsecomp.targets.base import Target, WeightFacts

LEAST_ZEROS = 0.05
"""Share of exact zeros in a hidden layer from which `relu` is offered; activations of other kinds give next to none."""


@dataclass(frozen=True)
class Offer:
    """One form for one linear.

    Attributes:
        form: of the linear, or of the block that it is in.
        kept: share of its rows or columns that is read.
        calls: share of its calls that is computed.
        loss: what it is estimated to add to the model's loss; of a form of blocks the part of one linear.
        factors: of a low-rank approximation beside.
        by_input: whether columns are read, else rows.
    """

    form: SkipForm
    kept: float
    loss: float
    calls: float = 1.0
    factors: tuple[WeightFacts, ...] = ()
    by_input: bool = True


def parse_forms(given: Iterable[str | SkipForm]) -> tuple[SkipForm, ...]:
    """The forms that a plan may choose from, each once.

    Raises:
        ValueError: one is no form.
    """
    items = [given] if isinstance(given, (str, SkipForm)) else list(given)
    for item in items:
        if not isinstance(item, (str, SkipForm)):
            raise ValueError(f"skips holds {item!r:.60}: expected forms such as 'input:0.4' or 'threshold:0.4'")
    return tuple(dict.fromkeys(map(SkipForm.parse, items)))


def can_skip(choice: SiteChoice, target: Target) -> bool:
    """Whether a site of a plan is a linear that the target can let skip."""
    few = 0 < choice.tokens <= target.skip_tokens
    return bool(target.skips) and few and choice.window is None and not choice.declined


Cost = Callable[[SiteChoice, WeightFacts, float, bool], float]
"""`(entry, weight, share that is read, whether of its inputs) -> microseconds`."""


def cost_of(target: Target, scale: float) -> Cost:
    """The predictions of a target for the present number of threads, multiplied."""
    threads = torch.get_num_threads()

    def cost(entry: SiteChoice, facts: WeightFacts, kept: float, by_input: bool) -> float:
        dtype: torch.dtype = getattr(torch, entry.dtype)
        return scale * target.predict_skip(facts, kept, entry.tokens, threads, dtype, by_input)

    return cost


def skip_us(entries: Sequence[SiteChoice], facts: WeightFacts, offer: Offer, cost: Cost) -> list[float]:
    """Microseconds of every entry of a linear (one for every call of it) in the form of an offer."""
    return [
        offer.calls * cost(entry, facts, offer.kept, offer.by_input)
        + sum(cost(entry, own, 1.0, True) for own in offer.factors)
        for entry in entries
    ]


def skip_costs(
    entries: Sequence[SiteChoice], weight: Tensor, offers: Sequence[Offer], cost: Cost
) -> list[tuple[Offer, list[float]]]:
    """Microseconds of every entry of a linear that skips, without the offers for it alone that gain nothing.

    Args:
        entries: of the linear, one for every call of it; what was chosen for them is what is to be beaten.
        weight: `[O, I]` that they are for.
        offers: for the linear.
        cost: predicts.
    """
    facts = WeightFacts.of(weight)
    priced = [(offer, skip_us(entries, facts, offer, cost)) for offer in offers]
    return [(offer, us) for offer, us in priced if offer.form.of_block or sum(us) < _chosen_us(entries)]


def _chosen_us(entries: Sequence[SiteChoice]) -> float:
    return sum(entry.chosen_us or 0.0 for entry in entries)


def offer_skips(
    model: nn.Module,
    calls: Sequence[Call],
    sites: Sequence[Site],
    ffns: Sequence[FFN],
    forms: Sequence[SkipForm],
    *,
    entries: Mapping[str, Sequence[SiteChoice]],
    cost: Cost,
    loss: Callable[[], float],
    done: Callable[[], None],
) -> dict[str, list[Offer]]:
    """The forms that linears may take, alone or with their block; run it inside `calibrating(model)`.

    As for patterns the loss of the model is measured once for every linear and once for every block, skipping alone in
    the form of the middle error; the other forms are taken to lose in proportion to their error of the output.

    Args:
        model: as it is, not pruned.
        calls: calibration batches.
        sites: the linears.
        ffns: the blocks, whose linears are among them.
        forms: that are wanted.
        entries: of the plan, by name of the linear; a form of blocks is offered where it beats what is chosen there.
        cost: predicts.
        loss: measures the model as it is.
        done: called after every linear and every block.

    Returns:
        The offers by name of the linear.

    Raises:
        ValueError: a linear did not run, or was given NaN or infinity.
    """
    found: dict[str, list[Offer]] = {site.name: [] for site in sites}
    linears = [site for site in sites if isinstance(site.module, nn.Linear)]
    of_inputs = [form for form in forms if form.kind in ("input", "rsparse")]
    if of_inputs and linears:
        groups = [InputGroup((site.name,), (site.module,)) for site in linears if isinstance(site.module, nn.Linear)]
        for group, sample in zip(groups, sample_inputs(model, calls, groups), strict=True):
            found[group.names[0]] += _input_offers(
                model, input_scores(group, sample, _middle(of_inputs)), of_inputs, loss
            )
            done()
    weights = {site.name: WeightFacts.of(site.kind.to_matrix(site.weight).detach()) for site in sites}

    def gains(offers: Mapping[str, Offer]) -> bool:
        us = sum(sum(skip_us(entries[name], weights[name], offer, cost)) for name, offer in offers.items())
        return us < sum(_chosen_us(entries[name]) for name in offers)

    of_units = [form for form in forms if form.kind in ("relu", "threshold")]
    if of_units and ffns:
        for ffn, hidden in zip(ffns, sample_hidden(model, calls, ffns), strict=True):
            scores = ffn_scores(ffn, hidden, _middle(of_units))
            for offers in _unit_offers(model, ffn, scores, of_units, gains, loss):
                _add(found, offers)
            done()
    for form in forms:
        if form.kind == "block" and len(ffns) > 1:
            _add(found, _block_offers(model, calls, ffns, form, gains, loss))
    return found


def _add(found: dict[str, list[Offer]], offers: Mapping[str, Offer]) -> None:
    for name, offer in offers.items():
        found[name].append(offer)


def _middle(forms: Sequence[SkipForm]) -> float:
    rates = sorted(form.parameter or 0.0 for form in forms)
    return rates[len(rates) // 2]


def _losses(
    model: nn.Module, choices: Sequence[SkipChoice], errors: Sequence[float], loss: Callable[[], float]
) -> list[float]:
    """The losses of choices for one site, from one measurement at the middle error."""
    if not choices:
        return []
    middle = sorted(range(len(errors)), key=errors.__getitem__)[len(errors) // 2]
    with emulate(model, SkipPlan.of([choices[middle]])):
        measured = max(FLOOR, loss())
    each = [measured * error / errors[middle] if errors[middle] else measured for error in errors]
    return [max(FLOOR, value) for value in each]


def _input_offers(
    model: nn.Module, scores: Scores, forms: Sequence[SkipForm], loss: Callable[[], float]
) -> list[Offer]:
    choices: dict[SkipForm, SkipChoice] = {}
    for form in forms:
        choose = with_low_rank if form.kind == "rsparse" else Scores.choices
        (choice,) = choose(scores, form.parameter or 0.0)
        # Where no rank is better, R-Sparse is the plain form.
        choices.setdefault(choice.form, choice)
    chosen = list(choices.values())
    losses = _losses(model, chosen, [error_of(scores, choice) for choice in chosen], loss)
    return [
        Offer(c.form, 1 - c.expected, lost, factors=tuple(map(WeightFacts.of, c.low_rank or ())))
        for c, lost in zip(chosen, losses, strict=True)
    ]


def _unit_offers(
    model: nn.Module,
    ffn: FFN,
    scores: Scores,
    forms: Sequence[SkipForm],
    gains: Callable[[Mapping[str, Offer]], bool],
    loss: Callable[[], float],
) -> list[dict[str, Offer]]:
    """For the forms that skip hidden units of a block, the offers of its linears."""
    offers: list[dict[str, Offer]] = []
    lossy: list[tuple[SkipChoice, float]] = []
    for form in forms:
        (choice,) = scores.choices(form.parameter or 0.0)
        if form.kind == "relu":
            if choice.expected >= LEAST_ZEROS and gains(zeros := _by_linear(ffn, form, choice.expected, 0.0)):
                offers.append(zeros)
        elif gains(_by_linear(ffn, form, choice.expected, 0.0)):
            lossy.append((choice, scores.error(form.parameter or 0.0)))
    losses = _losses(model, [choice for choice, _ in lossy], [error for _, error in lossy], loss)
    found = [_by_linear(ffn, c.form, c.expected, lost) for (c, _), lost in zip(lossy, losses, strict=True)]
    return offers + found


def _by_linear(ffn: FFN, form: SkipForm, skipped: float, loss: float) -> dict[str, Offer]:
    """The gate is read in full, of the others the units that stay; of a weight that holds gate and up the mean."""
    gate = 1 - skipped / 2 if ffn.gated and len(ffn.linears) == 2 else 1.0
    kept = [gate, *[1 - skipped] * (len(ffn.linears) - 1)]
    down = ffn.linears[-1]
    return {
        name: Offer(form, own, loss / len(kept), by_input=name == down)
        for name, own in zip(ffn.linears, kept, strict=True)
    }


def _block_offers(
    model: nn.Module,
    calls: Sequence[Call],
    ffns: Sequence[FFN],
    form: SkipForm,
    gains: Callable[[Mapping[str, Offer]], bool],
    loss: Callable[[], float],
) -> dict[str, Offer]:
    """The offers of all blocks that take part in `block:T`, whose loss is measured of all of them together."""
    try:
        plan = calibrate_block(model, calls, form, ffns)
    except ValueError as reason:
        log.info("plan: %s is not offered: %s", form, reason)
        return {}
    shares = {name: plan[ffn.name].expected for ffn in ffns if ffn.name in plan for name in ffn.linears}
    offers = {name: Offer(form, 1.0, 0.0, calls=1 - share) for name, share in shares.items()}
    if not gains(offers):
        return {}
    with emulate(model, plan):
        lost = max(FLOOR, loss()) / len(offers)
    return {name: Offer(form, 1.0, lost, calls=1 - share) for name, share in shares.items()}
