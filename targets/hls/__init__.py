"""FPGAs: what devices hold, and what a design takes of it, in cycles, DSP slices and block RAMs."""

from __future__ import annotations

from sparsecomp.targets.hls.cost import LayerCost, cycles_of, linear_cost
from sparsecomp.targets.hls.parts import Part, part, part_names

__all__ = ["LayerCost", "Part", "cycles_of", "linear_cost", "part", "part_names"]
