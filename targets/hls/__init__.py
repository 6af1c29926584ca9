"""FPGAs: what devices hold, and what a design takes of it, in cycles and cells."""

from __future__ import annotations

from sparsecomp.targets.hls.cells import Cells
from sparsecomp.targets.hls.cost import LayerCost, Reading, cycles_of, linear_cost
from sparsecomp.targets.hls.parts import Part, part, part_names

__all__ = ["Cells", "LayerCost", "Part", "Reading", "cycles_of", "linear_cost", "part", "part_names"]
