"""What a criterion is, and the criteria by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparsecomp.patterns import Pattern, groups
from sparsecomp.pruning.magnitude import magnitude
from sparsecomp.pruning.ria import ria
from sparsecomp.pruning.sparsegpt import sparsegpt
from sparsecomp.pruning.statistics import Statistics
from sparsecomp.pruning.wanda import wanda

Needs = Literal["nothing", "norms", "gram"]


@dataclass(frozen=True)
class Pruned:
    """What a criterion decided for a weight `[O, I]`.

    Attributes:
        mask: bool `[O, I]`, True where an entry is kept.
        weight: the new weight, zero where the mask is False; None if the kept entries stay as they are.
    """

    mask: Tensor
    weight: Tensor | None = None


@dataclass(frozen=True)
class Criterion:
    """A way to choose what a weight keeps; each works for every pattern.

    Attributes:
        name: as users give it.
        needs: what it must know of the inputs.
        prune: `(weight [O, I], pattern, statistics) -> Pruned`; the statistics are None if it needs nothing.
        update: `(weight [O, I], pattern, statistics, mask) -> new weight` for a mask that was refined; None if kept
            entries stay as they are.
    """

    name: str
    needs: Needs
    prune: Callable[[Tensor, Pattern, Statistics | None], Pruned]
    update: Callable[[Tensor, Pattern, Statistics, Tensor], Tensor] | None = None


def choose_per_row(score: Tensor, pattern: Pattern) -> Tensor:
    """`pattern.mask`, except that `unstructured@S` takes the same share from every row.

    Rows differ by at most one entry, so that all of them together keep what `pattern.mask` would.

    Args:
        score: `[O, I]`, higher is more important.
        pattern: what may be kept.

    Returns:
        bool `[O, I]`, True where an entry is kept.
    """
    if pattern.kind != "unstructured" or pattern.sparsity is None:
        return pattern.mask(score)
    score = groups.prepare_score(score)
    rows, cols = score.shape
    kept = [groups.keep_count(pattern.sparsity, row * cols) for row in range(rows + 1)]
    counts = torch.tensor(kept, device=score.device).diff()
    order = torch.sort(score, dim=1, descending=True, stable=True).indices
    chosen = torch.arange(cols, device=score.device) < counts.unsqueeze(1)
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, chosen)


def _known(statistics: Statistics | None) -> Statistics:
    assert statistics is not None, "collected for every criterion that needs them"
    return statistics


CRITERIA: dict[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        Criterion("magnitude", "nothing", lambda weight, pattern, _: Pruned(pattern.mask(magnitude(weight)))),
        Criterion(
            "wanda",
            "norms",
            lambda weight, pattern, known: Pruned(
                choose_per_row(wanda(weight, _known(known), alone=pattern.kind in ("unstructured", "nm")), pattern)
            ),
        ),
        Criterion("ria", "norms", lambda weight, pattern, known: Pruned(pattern.mask(ria(weight, _known(known))))),
        Criterion(
            "sparsegpt",
            "gram",
            lambda weight, pattern, known: Pruned(*sparsegpt(weight, pattern, _known(known))),
            update=lambda weight, pattern, known, mask: sparsegpt(weight, pattern, known, mask)[1],
        ),
    )
}
"""Every criterion by its name."""


def criterion_named(name: str) -> Criterion:
    """The criterion of that name.

    Raises:
        ValueError: there is none.
    """
    if name in CRITERIA:
        return CRITERIA[name]
    near = difflib.get_close_matches(str(name), CRITERIA, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"criterion {name!r} is not known: {hint}expected one of {', '.join(CRITERIA)}")
