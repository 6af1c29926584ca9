"""The multiple-choice knapsack: of every class one item, least value in sum under limits on sums of weights.

Solved exactly as a mixed-integer linear program (Sinha and Zoltners 1979, "The multiple-choice knapsack problem",
eq. 1 to 4), by HiGHS through SciPy. Items of several classes may belong together: all of these classes take one of
them, or none does.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
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
        others: weights of other limits, not negative.
        bond: where an item of a bond is picked, every class that has items of this bond takes one of them; None: the
            item goes with all others.
    """

    value: float
    weight: float
    bond: Hashable = None
    others: tuple[float, ...] = ()

    @property
    def weights(self) -> tuple[float, ...]:
        """Of all limits."""
        return self.weight, *self.others


def solve(classes: Sequence[Sequence[Item]], limit: float, others: Sequence[float] = ()) -> list[int] | None:
    """Pick an item of every class.

    Args:
        classes: at least one item each.
        limit: of the summed weights.
        others: limits of the items' other weights.

    Returns:
        The place of the picked item in every class; None if no choice keeps the limits. Where classes are so many that
        the optimum is not proven within `TIME_LIMIT_S`, the best choice that was found.
    """
    limits = [limit, *others]
    for at, bound in enumerate(limits):
        if sum(min(item.weights[at] for item in items) for items in classes) > bound * (1 + _SLACK):
            return None
    freest = [min(range(len(items)), key=lambda at: (items[at].value, items[at].weight)) for items in classes]
    if _fits(classes, freest, limits) and _keeps_bonds(classes, freest):
        return freest
    places = [_undominated(items) for items in classes]
    picked = _milp([[items[at] for at in kept] for items, kept in zip(classes, places, strict=True)], limits)
    if picked is None:
        lightest = [min(range(len(items)), key=lambda at: (items[at].weight, items[at].value)) for items in classes]
        slack = [bound * (1 + _SLACK) for bound in limits]
        return lightest if _fits(classes, lightest, slack) and _keeps_bonds(classes, lightest) else None
    return [kept[at] for kept, at in zip(places, picked, strict=True)]


def _fits(classes: Sequence[Sequence[Item]], picked: Sequence[int], limits: Sequence[float]) -> bool:
    chosen = [items[at].weights for items, at in zip(classes, picked, strict=True)]
    return all(sum(weights[at] for weights in chosen) <= limit for at, limit in enumerate(limits))


def _keeps_bonds(classes: Sequence[Sequence[Item]], picked: Sequence[int]) -> bool:
    """Whether of every bond all classes that have it take it, or none does."""
    taken = {items[at].bond for items, at in zip(classes, picked, strict=True)} - {None}
    return all(
        item.bond not in taken or item.bond == items[at].bond
        for items, at in zip(classes, picked, strict=True)
        for item in items
    )


def _undominated(items: Sequence[Item]) -> list[int]:
    """Places of the items that no other of the same bond is at least as good as in all ways; least value first."""
    kept: list[int] = []
    of_bond: dict[Hashable, list[tuple[float, ...]]] = {}
    for at in sorted(range(len(items)), key=lambda at: (items[at].value, items[at].weight)):
        item = items[at]
        better = of_bond.setdefault(item.bond, [])
        if not any(all(a <= b for a, b in zip(other, item.weights, strict=True)) for other in better):
            kept.append(at)
            better.append(item.weights)
    return kept


def _milp(classes: Sequence[Sequence[Item]], limits: Sequence[float]) -> list[int] | None:
    sizes = [len(items) for items in classes]
    values = np.array([item.value for items in classes for item in items])
    weights = np.array([item.weights for items in classes for item in items]).T
    # What every choice has in common only costs digits.
    lightest = [np.min([item.weights for item in items], axis=0) for items in classes]
    weights -= np.repeat(lightest, sizes, axis=0).T
    room = np.array(limits) - np.sum(lightest, axis=0)
    scale = np.maximum(room, weights.max(axis=1) / _SCALE)
    scale[scale <= np.finfo(float).tiny * _SCALE] = 1.0  # nothing is weighed, and nothing is left
    owner = np.repeat(np.arange(len(classes)), sizes)
    one_each = csr_array((np.ones(len(values)), (owner, np.arange(len(values)))), shape=(len(classes), len(values)))
    constraints = [LinearConstraint(one_each, 1, 1)]
    if (together := _bonds(classes)) is not None:
        constraints.append(LinearConstraint(together, 0, 0))
    starts = np.concatenate([[0], np.cumsum(sizes)])
    for tightened in (1.0, 1.0 - 1e-6):
        limited = LinearConstraint(weights * (_SCALE / scale)[:, None], -np.inf, room * tightened * (_SCALE / scale))
        result = milp(
            values / max(float(values.max()), np.finfo(float).tiny),
            integrality=np.ones(len(values)),
            bounds=Bounds(0, 1),
            constraints=[*constraints, limited],
            options={"mip_rel_gap": 0.0, "time_limit": TIME_LIMIT_S},
        )
        if result.x is None:
            return None
        chosen = [int(np.argmax(result.x[start:end])) for start, end in pairwise(starts)]
        total = weights[:, [start + at for start, at in zip(starts[:-1], chosen, strict=True)]].sum(axis=1)
        if np.all(total <= room + _SLACK * np.array(limits)):
            return chosen
    return None


def _bonds(classes: Sequence[Sequence[Item]]) -> csr_array | None:
    """Rows that are zero where of every bond each class takes as many items as the first that has it; None for none."""
    members: dict[Hashable, dict[int, list[int]]] = {}
    place = 0
    for number, items in enumerate(classes):
        for item in items:
            if item.bond is not None:
                members.setdefault(item.bond, {}).setdefault(number, []).append(place)
            place += 1
    pairs = [pair for by_class in members.values() for pair in pairwise(by_class.values())]
    if not pairs:
        return None
    columns = [at for first, second in pairs for at in (*first, *second)]
    rows = [row for row, (first, second) in enumerate(pairs) for _ in (*first, *second)]
    signs = [sign for first, second in pairs for sign in (*[1.0] * len(first), *[-1.0] * len(second))]
    return csr_array((signs, (rows, columns)), shape=(len(pairs), place))
