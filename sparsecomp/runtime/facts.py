"""Facts of weights, counted once for planning, guards and packing together."""

from __future__ import annotations

import threading

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from sparsecomp.targets.base import WeightFacts


class FactsCache:
    """Facts by weight, counted once while it does not change; holds no weight alive and may be shared by threads."""

    def __init__(self) -> None:
        self._entries = WeakIdKeyDictionary()
        self._lock = threading.Lock()

    def of(self, weight: Tensor, transposed: bool) -> WeightFacts:
        """Facts of a weight, stored `[I, O]` if transposed, as `[O, I]`; a convolution is `[O, I / groups * taps]`."""
        stamp = (weight._version, weight.data_ptr(), tuple(weight.shape), transposed)
        with self._lock:
            entry = self._entries.get(weight)
        if entry is not None and entry[0] == stamp:
            return entry[1]
        matrix = weight.detach().cpu()  # counted there, also where it is on a GPU
        facts = WeightFacts.of(matrix.t() if transposed else matrix.flatten(1))
        with self._lock:
            self._entries[weight] = (stamp, facts)
        return facts


_cache = FactsCache()


def facts_of(weight: Tensor, transposed: bool) -> WeightFacts:
    """Facts of a weight, stored `[I, O]` if transposed, from the process's one cache."""
    return _cache.of(weight, transposed)
