"""`calibrate_skips`: thresholds for a rate of skipping, on text like that of the task, and the rate of every layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import Progress
from torch import nn

from sparsecomp.blocks import UNNAMED
from sparsecomp.experts import warn_of_whole_experts
from sparsecomp.log import log
from sparsecomp.planner.knapsack import Item, solve
from sparsecomp.planner.plan import Plan
from sparsecomp.planner.quality import FLOOR, Quality, mean_loss
from sparsecomp.planner.skips import SkipForm
from sparsecomp.pruning.calibration import Call, as_calls, calibrating
from sparsecomp.pruning.sites import FilterFn
from sparsecomp.skipping.block import block_choices, block_cosines, calibrate_block
from sparsecomp.skipping.emulate import emulate
from sparsecomp.skipping.forms import SkipChoice, SkipPlan
from sparsecomp.skipping.lowrank import with_low_rank
from sparsecomp.skipping.samples import sample_hidden, sample_inputs
from sparsecomp.skipping.scores import RATES, Scores, ffn_scores, input_scores
from sparsecomp.skipping.sites import FFN, InputGroup, find_ffns, find_input_groups

PROBE_CALLS = 1
"""The loss of one site is measured on so many calibration batches, the last ones: small batches are quicker."""


def calibrate_skips(
    model: nn.Module,
    calibration: Iterable[Any],
    form: str | SkipForm | Plan,
    *,
    filter_fn: FilterFn | None = None,
    layerwise: bool = True,
    quality: Quality | None = None,
    progress: bool | None = None,
) -> SkipPlan:
    """Find what every FFN block, or every linear, may skip.

    The rate of a form is that of the model: how much a single layer skips depends on what it costs there. The loss of
    the model is measured with one layer skipping at a time, carried over to other rates by the share of its output that
    would be lost, and the rates are the knapsack of least loss (the greedy search of TEAL, Liu et al. 2024,
    arXiv:2408.14690, Algorithm 1, does so within one block). See docs/skipping.md.

    Args:
        model: a module of Hugging Face or of `torch.nn`; it is not changed.
        calibration: batches of model inputs, as for `sparsify_`.
        form: `relu`; `threshold:P` or `input:P` with the share P that is to be skipped on average; `rsparse:P`, which
            is `input:P` with what is skipped approximated where that loses less; or `block:T`. Or a plan of
            `sparsecomp.plan`, that the model was pruned by: every site then gets the thresholds of the form that was
            planned for it, and the arguments below have no meaning.
        filter_fn: `(module, qualified_name) -> bool`, asked for FFN blocks or linears; None means all FFN blocks, and
            the linears of the repeated blocks of the model.
        layerwise: whether rates may differ between layers; else every layer skips P, and only samples are taken.
        quality: `(dense_output, output) -> loss` of one batch, as for `sparsecomp.plan`.
        progress: whether to show a progress bar; None: on a terminal.

    Returns:
        The plan, for `emulate` and for the option `skip` of the backend.

    Raises:
        ValueError: the form is none, the model has no site for it (or for the plan), a site did not run or has NaN in
            its activations, or the outputs cannot be compared.
    """
    calls = as_calls(calibration)
    model = getattr(model, "_orig_mod", model)  # below torch.compile
    warn_of_whole_experts(model)
    if isinstance(form, Plan):
        with calibrating(model):
            return calibrate_forms(model, calls, form.skips())
    wanted = SkipForm.parse(form)
    if wanted.kind in ("relu", "block"):
        with calibrating(model):
            ffns = _ffns(model, filter_fn)
            if wanted.kind == "relu":
                return SkipPlan.of(SkipChoice(ffn.name, wanted) for ffn in ffns)
            return calibrate_block(model, calls, wanted, ffns)
    (plan,) = calibrate_rates(
        model,
        calls,
        wanted.kind,
        [wanted.parameter or 0.0],
        filter_fn=filter_fn,
        layerwise=layerwise,
        quality=quality,
        progress=progress,
    )
    return plan


def calibrate_rates(
    model: nn.Module,
    calls: Sequence[Call],
    kind: str,
    rates: Sequence[float],
    *,
    filter_fn: FilterFn | None = None,
    layerwise: bool = True,
    quality: Quality | None = None,
    progress: bool | None = None,
) -> list[SkipPlan]:
    """The plans of several rates of one kind of form, `threshold`, `input` or `rsparse`, from one measurement.

    Losses of single layers are measured at the middle rate; all else is as in `calibrate_skips`.
    """
    console = Console(stderr=True)
    hide = not (console.is_terminal if progress is None else progress)
    middle = sorted(rates)[len(rates) // 2]
    with calibrating(model), Progress(console=console, disable=hide) as bar:
        sites = skip_scores(model, calls, SkipForm(kind, middle), filter_fn)
        losses: list[list[float]] = []
        if layerwise and len(sites) > 1 and middle:
            task = bar.add_task("measuring skips", total=len(sites))
            losses = skip_losses(model, calls, sites, middle, quality, lambda: bar.advance(task))
    found = []
    for rate in rates:
        each = _allocate(sites, losses, rate) if losses else [rate] * len(sites)
        skip = with_low_rank if kind == "rsparse" else Scores.choices
        found.append(SkipPlan.of(choice for site, own in zip(sites, each, strict=True) for choice in skip(site, own)))
    return found


def calibrate_forms(model: nn.Module, calls: Sequence[Call], forms: Mapping[str, SkipForm]) -> SkipPlan:
    """Find thresholds for sites whose forms are known; run it inside `calibrating(model)`.

    Args:
        model: as it will run, so pruned where it is to be.
        calls: calibration batches.
        forms: by name of the FFN block or of the linear.

    Raises:
        ValueError: the model has no such site, or one did not run or gave NaN or infinity.
    """
    linears = {name: form for name, form in forms.items() if not form.of_block}
    modules = dict(model.named_modules())
    groups = []
    for name, form in linears.items():
        module = modules.get(name)
        if not isinstance(module, nn.Linear):
            raise ValueError(f"{name!r} is to skip {form}, but is no nn.Linear of {type(model).__name__}")
        groups.append(InputGroup((name,), (module,)))
    ffns = {ffn.name or UNNAMED: ffn for ffn in find_ffns(model)}
    if unknown := [name for name, form in forms.items() if form.of_block and name not in ffns]:
        raise ValueError(
            f"{unknown[0]!r} is to skip {forms[unknown[0]]}, but is no FFN block of {type(model).__name__}"
        )
    found: list[SkipChoice] = []
    for group, sample in zip(groups, sample_inputs(model, calls, groups) if groups else [], strict=True):
        form = linears[group.names[0]]
        rate = form.parameter or 0.0
        choose = with_low_rank if form.kind == "rsparse" else Scores.choices
        found += choose(input_scores(group, sample, rate), rate)
    units = {ffn: forms[name] for name, ffn in ffns.items() if name in forms and forms[name].kind == "threshold"}
    sampled = sample_hidden(model, calls, list(units)) if units else []
    for (ffn, form), hidden in zip(units.items(), sampled, strict=True):
        rate = form.parameter or 0.0
        found += ffn_scores(ffn, hidden, rate).choices(rate)
    found += [SkipChoice(ffns[name].name, form) for name, form in forms.items() if form.kind == "relu"]
    for form in {form for form in forms.values() if form.kind == "block"}:
        taking = [ffn for name, ffn in ffns.items() if forms.get(name) == form]
        found += block_choices(block_cosines(model, calls, taking), form, taking)
    return SkipPlan.of(found)


def skip_scores(
    model: nn.Module, calls: Sequence[Call], form: SkipForm, filter_fn: FilterFn | None = None
) -> list[Scores]:
    """Sample the sites of a form; run it inside `calibrating(model)`.

    Raises:
        ValueError: there is none, or one did not run or gave NaN or infinity.
    """
    rate = form.parameter or 0.0
    if form.kind == "threshold":
        ffns = _ffns(model, filter_fn)
        return [ffn_scores(f, s, rate) for f, s in zip(ffns, sample_hidden(model, calls, ffns), strict=True)]
    groups = find_input_groups(model, calls[0], filter_fn)
    return [input_scores(g, s, rate) for g, s in zip(groups, sample_inputs(model, calls, groups), strict=True)]


def _ffns(model: nn.Module, filter_fn: FilterFn | None) -> list[FFN]:
    found = find_ffns(model, filter_fn)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no FFN block that is known by the names of its parts (such as gate_proj, "
            "up_proj and down_proj, or fc1 and fc2), or filter_fn rejected all: use the form 'input:P' for its linears"
        )
    return found


def skip_losses(
    model: nn.Module,
    calls: Sequence[Call],
    sites: Sequence[Scores],
    rate: float,
    quality: Quality | None,
    done: Callable[[], None],
) -> list[list[float]]:
    """The loss of the model for every site and each of `RATES`, with this site alone skipping.

    Measured at one rate, that given or the next at which something is lost at all; the others lose in proportion to the
    lost share of the output, as in `planner.sensitivity`. Run it inside `calibrating(model)`.
    """
    probes = calls[-PROBE_CALLS:]
    dense = [call.run(model) for call in probes]
    found = []
    for site in sites:
        errors = site.errors()
        at = next((n for n, r in enumerate(RATES) if r >= rate and errors[n] > 0), len(RATES) - 1)
        with emulate(model, SkipPlan.of(site.choices(RATES[at]))):
            loss = max(FLOOR, mean_loss(model, probes, dense, quality))
        found.append([loss * error / max(errors[at], FLOOR) for error in errors])
        done()
    return found


def _allocate(sites: Sequence[Scores], losses: Sequence[Sequence[float]], rate: float) -> list[float]:
    """Rates of the least summed loss at which the weights that are not read are the share `rate` of all."""
    items = [
        [Item(loss, (1 - r) * site.weights) for r, loss in zip(RATES, row, strict=True)]
        for site, row in zip(sites, losses, strict=True)
    ]
    total = sum(site.weights for site in sites)
    picked = solve(items, (1 - rate) * total)
    if picked is None:
        return [rate] * len(sites)  # more than the highest of RATES
    rates = [RATES[at] for at in picked]
    log.info("skipping: %s", ", ".join(f"{s.names[0]} {r:.2f}" for s, r in zip(sites, rates, strict=True)))
    return rates
