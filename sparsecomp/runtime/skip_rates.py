"""What operations skipped at run time, by weight, and whether that was too little: `explain` shows it afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Counted = Callable[[], Sequence[int]]
"""Gives what stayed and what was looked at, in all calls or, on an accelerator, in the last one."""

_counters = WeakIdKeyDictionary()
_resting = WeakIdKeyDictionary()


def count_skips(weight: Tensor, site: int, counted: Counted) -> None:
    """Remember how to ask what the kernel of a site has counted for a weight; must not keep the weight alive."""
    by_site: dict[int, Counted] = _counters.setdefault(weight, {})
    by_site[site] = counted


def note_rest(weight: Tensor, site: int, kept: float | None) -> None:
    """Remember that a site takes the dense way for a weight since it kept such a share; None: it skips again."""
    by_site: dict[int, float | None] = _resting.setdefault(weight, {})
    by_site[site] = kept


def rest_of(weight: Tensor) -> float | None:
    """The share that was kept where a site of a weight takes the dense way for now, None if none does."""
    by_site: dict[int, float | None] = _resting.get(weight, {})
    return next((kept for kept in by_site.values() if kept is not None), None)


def skip_rate_of(weight: Tensor) -> float | None:
    """The share that was skipped for a weight so far, see `Counted`; None if nothing was counted."""
    by_site: dict[int, Counted] = _counters.get(weight, {})
    counts = [counted() for counted in by_site.values()]
    kept = sum(count[0] for count in counts)
    total = sum(count[1] for count in counts)
    return 1 - kept / total if total else None
