"""FFN blocks and linears that do only the work a token needs: forms, thresholds and their emulation."""

from __future__ import annotations

from sparsecomp.planner.skips import SkipForm
from sparsecomp.skipping.calibrate import calibrate_skips
from sparsecomp.skipping.emulate import SkipRates, emulate
from sparsecomp.skipping.forms import SkipChoice, SkipPlan
from sparsecomp.skipping.generate import compiled_forward

__all__ = ["SkipChoice", "SkipForm", "SkipPlan", "SkipRates", "calibrate_skips", "compiled_forward", "emulate"]
