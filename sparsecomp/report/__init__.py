"""Reports for people and programs: what every layer could become, what was chosen, and why."""

from __future__ import annotations

from sparsecomp.report.report import Report

__all__ = ["Report"]
