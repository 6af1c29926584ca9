"""Decides what every site becomes on a target; the decisions are a plan that can be saved, edited and given back."""

from __future__ import annotations

from sparsecomp.planner.budget import Budget, Summary
from sparsecomp.planner.choose import MARGIN, choose, decline
from sparsecomp.planner.measure import measure
from sparsecomp.planner.plan import Option, Plan, PlanError, Prediction, SiteChoice

__all__ = [
    "MARGIN",
    "Budget",
    "Option",
    "Plan",
    "PlanError",
    "Prediction",
    "SiteChoice",
    "Summary",
    "choose",
    "decline",
    "measure",
]
