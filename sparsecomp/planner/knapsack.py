"""The multiple-choice knapsack: of every class one item, least value in sum under a limit on the sum of weights.

Solved exactly as a mixed-integer linear program (Sinha and Zoltners 1979, "The multiple-choice knapsack problem",
eq. 1 to 4), by HiGHS through SciPy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

TIME_LIMIT_S = 30.0
"""HiGHS proves the optimum of hundreds of classes in well under a second; this bounds what a strange document costs."""

_SCALE = 1e3
# HiGHS allows a row to be off by 1e-6: in rows of this size that is one part in 10^9.
_SLACK = 1e-9


@dataclass(frozen=True)
class Item:
    """One thing that a class may become.

    Attributes:
        value: what is minimised in sum, not negative.
        weight: what is limited in sum, not negative.
    """

    value: float
    weight: float


def solve(classes: Sequence[Sequence[Item]], limit: float) -> list[int] | None:
    """Pick an item of every class.

    Args:
        classes: at least one item each.
        limit: of the summed weights.

    Returns:
        The place of the picked item in every class; None if even the lightest items are heavier than the limit. Where
        classes are so many that the optimum is not proven within `TIME_LIMIT_S`, the best choice that was found.
    """
    lightest = [_lightest(items) for items in classes]
    if _weight(classes, lightest) > limit * (1 + _SLACK):
        return None
    places = [_undominated(items) for items in classes]
    freest = [kept[0] for kept in places]
    if _weight(classes, freest) <= limit:
        return freest
    picked = _milp([[items[at] for at in kept] for items, kept in zip(classes, places, strict=True)], limit)
    if picked is None:
        return lightest
    return [kept[at] for kept, at in zip(places, picked, strict=True)]


def _lightest(items: Sequence[Item]) -> int:
    return min(range(len(items)), key=lambda at: (items[at].weight, items[at].value))


def _weight(classes: Sequence[Sequence[Item]], picked: Sequence[int]) -> float:
    return sum(items[at].weight for items, at in zip(classes, picked, strict=True))


def _undominated(items: Sequence[Item]) -> list[int]:
    """Places of the items that no other is at least as good as in both ways: least value first, lightest last."""
    kept: list[int] = []
    for at in sorted(range(len(items)), key=lambda at: (items[at].value, items[at].weight)):
        if not kept or items[at].weight < items[kept[-1]].weight:
            kept.append(at)
    return kept


def _milp(classes: Sequence[Sequence[Item]], limit: float) -> list[int] | None:
    sizes = [len(items) for items in classes]
    values = np.array([item.value for items in classes for item in items])
    weights = np.array([item.weight for items in classes for item in items])
    # What every choice has in common only costs digits.
    least = sum(items[-1].weight for items in classes)
    weights -= np.repeat([items[-1].weight for items in classes], sizes)
    room = limit - least
    scale = max(room, float(weights.max()) / _SCALE, np.finfo(float).tiny)
    owner = np.repeat(np.arange(len(classes)), sizes)
    one_each = csr_array((np.ones(len(values)), (owner, np.arange(len(values)))), shape=(len(classes), len(values)))
    starts = np.concatenate([[0], np.cumsum(sizes)])
    for tightened in (1.0, 1.0 - 1e-6):
        result = milp(
            values / max(float(values.max()), np.finfo(float).tiny),
            integrality=np.ones(len(values)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(weights * (_SCALE / scale), -np.inf, room * tightened * (_SCALE / scale)),
            ],
            options={"mip_rel_gap": 0.0, "time_limit": TIME_LIMIT_S},
        )
        if result.x is None:
            return None
        chosen = [int(np.argmax(result.x[start:end])) for start, end in pairwise(starts)]
        total = sum(weights[start + at] for start, at in zip(starts[:-1], chosen, strict=True))
        if total <= room + _SLACK * limit:
            return chosen
    return None
