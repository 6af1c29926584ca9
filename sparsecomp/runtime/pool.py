"""Max pooling of maps that lie channels first, and the op that calls it.

Inductor's code for it is scalar unless the maps lie channels last, which ours do not: of a ResNet-50 with 90 % zeros it
would be 5 % of the time.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sparsecomp.targets import get_target
from sparsecomp.targets.base import ConvEpilogue, ConvKernel
from sparsecomp.window import Maps, Window, read_form

# Kernels that are remembered.
_MAX_KERNELS = 256

_library = torch.library.Library("sparsecomp", "FRAGMENT")
# The form is that of `form_of`: the window over as many channels as there are outputs.
_library.define("max_pool(Tensor x, str target, str form) -> Tensor")


@functools.lru_cache(maxsize=_MAX_KERNELS)
def _kernel(target: str, form: str) -> ConvKernel | None:
    window, channels = read_form(form)
    grouped = Window(window.kernel, window.stride, window.padding, window.dilation, channels, window.extra)
    return get_target(target).prepare_pool(grouped)


def write_pool(x: Tensor, target: str, form: str, out: Tensor) -> None:
    """Pool the maps x.

    Args:
        x: `[N, C, H, W]`.
        target: of the kernel.
        form: of the window, as `sparsecomp.window.form_of` writes it.
        out: contiguous, written.

    Raises:
        RuntimeError: the target has no kernel for that.
    """
    kernel = _kernel(target, form)
    if kernel is None:
        raise RuntimeError(f"target {target} has no kernel for max pooling: compile the model again")
    if out.numel():
        maps = Maps(x.shape[0], x.shape[2], x.shape[3])
        kernel.ready(maps, ConvEpilogue(), False)(x.contiguous(), None, None, out)


def _max_pool(x: Tensor, target: str, form: str) -> Tensor:
    out = torch.empty(_sizes(x, form))
    write_pool(x, target, form, out)
    return out


def _meta(x: Tensor, target: str, form: str) -> Tensor:
    return x.new_empty(_sizes(x, form))


def _sizes(x: Tensor, form: str) -> tuple[int, ...]:
    window, channels = read_form(form)
    return (x.shape[0], channels, *window.output(x.shape[2], x.shape[3]))


_library.impl("max_pool", _max_pool, "CPU")
_library.impl("max_pool", _meta, "Meta")
MAX_POOL = torch.ops.sparsecomp.max_pool.default
