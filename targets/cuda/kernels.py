"""Products on a card: PyTorch's semi-structured one for 2:4, and our kernels, compiled by NVRTC where they are used."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sparsecomp.targets.base import DeviceKernel
from sparsecomp.targets.cuda.cost import TOKENS


class SemiStructured(DeviceKernel):
    """2:4 by cuSPARSELt, with the calls that PyTorch's `SparseSemiStructuredTensorCUSPARSELT` makes.

    They are made on plain tensors: its tensors would be constants of a type that Inductor does not take for a weight.

    Args:
        weight: `[O, I]` with at most two nonzeros of each four inputs, on a card.
    """

    def __init__(self, weight: Tensor) -> None:
        self._packed = torch._cslt_compress(weight.detach().contiguous())
        self._multiple = TOKENS[weight.dtype]
        self._out_dtype = torch.int32 if weight.dtype == torch.int8 else None
        self.nbytes = self._packed.numel() * self._packed.element_size()

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See `DeviceKernel.product`."""
        tokens = x.shape[0]
        if missing := -tokens % self._multiple:
            x = functional.pad(x, (0, 0, 0, missing))
        y = torch._cslt_sparse_mm(self._packed, x.t(), bias=bias, out_dtype=self._out_dtype, transpose_result=True)
        return y.narrow(0, 0, tokens)

    @property
    def source(self) -> str:
        """See `Product.source`."""
        return "torch._cslt_sparse_mm"
