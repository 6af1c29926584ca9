"""R-Sparse: what is skipped of an input is approximated at low rank, where that loses less than to skip less.

Zhang et al., ICLR 2025, arXiv:2504.19449, eq. 4: `y = W (m * x) + A B ((1 - m) * x)`. A and B are read in full for
every token, so that more inputs must be skipped for the same bytes; calibration compares at equal bytes.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sparsecomp.planner.skips import SkipForm
from sparsecomp.skipping.forms import SkipChoice
from sparsecomp.skipping.scores import Scores

RANKS = (4, 8, 16)
"""That are tried."""


def with_low_rank(site: Scores, rate: float) -> list[SkipChoice]:
    """The choices of linears that share an input: `rsparse` of the best rank, or `input` where no rank loses less.

    The factors are fitted to one half of the sample and compared on the other.

    Args:
        site: linears that share an input.
        rate: share of the weights that is not to be read.
    """
    half = len(site.values) // 2
    fit, test = _rows(site, slice(half, None)), _rows(site, slice(half))
    outputs, inputs = site.matrix.shape
    best, least = (0, rate), test.error(rate)
    for rank in RANKS if half else ():
        more = rate + rank * (outputs + inputs) / site.matrix.numel()
        if more >= 1 or rank >= min(outputs, inputs):
            break
        error = _error(test, fit.threshold(more), _factors(fit, more, rank))
        if error < least:
            best, least = (rank, more), error
    rank, more = best
    choices = site.choices(more)
    if not rank:
        return choices
    a, b = _factors(site, more, rank)
    form = SkipForm("rsparse", round(rate, 4))
    parts = a.split(list(site.heights))
    return [replace(c, form=form, low_rank=(part.clone(), b)) for c, part in zip(choices, parts, strict=True)]


def error_of(site: Scores, choice: SkipChoice) -> float:
    """Relative squared error of the output of one linear, or of linears that share an input, in a form.

    Args:
        site: what was sampled.
        choice: of one of its names; with factors those of all of its outputs.
    """
    rate = choice.expected
    return site.error(rate) if choice.low_rank is None else _error(site, site.threshold(rate), choice.low_rank)


def _rows(site: Scores, rows: slice) -> Scores:
    return replace(site, values=site.values[rows], effect=site.effect[rows])


def _factors(site: Scores, rate: float, rank: int) -> tuple[Tensor, Tensor]:
    """`A [out, rank]` and `B [rank, in]` of the least squared error of `(W - A B)` on what is dropped.

    With `X = U S V^T` the dropped inputs of the sample these are the leading singular parts of `W V S`.
    """
    dropped = site.effect * (site.scores() <= site.threshold(rate))
    _, sizes, directions = torch.linalg.svd(dropped.double(), full_matrices=False)
    # No direction is amplified by more than 10^3.
    sizes = sizes.clamp_min(1e-3 * float(sizes[0].clamp_min(1e-15)))
    vectors = directions.T
    scaled = site.matrix.double() @ (vectors * sizes)
    _, right = torch.linalg.eigh(scaled.T @ scaled)
    leading = right[:, -rank:]
    return (scaled @ leading).float(), (leading.T @ (vectors / sizes).T).float()


def _error(site: Scores, threshold: float, factors: tuple[Tensor, Tensor]) -> float:
    dropped = site.effect * (site.scores() <= threshold)
    lost = dropped @ site.matrix.T - (dropped @ factors[1].T) @ factors[0].T
    total = (site.effect @ site.matrix.T).square().sum(dtype=torch.float64)
    return float(lost.square().sum(dtype=torch.float64) / total.clamp_min(1e-30))
