"""The ARM target: NEON schedules, a cost model from the cycles of the generated loops, for boards that are not here."""

from __future__ import annotations

from sparsecomp.targets.arm.cpu import ArmCpu, cpu_names

__all__ = ["ArmCpu", "cpu_names"]
