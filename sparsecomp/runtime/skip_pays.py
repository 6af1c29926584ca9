"""Whether skipping is worth it: what a site takes with everything read, with nothing read, and the dense way.

The three are measured once for sites that are alike; after that counted shares decide, and no clock is looked at.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch

from sparsecomp.log import log

WINDOW = 32
"""Calls of a site after which it is looked at what they skipped."""
REST = 15 * WINDOW
"""Calls that take the dense way after too little was skipped."""
MARGIN = 1.03
"""Skipping may take this many times as long as the dense way."""

_ROUNDS = 7
_MAX_KNOWN = 1024


@dataclass(frozen=True)
class Times:
    """Seconds of one call.

    Attributes:
        dense: by products with whole weights.
        none: where nothing is kept.
        every: where everything is kept.
    """

    dense: float
    none: float
    every: float

    def pays(self, read: float) -> bool:
        """Whether skipping is worth it where a share of the rows is read; what is read takes its time in proportion."""
        return self.none + (self.every - self.none) * read <= MARGIN * self.dense


_known: dict[Hashable, Times] = {}
_lock = threading.Lock()


def pays(kept: float, tokens: int, key: Hashable, ways: Callable[[], Sequence[Callable[[], object]]]) -> bool:
    """Whether a site that keeps a share of its units or inputs should go on skipping.

    Args:
        kept: share of them that a token keeps.
        tokens: of a call; a row is read where any of them keeps it.
        key: equal for sites that take the same time.
        ways: gives calls of the dense way, with nothing kept and with everything kept; asked for once for every key.
    """
    key = (key, tokens, torch.get_num_threads())
    with _lock:
        times = _known.get(key)
        if times is None:
            if len(_known) >= _MAX_KNOWN:
                _known.clear()
            times = _known[key] = _measure(ways())
            log.info("skipping %s: dense %.0f us, nothing read %.0f, everything %.0f", key, *_micros(times))
    return times.pays(1 - (1 - kept) ** tokens)


def _measure(ways: Sequence[Callable[[], object]]) -> Times:
    """The best of some rounds, in turn: what disturbs a call only makes it longer."""
    best = [float("inf")] * len(ways)
    for _ in range(_ROUNDS):
        for place, way in enumerate(ways):
            start = time.perf_counter()
            way()
            best[place] = min(best[place], time.perf_counter() - start)
    return Times(*best)


def _micros(times: Times) -> tuple[float, float, float]:
    return 1e6 * times.dense, 1e6 * times.none, 1e6 * times.every
