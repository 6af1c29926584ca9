"""What the code that Inductor writes calls: the ops of the run time, with outputs that Inductor has allocated.

The names and arguments of these functions are written into code that Inductor caches on disk: they must not change
their meaning.
"""

from __future__ import annotations

from torch import Tensor

from sparsecomp.runtime.conv_site import conv_site
from sparsecomp.runtime.pool import write_pool
from sparsecomp.runtime.site import linear_site


def linear(x: Tensor, bias: Tensor | None, residual: Tensor | None, site: int, *, out: Tensor) -> None:
    """`sparsecomp::linear`."""
    linear_site(site).write(x, bias, residual, out)


def conv(x: Tensor, terms: Tensor | None, residual: Tensor | None, site: int, *, out: Tensor) -> None:
    """`sparsecomp::conv`."""
    conv_site(site).write(x, terms, residual, out)


def max_pool(x: Tensor, target: str, form: str, *, out: Tensor) -> None:
    """`sparsecomp::max_pool`."""
    write_pool(x, target, form, out)
