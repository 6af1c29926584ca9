"""What pruning one site costs the model, for every pattern: one measurement at a site, carried over to its patterns.

For a site with weight W, inputs X (the calibration rows, divided as `pruning.statistics` does) and pruned weight W',
the relative output error is

    e(W') = ||(W' - W) X||^2 / ||W X||^2,

which the Gram matrix of the inputs gives without running anything. How much the model suffers from an error is a matter
of the site: it is measured end to end, with this site alone pruned to the pattern of the middle error, and the other
patterns lose in proportion to their errors. That takes one forward pass on a few batches for every site, whatever the
number of patterns, and works for any loss. docs/planning.md compares it with the estimators that need no measurement at
pruned weights (noise at the site's output, Fisher information); they rank pairs of site and pattern clearly worse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sparsecomp.patterns import Pattern
from sparsecomp.planner.quality import FLOOR
from sparsecomp.pruning.calibration import Call, Stream, find_blocks
from sparsecomp.pruning.criterion import Criterion
from sparsecomp.pruning.sites import Site
from sparsecomp.pruning.statistics import Statistics, collect

Wanted = Callable[[Site, str, Tensor], bool]
"""`(site, pattern, pruned weight [O, I]) -> whether its loss matters`."""


@dataclass(frozen=True)
class Estimate:
    """What one pattern does to one site.

    Attributes:
        prune: the printed pattern.
        error: relative squared error of the site's output.
        loss: estimated increase of the model's loss.
    """

    prune: str
    error: float
    loss: float = 0.0


def estimate(
    model: nn.Module,
    calls: Sequence[Call],
    sites: Sequence[Site],
    patterns: Sequence[Pattern],
    criterion: Criterion,
    *,
    loss: Callable[[], float],
    wanted: Wanted,
    done: Callable[[], None],
) -> dict[str, list[Estimate]]:
    """Estimate the losses; run it inside `calibrating(model)`. The weights are as before afterwards.

    Args:
        model: the dense model.
        calls: calibration batches, for the statistics.
        sites: what may be pruned.
        patterns: what to.
        criterion: prunes.
        loss: measures the model as it is.
        wanted: is told every pruned weight, and says whether its pattern is an option at all.
        done: called after every site.

    Returns:
        The estimates of the patterns that are wanted, by name of the site.

    Raises:
        ValueError: a site was not reached, its inputs hold NaN or infinity, or it cannot be pruned.
    """
    blocks = find_blocks(model)
    inside = {id(module) for _, block in blocks for module in block.modules()}
    outside = any(id(site.module) not in inside for site in sites)
    left = list(sites)
    found: dict[str, list[Estimate]] = {}
    for part in Stream(model, calls, blocks, whole=outside):
        modules = {id(module) for module in part.module.modules()}
        own = [site for site in left if id(site.module) in modules]
        left = [site for site in left if id(site.module) not in modules]
        known = collect(part.module, part.calls, own, gram=True) if own else {}
        for site in own:
            found[site.name] = _estimate_site(site, known.pop(id(site.weight)), patterns, criterion, loss, wanted)
            done()
        if not left:
            break
    return found


def _estimate_site(
    site: Site,
    known: Statistics,
    patterns: Sequence[Pattern],
    criterion: Criterion,
    loss: Callable[[], float],
    wanted: Wanted,
) -> list[Estimate]:
    weight = site.kind.to_matrix(site.weight).detach()
    assert known.gram is not None
    whole = _energy(weight, known.gram)
    trials: list[tuple[Estimate, Tensor]] = []
    for pattern in filter(site.takes, patterns):
        try:
            pruned = criterion.prune(weight, pattern, known)
        except ValueError as error:
            raise ValueError(f"{site.where} cannot be pruned to {pattern}: {error}") from error
        new = pruned.weight if pruned.weight is not None else weight.masked_fill(~pruned.mask, 0)
        if wanted(site, str(pattern), new):
            error_of = _energy(new - weight, known.gram) / whole if whole else 0.0
            trials.append((Estimate(str(pattern), error_of), new))
    if not trials:
        return []
    trials.sort(key=lambda trial: trial[0].error)
    middle, new = trials[len(trials) // 2]
    measured = max(_measure(site, new, loss), FLOOR)
    return [
        replace(trial, loss=max(FLOOR, measured * (trial.error / middle.error if middle.error else 1.0)))
        for trial, _ in trials
    ]


def _energy(weight: Tensor, gram: Tensor) -> float:
    """`||W X||^2` from `X^T X`."""
    wide = weight.to(gram.dtype)
    return max(0.0, float(((wide @ gram) * wide).sum(dtype=torch.float64)))


def _measure(site: Site, matrix: Tensor, loss: Callable[[], float]) -> float:
    """The loss of the model with another weight in one site."""
    before = site.weight.detach().clone()
    try:
        site.weight.copy_(site.kind.from_matrix(matrix, site.weight))
        return loss()
    finally:
        site.weight.copy_(before)
