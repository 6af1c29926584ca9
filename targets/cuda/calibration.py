"""What a card was measured to take: a factor for each kernel, kept in the cache folder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from sparsecomp.runtime.cache import cache_dir
from sparsecomp.targets.cuda.cards import Card


def save(card: Card, scales: Mapping[str, float]) -> None:
    """Keep the factors by kernel."""
    cache_dir().mkdir(parents=True, exist_ok=True, mode=0o700)
    _path(card).write_text(json.dumps({"scales": dict(scales)}, indent=1) + "\n", encoding="utf-8")


def _path(card: Card) -> Path:
    return cache_dir() / f"cuda-{card.name}.json"


def load(card: Card) -> dict[str, float]:
    """Factors by kernel, as `save` kept them; none where the card was not measured.

    A file that cannot be read counts as none: it is only a refinement, and is written anew by the next calibration.
    """
    try:
        scales = json.loads(_path(card).read_text(encoding="utf-8"))["scales"]
        found = {str(kernel): float(factor) for kernel, factor in scales.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return found if all(math.isfinite(factor) and factor > 0 for factor in found.values()) else {}
