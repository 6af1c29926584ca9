"""An FFN on an accelerator that skips the hidden units that a token does not need."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sparsecomp.runtime.ffn_site import SkipRuntime
from sparsecomp.runtime.skip_rates import Counted
from sparsecomp.targets.skip import DeviceSkipKernel, SkipSpec


class DeviceSkip(SkipRuntime[DeviceSkipKernel]):
    """An FFN whose activations stay on their device, in their type; with more tokens than skip it is dense."""

    def prepare(self, tokens: int, residual: bool) -> None:
        """See `SkipRuntime.prepare`."""
        if 0 < tokens <= self._target.skip_tokens:
            self._make_current()

    def run(self, x: Tensor, biases: Sequence[Tensor | None], residual: Tensor | None) -> Tensor:
        """See `SkipRuntime.run`."""
        tokens = x.numel() // self._inputs
        kernel = self._kernel() if 0 < tokens <= self._target.skip_tokens else None
        if kernel is None:
            return self._dense(x, biases, residual)
        value = kernel.run(x.reshape(tokens, self._inputs).contiguous(), biases).view(*x.shape[:-1], self._outputs)
        return value if residual is None else value + residual

    def _prepared(self, spec: SkipSpec) -> DeviceSkipKernel:
        kernel = self._target.prepare_skip(spec, self._current_rows())
        if not isinstance(kernel, DeviceSkipKernel):
            raise ValueError(f"what target {self._target.name} has for {self.name} is for no accelerator")
        return kernel

    def _counted(self, kernel: DeviceSkipKernel, place: int) -> Counted:
        return kernel.counted

    @property
    def nbytes(self) -> int:
        """See `SkipRuntime.nbytes`."""
        kernel = self._kernel()
        return super().nbytes + (0 if kernel is None else kernel.nbytes)
