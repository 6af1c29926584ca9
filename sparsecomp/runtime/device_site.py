"""A rewritten linear on an accelerator: its product; what follows is left to Inductor, which fuses it with the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecomp.runtime.site import LinearRuntime
from sparsecomp.targets.base import Candidate, DeviceKernel


class DeviceSite(LinearRuntime[DeviceKernel]):
    """A linear whose activations stay on their device, in their type."""

    def _prepare(self, candidate: Candidate, weight: Tensor) -> DeviceKernel:
        kernel = self._target.prepare(candidate, weight)
        if not isinstance(kernel, DeviceKernel):
            raise ValueError(f"{candidate} of target {self._target.name} is no kernel for an accelerator")
        return kernel

    def run(self, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        """See `LinearRuntime.run`."""
        packed = self._here.packed
        outputs, inputs = packed.facts.out_features, packed.facts.in_features
        tokens = x.numel() // inputs if inputs else 0
        kernel = self._kernel(packed, tokens, residual is not None) if tokens else None
        if kernel is None:
            return self._dense(packed.values, x, bias, residual)
        value = kernel.product(x.reshape(tokens, inputs).contiguous(), bias).view(*x.shape[:-1], outputs)
        return value if residual is None else value + residual

    def _dense(self, matrix: Tensor, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        if x.dtype != torch.int8:
            return super()._dense(matrix, x, bias, residual)
        value = torch._int_mm(x.reshape(-1, x.shape[-1]), matrix.t())
        return value.view(*x.shape[:-1], matrix.shape[0])
