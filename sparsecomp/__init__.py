"""Sparse neural networks, faster on the hardware that people have: pruning, a `torch.compile` backend and its reports.

Nothing below is imported before it is used: `TORCH_LOGS="+sparsecomp"` makes torch import this package while torch
itself is still being imported, and a command line that only prints its help should not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsecomp.checkpoints import load_checkpoint as load_checkpoint
    from sparsecomp.checkpoints import save_checkpoint as save_checkpoint
    from sparsecomp.dryrun import explain as explain
    from sparsecomp.experts import split_experts_ as split_experts_
    from sparsecomp.exporting.api import export as export
    from sparsecomp.options import Options as Options
    from sparsecomp.patterns import Pattern as Pattern
    from sparsecomp.planner import Plan as Plan
    from sparsecomp.planning import plan as plan
    from sparsecomp.pruning import Reconstruction as Reconstruction
    from sparsecomp.pruning import freeze_masks as freeze_masks
    from sparsecomp.pruning import reestimate_batchnorm as reestimate_batchnorm
    from sparsecomp.pruning import sparsify_ as sparsify_
    from sparsecomp.report import Report as Report
    from sparsecomp.skipping import SkipPlan as SkipPlan
    from sparsecomp.skipping import calibrate_skips as calibrate_skips

__all__ = [
    "Options",
    "Pattern",
    "Plan",
    "Reconstruction",
    "Report",
    "SkipPlan",
    "__version__",
    "calibrate_skips",
    "explain",
    "export",
    "freeze_masks",
    "load_checkpoint",
    "plan",
    "reestimate_batchnorm",
    "save_checkpoint",
    "sparsify_",
    "split_experts_",
]

_HOMES = {
    "Options": "sparsecomp.options",
    "Pattern": "sparsecomp.patterns",
    "Plan": "sparsecomp.planner",
    "Reconstruction": "sparsecomp.pruning",
    "Report": "sparsecomp.report",
    "SkipPlan": "sparsecomp.skipping",
    "calibrate_skips": "sparsecomp.skipping",
    # Not in a module of its own name: importing that would put the module where the function belongs.
    "explain": "sparsecomp.dryrun",
    "export": "sparsecomp.exporting.api",
    "freeze_masks": "sparsecomp.pruning",
    "load_checkpoint": "sparsecomp.checkpoints",
    "plan": "sparsecomp.planning",
    "reestimate_batchnorm": "sparsecomp.pruning",
    "save_checkpoint": "sparsecomp.checkpoints",
    "sparsify_": "sparsecomp.pruning",
    "split_experts_": "sparsecomp.experts",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("sparsecomp")
    elif name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'sparsecomp' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
