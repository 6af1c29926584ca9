"""What decides whether a site goes on skipping: shares that were counted, and three times that are measured once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecomp.runtime import skip_pays
from sparsecomp.runtime.skip_pays import MARGIN, Times, pays


@given(st.floats(0, 1), st.floats(0.1, 10), st.floats(0, 10), st.floats(0, 10))
def test_reading_less_never_stops_to_pay(read: float, dense: float, none: float, more: float) -> None:
    times = Times(dense, none, none + more)
    assert not times.pays(read) or times.pays(read / 2)
    assert times.pays(read) or none + more * read > MARGIN * dense


def test_everything_read_at_the_price_of_dense_always_pays() -> None:
    assert Times(100, 20, 103).pays(1.0)
    assert not Times(100, 20, 104).pays(1.0)
    assert Times(100, 20, 104).pays(0.98)


def test_it_is_measured_once_for_every_key_and_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []

    def measure(ways: Sequence[Callable[[], object]]) -> Times:
        measured.append(len(ways))
        return Times(10, 2, 18)

    monkeypatch.setattr(skip_pays, "_measure", measure)
    monkeypatch.setattr(skip_pays, "_known", {})
    calls = [(0.4, 1, "a"), (0.6, 1, "a"), (0.6, 1, "b"), (0.4, 2, "a")]
    # Of two tokens at least one keeps a row more often: 0.64 of the rows are read.
    assert [pays(kept, tokens, key, lambda: [lambda: None] * 3) for kept, tokens, key in calls] == [
        *(True, False, False, False)
    ]
    assert measured == [3, 3, 3]
