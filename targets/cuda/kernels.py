"""Products on a card: PyTorch's semi-structured one for 2:4, and our kernels, compiled by NVRTC where they are used."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sparsecomp.cuda.compiled import function_of, sources_of
from sparsecomp.cuda.library import CudaKernel
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


class CompiledKernel(DeviceKernel):
    """One of our kernels.

    Those for many tokens take x and give y with the tokens side by side, so both are turned around here.

    Args:
        kernel: of `sparsecomp.cuda.library`.
        weight: `[O, I]`, on a card, of the kernel's type.
        arch: of the card, such as `sm_90`.

    Raises:
        ValueError: the kernel does not take the weight, or none is compiled for the architecture.
        ModuleNotFoundError: NVRTC is not installed.
    """

    def __init__(self, kernel: CudaKernel, weight: Tensor, arch: str) -> None:
        self._kernel = kernel
        self._shape = (weight.shape[0], weight.shape[1])
        packed = kernel.pack(weight.detach().cpu())
        self._function = function_of(kernel, arch)
        self._packed = {name: value.contiguous().to(weight.device) for name, value in packed.items()}
        self.nbytes = sum(value.numel() * value.element_size() for value in packed.values())

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See `DeviceKernel.product`.

        Raises:
            ValueError: the kernel takes fewer tokens.
        """
        kernel, tokens, (outputs, inputs) = self._kernel, x.shape[0], self._shape
        launch, stride = kernel.launch(outputs, inputs, tokens), kernel.stride(tokens)
        given_type, sums = (torch.int32, torch.int32) if x.dtype == torch.int8 else (x.dtype, torch.float32)
        y = result = x.new_empty(tokens, outputs, dtype=given_type)
        if not kernel.tokens:
            x, rows = x.new_empty(inputs, stride), x
            x.narrow(1, 0, tokens).copy_(rows.t())  # what is behind them may be anything
            y = x.new_empty(outputs, stride, dtype=given_type)
        given: dict[str, Tensor | int | None] = {
            **self._packed,
            "x": x,
            "bias": None if bias is None else bias.to(sums),
            "y": y,
            "outputs": outputs,
            "inputs": inputs,
            "tokens": tokens,
            "stride": stride,
            "activation": 0,
        }
        self._function(launch, [given[name] for name in kernel.arguments], x.device)
        return result if kernel.tokens else result.copy_(y.narrow(1, 0, tokens).t())

    @property
    def source(self) -> str:
        """See `Product.source`."""
        return next(iter(sources_of(self._kernel).values()))
