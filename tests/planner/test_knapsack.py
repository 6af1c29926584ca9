from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecomp.planner.knapsack import Item, solve

NUMBER = st.floats(0, 1e6) | st.integers(0, 5).map(float)
CLASSES = st.lists(st.lists(st.builds(Item, NUMBER, NUMBER), min_size=1, max_size=4), min_size=1, max_size=4)


def total(classes: list[list[Item]], picked: tuple[int, ...] | list[int]) -> Item:
    items = [options[at] for options, at in zip(classes, picked, strict=True)]
    return Item(sum(item.value for item in items), sum(item.weight for item in items))


@settings(max_examples=60)
@given(CLASSES, st.floats(0, 1))
def test_the_choice_is_the_best_of_all(classes: list[list[Item]], share: float) -> None:
    low = sum(min(item.weight for item in items) for items in classes)
    high = sum(max(item.weight for item in items) for items in classes)
    limit = low + share * (high - low)
    picked = solve(classes, limit)
    assert picked is not None
    given_total = total(classes, picked)
    assert given_total.weight <= limit * (1 + 1e-8)
    every = itertools.product(*(range(len(items)) for items in classes))
    # Of what is a hair below the limit: at the limit itself the last digits decide.
    allowed = (total(classes, choice) for choice in every)
    best = min((item.value for item in allowed if item.weight <= low + share * (high - low) * (1 - 1e-5)), default=None)
    if best is not None:
        assert given_total.value <= best * (1 + 1e-5) + 1e-5


THREE_WEIGHTS = st.lists(
    st.lists(st.builds(Item, NUMBER, NUMBER, st.none(), st.tuples(NUMBER, NUMBER)), min_size=1, max_size=4),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60)
@given(THREE_WEIGHTS, st.tuples(*[st.floats(0, 1)] * 3))
def test_all_of_several_limits_are_kept_and_the_choice_is_the_best(
    classes: list[list[Item]], shares: tuple[float, float, float]
) -> None:
    limits = []
    for at, share in enumerate(shares):
        low, high = (sum(end(item.weights[at] for item in items) for items in classes) for end in (min, max))
        limits.append(low + share * (high - low))
    sums = []
    for choice in itertools.product(*(range(len(items)) for items in classes)):
        chosen = [items[at] for items, at in zip(classes, choice, strict=True)]
        weights = [sum(item.weights[at] for item in chosen) for at in range(3)]
        sums.append((sum(item.value for item in chosen), [w - limit for w, limit in zip(weights, limits, strict=True)]))
    within = [
        value for value, over in sums if all(o <= -1e-5 * max(1, lim) for o, lim in zip(over, limits, strict=True))
    ]
    picked = solve(classes, limits[0], limits[1:])
    if picked is None:
        assert not within
        return
    chosen = [items[at] for items, at in zip(classes, picked, strict=True)]
    assert all(sum(item.weights[at] for item in chosen) <= limit * (1 + 1e-8) for at, limit in enumerate(limits))
    if within:
        assert sum(item.value for item in chosen) <= min(within) * (1 + 1e-5) + 1e-5


BONDED = st.lists(
    st.lists(st.builds(Item, NUMBER, NUMBER, st.sampled_from([None, "a", "b"])), max_size=3).map(
        lambda items: [Item(10.0, 10.0), *items]
    ),
    min_size=1,
    max_size=4,
)


def together(classes: list[list[Item]], choice: tuple[int, ...] | list[int]) -> bool:
    """Whether of each bond all classes that have it take it, or none does."""
    for bond in ("a", "b"):
        having = [items[at].bond == bond for items, at in zip(classes, choice, strict=True) if bond in _bonds(items)]
        if any(having) and not all(having):
            return False
    return True


def _bonds(items: list[Item]) -> set[object]:
    return {item.bond for item in items}


@settings(max_examples=60)
@given(BONDED, st.floats(0.2, 1))
def test_what_belongs_together_is_chosen_together(classes: list[list[Item]], share: float) -> None:
    limit = share * sum(max(item.weight for item in items) for items in classes)
    every = itertools.product(*(range(len(items)) for items in classes))
    allowed = [total(classes, choice) for choice in every if together(classes, choice)]
    picked = solve(classes, limit)
    if picked is None:
        assert not any(item.weight <= limit * (1 - 1e-5) for item in allowed)
        return
    given_total = total(classes, picked)
    assert together(classes, picked)
    assert given_total.weight <= limit * (1 + 1e-8)
    best = min((item.value for item in allowed if item.weight <= limit * (1 - 1e-5)), default=None)
    if best is not None:
        assert given_total.value <= best * (1 + 1e-5) + 1e-5


def test_a_limit_below_the_lightest_choice_cannot_be_kept() -> None:
    assert solve([[Item(0, 5), Item(1, 3)], [Item(0, 2)]], 4.9) is None
    assert solve([[Item(0, 5), Item(1, 3)], [Item(0, 2)]], 5.0) == [1, 0]


def test_without_need_nothing_is_given_up() -> None:
    assert solve([[Item(3, 1), Item(0, 9)], [Item(0, 9), Item(0, 4)]], 100) == [1, 1]


def test_greedy_by_ratio_would_be_worse() -> None:
    # The best ratio (2 of value for 10 of weight saved) leaves 1 to save, which then costs 9 more.
    classes = [[Item(0, 10), Item(2, 0)], [Item(0, 11), Item(3, 0)]]
    assert solve(classes, 10) == [0, 1]


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_units_do_not_matter(scale: float) -> None:
    numbers = random.Random(0)
    classes = [[Item(numbers.random(), numbers.random()) for _ in range(5)] for _ in range(12)]
    scaled = [[Item(scale * item.value, scale * item.weight) for item in items] for items in classes]
    assert solve(scaled, 4 * scale) == solve(classes, 4)


def test_hundreds_of_classes_keep_the_limit() -> None:
    numbers = random.Random(1)
    classes = [[Item(0, 1), *(Item(numbers.random(), numbers.random()) for _ in range(11))] for _ in range(210)]
    limit = 80.0
    picked = solve(classes, limit)
    assert picked is not None
    best = total(classes, picked)
    assert 0.999 * limit < best.weight <= limit
    # The relaxation's bound: with the price of weight at its optimum no choice is better than this.
    bound = max(
        sum(min(item.value + price * item.weight for item in items) for items in classes) - price * limit
        for price in (step / 100 for step in range(300))
    )
    assert bound <= best.value <= 1.01 * bound
