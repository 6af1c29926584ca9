"""Which entries of a weight may be nonzero: the grammar, projection on a pattern, detection, and the packed panels."""

from __future__ import annotations

from sparsecomp.patterns.detect import Detection, detect, kept_columns
from sparsecomp.patterns.panel import PanelWeight
from sparsecomp.patterns.pattern import Fit, Pattern

__all__ = ["Detection", "Fit", "PanelWeight", "Pattern", "detect", "kept_columns"]
