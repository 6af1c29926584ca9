"""What operations skipped at run time, by weight, and whether that was too little: `explain` shows it afterwards."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Counters = npt.NDArray[np.int64]

_counters = WeakIdKeyDictionary()
_resting = WeakIdKeyDictionary()


def count_skips(weight: Tensor, site: int, counters: Counters) -> None:
    """Remember where the kernel of a site counts for a weight: int64 `[2]`, what stayed and what was looked at."""
    by_site: dict[int, Counters] = _counters.setdefault(weight, {})
    by_site[site] = counters


def note_rest(weight: Tensor, site: int, kept: float | None) -> None:
    """Remember that a site takes the dense way for a weight since it kept such a share; None: it skips again."""
    by_site: dict[int, float | None] = _resting.setdefault(weight, {})
    by_site[site] = kept


def rest_of(weight: Tensor) -> float | None:
    """The share that was kept where a site of a weight takes the dense way for now, None if none does."""
    by_site: dict[int, float | None] = _resting.get(weight, {})
    return next((kept for kept in by_site.values() if kept is not None), None)


def skip_rate_of(weight: Tensor) -> float | None:
    """The share that was skipped for a weight in all calls so far, None if there were none."""
    by_site: dict[int, Counters] = _counters.get(weight, {})
    kept = sum(int(counters[0]) for counters in by_site.values())
    total = sum(int(counters[1]) for counters in by_site.values())
    return 1 - kept / total if total else None
