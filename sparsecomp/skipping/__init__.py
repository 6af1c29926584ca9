"""FFN blocks and linears that do only the work a token needs: forms, thresholds and their emulation."""

from __future__ import annotations

from sparsecomp.skipping.forms import SkipChoice, SkipForm, SkipPlan

__all__ = ["SkipChoice", "SkipForm", "SkipPlan"]
