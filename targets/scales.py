"""Factors by which a calibration scales predicted times, kept in the cache folder under the name of a machine."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping

from sparsecomp.runtime.cache import cache_dir

log = logging.getLogger(__name__)
_MOST_BYTES = 1 << 20


def load(name: str) -> tuple[dict[str, float], str]:
    """Factors by kernel, and why there are none.

    A file that cannot be used counts as none, with a warning: it only refines, and the next calibration writes it anew.

    Args:
        name: of the machine, as `save` had it.

    Returns:
        The factors; and where there are none, the reason, else an empty text.
    """
    path = cache_dir() / f"{name}.json"
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"larger than {_MOST_BYTES} bytes")
        scales = json.loads(path.read_text(encoding="utf-8"))["scales"]
        found = {str(kernel): float(factor) for kernel, factor in scales.items()}
        if not all(math.isfinite(factor) and factor > 0 for factor in found.values()):
            raise ValueError("a factor is no positive number")
    except FileNotFoundError:
        return {}, "not measured"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("the calibration %s is not used: %s; run `sparsecomp calibrate` again", path, error)
        return {}, "its calibration cannot be read"
    return found, ""


def save(name: str, scales: Mapping[str, float]) -> None:
    """Keep the factors by kernel."""
    cache_dir().mkdir(parents=True, exist_ok=True, mode=0o700)
    text = json.dumps({"scales": dict(scales)}, indent=1)
    (cache_dir() / f"{name}.json").write_text(text + "\n", encoding="utf-8")
