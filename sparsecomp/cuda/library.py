"""Every kernel that there is for NVIDIA cards: what it takes, how a weight is packed for it, how it is launched."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsecomp.cuda import panels, rows

NAMES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.int8: "int8"}
MATRIX = ("x", "bias", "y", "outputs", "inputs", "tokens", "stride", "activation")
FEW = ("x", "bias", "y", "outputs", "inputs", "tokens", "activation")
TILE = 64
"""Tokens of a block, in all kernels for many tokens."""
UNITS = 32
"""Hidden units of a block of ``ffn_hidden``."""
MAX_SHARED = 99 * 1024
"""Bytes of shared memory that a block may have on every architecture (sm_86 and sm_89 have the least: CUDA C++
Programming Guide, table of the compute capabilities)."""


@dataclass(frozen=True)
class Launch:
    """The geometry of a launch.

    Attributes:
        grid: blocks in x, y and z.
        block: threads in x, y and z.
        shared: bytes of dynamic shared memory; above 48 KiB a function must be allowed them first
            (``CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES``).
    """

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int = 0


@dataclass(frozen=True)
class CudaKernel:
    """A kernel for a linear: ``y = act(x W^T + bias)``.

    Where `tokens` is 0, x is feature-major ``[inputs, stride]`` and y ``[outputs, stride]``, with the stride of
    `stride`; columns of x from ``tokens`` on may hold anything, those of y come out unspecified. Otherwise x is
    ``[tokens, inputs]`` and y ``[tokens, outputs]``. bias is float32 ``[outputs]`` or null, activation an index of
    `sparsecomp.kernels.epilogue.ACTIVATIONS`, and all other numbers are int32. Where x is int8, y and bias are int32,
    and there is no activation.

    Attributes:
        name: of the kernel with its type and sizes, such as ``panel_sparse_v32_f16``.
        family: ``panel_sparse`` (2 of 4 among columns that a panel chooses; takes any weight), ``panel`` (the rows of
            a panel share their columns), ``block``, ``rows`` (any weight), ``rows_token`` (any weight, few tokens),
            ``two_four`` (2:4, few tokens).
        source: file among the kernels, without ``.cu``.
        entry: name of the function in it.
        defines: for `sparsecomp.cuda.nvrtc.compile_kernel`.
        dtype: of the weight and x, and of y but for int8.
        rows: of a panel or block; 1 where rows are read on their own.
        tokens: most tokens of a launch; 0 where any number is taken.
        arguments: of the function, in order: the packed tensors by their names, then `MATRIX` or `FEW`.
        pack: Packs a weight ``[outputs, inputs]`` on the CPU into the tensors by their names; raises a ValueError
            where the kernel does not take it.
        mma_sp: whether the code has sparse products of the tensor cores.
    """

    name: str
    family: str
    source: str
    entry: str
    defines: tuple[str, ...]
    dtype: torch.dtype
    rows: int
    tokens: int
    arguments: tuple[str, ...]
    pack: Callable[[Tensor], dict[str, Tensor]]
    mma_sp: bool = False

    def launch(self, outputs: int, inputs: int, tokens: int) -> Launch:
        """The geometry for ``tokens`` rows of x.

        Raises:
            ValueError: There are no tokens or more than the kernel takes, or x does not fit into shared memory.
        """
        if tokens < 1 or (self.tokens and tokens > self.tokens):
            most = f"1 to {self.tokens}" if self.tokens else "at least 1"
            raise ValueError(f"kernel {self.name} takes {most} tokens, given {tokens}")
        if not self.tokens:
            rows, threads = (8, 256) if self.family == "rows" else (self.rows, 128)
            if self.source == "panel_int8" and rows == 16:
                threads = 64
            return Launch((-(-outputs // rows), -(-tokens // TILE), 1), (threads, 1, 1))
        padded = -(-inputs // 16) * 16 if self.family == "two_four" else inputs // 8 * 8 + 8
        return Launch(
            (-(-outputs // 32), 1, 1), (256, 1, 1), _fits(self.name, self.tokens * padded * self.dtype.itemsize)
        )

    def stride(self, tokens: int) -> int:
        """Entries from a row of a feature-major x or y to the next: rows begin at multiples of 16 bytes."""
        multiple = 16 if self.dtype == torch.int8 else 8
        return -(-tokens // multiple) * multiple


@dataclass(frozen=True)
class CudaFfn:
    """The two kernels of an FFN of one token that skips hidden units below a threshold; `rows.pack_ffn` packs for it.

    A unit survives where ``|g| > threshold`` with ``g = act(gate x + gate_bias)``; its value is ``g (up x + up_bias)``,
    or ``g`` where up is null. Of up and down only the survivors' rows and columns are read. Biases may be null;
    biases, threshold ``[hidden]`` and ``hidden_values`` are float32, and ``places`` and ``counts`` int32. ``places``
    and ``hidden_values`` have `UNITS` entries for each of the blocks of `hidden`, ``counts`` one: scratch, written by
    the first kernel and read by the second.
    """

    name: str
    defines: tuple[str, ...]
    dtype: torch.dtype
    source: str = "ffn_threshold"
    hidden_entry: str = "ffn_hidden"
    hidden_arguments: tuple[str, ...] = (
        *("gate", "up", "gate_bias", "up_bias", "threshold", "x", "places", "hidden_values", "counts"),
        *("hidden", "inputs", "stride", "activation"),
    )
    down_entry: str = "ffn_down"
    down_arguments: tuple[str, ...] = ("down", "bias", "places", "hidden_values", "counts", "y", "hidden", "outputs")

    def launch_hidden(self, hidden: int, inputs: int) -> Launch:
        """The geometry of the first kernel; raises a ValueError where x does not fit into shared memory."""
        stride = -(-inputs // 128) * 128
        return Launch((-(-hidden // UNITS), 1, 1), (256, 1, 1), _fits(self.name, stride * self.dtype.itemsize))

    def launch_down(self, outputs: int) -> Launch:
        """The geometry of the second kernel."""
        return Launch((-(-outputs // 32), 1, 1), (1024, 1, 1))


def _fits(name: str, shared: int) -> int:
    if shared > MAX_SHARED - 1024:  # what the kernels have of their own is below 1 KiB
        raise ValueError(f"kernel {name} would need {shared} bytes of shared memory for x; a block has {MAX_SHARED}")
    return shared


def _panels() -> list[CudaKernel]:
    made = []
    arguments = ("weights", "columns", "starts", *MATRIX)
    for dtype in panels.TENSOR:
        source = "panel_int8" if dtype == torch.int8 else "panel_tensor"
        for v in (16, 32, 64):
            for family, sparse, run in (("panel_sparse", 1, 1), ("panel", 0, 1), ("block", 0, v)):
                pack = (
                    functools.partial(panels.pack_sparse_panels, rows=v)
                    if sparse
                    else functools.partial(panels.pack_panels, rows=v, run=run)
                )
                defines: tuple[str, ...] = (NAMES[dtype].upper(), f"V={v}", f"SPARSE={sparse}", f"RUN={run}")
                name = f"{family}_v{v}_{NAMES[dtype]}"
                made.append(
                    CudaKernel(
                        *(name, family, source, source, defines, dtype, v, 0, arguments, pack), mma_sp=bool(sparse)
                    )
                )
    for v in (16, 32, 64):
        pack = functools.partial(panels.pack_panels, rows=v)
        defines = ("F32", f"V={v}")
        made.append(
            CudaKernel(
                f"panel_v{v}_f32", "panel", "panel_fma", "panel_fma", defines, torch.float32, v, 0, arguments, pack
            )
        )
    return made


def _rows() -> list[CudaKernel]:
    made = []
    for dtype, name in NAMES.items():
        arguments: tuple[str, ...] = ("values", "columns", "starts", *MATRIX)
        made.append(
            CudaKernel(f"rows_{name}", "rows", "rows", "rows", (name.upper(),), dtype, 1, 0, arguments, rows.pack_rows)
        )
        for tokens in (1, 4):
            defines = (name.upper(), f"TOKENS={tokens}")
            arguments = ("values", "columns", "starts", *FEW)
            made.append(
                CudaKernel(
                    *(f"rows_token_t{tokens}_{name}", "rows_token", "rows_token", "rows_token", defines, dtype),
                    *(1, tokens, arguments, rows.pack_token_rows),
                )
            )
            if dtype in rows.TWO_FOUR:
                made.append(
                    CudaKernel(
                        *(f"two_four_t{tokens}_{name}", "two_four", "two_four_token", "two_four_token", defines),
                        *(dtype, 1, tokens, ("values", "places", *FEW), rows.pack_two_four),
                    )
                )
    return made


KERNELS = (*_panels(), *_rows())
FFN = tuple(CudaFfn(f"ffn_threshold_{NAMES[dtype]}", (NAMES[dtype].upper(),), dtype) for dtype in rows.FLOATS)
