"""Putting zeros into a model: the criterion that ranks weights, and the in-place pruning of whole models."""

from __future__ import annotations

from sparsecomp.pruning.batchnorm import reestimate_batchnorm
from sparsecomp.pruning.freeze import FrozenMasks, freeze_masks
from sparsecomp.pruning.magnitude import magnitude
from sparsecomp.pruning.reconstruct import Reconstruction
from sparsecomp.pruning.sparsify import sparsify_

__all__ = ["FrozenMasks", "Reconstruction", "freeze_masks", "magnitude", "reestimate_batchnorm", "sparsify_"]
