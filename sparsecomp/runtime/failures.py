"""What failed at run time, by weight: a call falls back to dense then, and `explain` has to be able to say so."""

from __future__ import annotations

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_failures = WeakIdKeyDictionary()
_MAX_KEPT = 16


def record_failure(weight: Tensor, call: str, error: Exception) -> None:
    """Remember that the kernel of a weight failed in a call such as `5 tokens`; the first few of a weight are kept."""
    known: dict[str, str] = _failures.setdefault(weight, {})
    if len(known) < _MAX_KEPT:
        known[call] = f"{type(error).__name__}: {error}"


def failures_of(weight: Tensor) -> str:
    """One clause for a report; empty if nothing failed."""
    known: dict[str, str] = _failures.get(weight, {})
    return "; ".join(f"ran dense at {call}, where its kernel failed with {error}" for call, error in known.items())
