"""Counts that the cost models of all CPUs share."""

from __future__ import annotations

from sparsecomp.targets.base import WeightFacts

# Arithmetic of an activation relative to SiLU: guesses from operation counts, of which calibration measures only GELU's
# price. Dense pays the same, so that a wrong one moves a choice only through the margin.
ACTIVATION_COST = {"none": 0.0, "relu": 0.1, "relu6": 0.2, "hardswish": 0.3, "silu": 1.0, "gelu_tanh": 1.2, "gelu": 1.5}


def shared_loads(facts: WeightFacts) -> float:
    """Loads that the pairs of quads save: an entry whose partner keeps its column too needs none of its own.

    For random rows the share is that which matching was seen to give; rows that were pruned alike share all.
    """
    density = facts.density
    share = 0.75 * density if density < 0.1 else 0.5 * density + 0.03 * (1 - density)
    return max(share * facts.nonzeros, facts.nonzeros - facts.panels[2])
