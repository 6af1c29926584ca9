"""The x86 target: AVX-512, AVX2 and generic schedules, a cost model that is calibrated on the machine."""

from __future__ import annotations

from sparsecomp.targets.x86.target import X86Target, create

__all__ = ["X86Target", "create"]
