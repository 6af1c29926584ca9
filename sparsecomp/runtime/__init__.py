"""Run time: the cache of compiled kernels, their launcher, and the torch op that runs a rewritten site."""

from __future__ import annotations

from sparsecomp.runtime.site import RuntimeSite

__all__ = ["RuntimeSite"]
