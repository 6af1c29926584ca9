"""Graph passes, one a file, that know the IR and no front end: `run_passes(graph, default_passes())` finds sites."""

from __future__ import annotations

from sparsecomp.passes.base import Observer, Pass, PassResult, run_passes
from sparsecomp.passes.detect_composite import DetectComposite
from sparsecomp.passes.detect_conv import DetectConv
from sparsecomp.passes.detect_ffn import DetectFfn
from sparsecomp.passes.detect_linear import DetectLinear
from sparsecomp.passes.detect_moe import DetectMoe
from sparsecomp.passes.fuse_epilogue import FuseEpilogue
from sparsecomp.passes.hold_terms import HoldTerms

__all__ = [
    "DetectComposite",
    "DetectConv",
    "DetectFfn",
    "DetectLinear",
    "DetectMoe",
    "FuseEpilogue",
    "HoldTerms",
    "Observer",
    "Pass",
    "PassResult",
    "default_passes",
    "run_passes",
]


def default_passes(fuse: bool = True) -> list[Pass]:
    """The passes of the backend, in order; those that do not fuse leave what follows a product where it is."""
    fusing: list[Pass] = [FuseEpilogue()] if fuse else []
    return [DetectLinear(), DetectConv(), DetectComposite(), *fusing, HoldTerms(), DetectFfn(), DetectMoe()]
