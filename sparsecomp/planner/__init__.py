"""Decides what every site becomes on a target; the decisions are a plan that can be saved, edited and given back."""

from __future__ import annotations

from sparsecomp.planner.choose import MARGIN, choose, decline
from sparsecomp.planner.measure import measure
from sparsecomp.planner.plan import Plan, PlanError, Prediction, SiteChoice

__all__ = [
    "MARGIN",
    "Plan",
    "PlanError",
    "Prediction",
    "SiteChoice",
    "choose",
    "decline",
    "measure",
]
