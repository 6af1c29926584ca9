"""How long a call takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

_RUNS = (5, 60)


def median_seconds(call: Callable[[], object], budget: float = 0.12) -> float:
    """Median time of a call: after one warm-up, between 5 and 60 runs, as the budget in seconds allows."""
    call()
    times: list[float] = []
    end = time.perf_counter() + budget
    while len(times) < _RUNS[0] or (time.perf_counter() < end and len(times) < _RUNS[1]):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
