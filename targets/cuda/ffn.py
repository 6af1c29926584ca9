"""An FFN of one token on a card that reads only what belongs to the hidden units above their thresholds."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from sparsecomp.cuda.compiled import functions_of
from sparsecomp.cuda.library import FFN, UNITS
from sparsecomp.cuda.rows import pack_ffn
from sparsecomp.kernels.epilogue import ACTIVATIONS
from sparsecomp.targets.skip import DeviceSkipKernel, SkipRows, SkipSpec


class CudaRows(SkipRows):
    """A weight ``[units, width]`` on a card; one whose rows lie side by side is used as it is."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix.detach().contiguous()
        self.nbytes = 0 if self.matrix.data_ptr() == matrix.data_ptr() else _nbytes(self.matrix)


class FfnThreshold(DeviceSkipKernel):
    """The two kernels of ``kernels/ffn_threshold.cu``, one behind the other, for one token.

    Args:
        spec: of kind `units`.
        rows: of gate and up, where there is one, with a row for each unit, and of down with a row for each unit.
        arch: of the card, such as `sm_90`.

    Raises:
        ValueError: the spec or the types are not for these kernels, or none is compiled for the architecture.
        ModuleNotFoundError: NVRTC is not installed.
    """

    def __init__(self, spec: SkipSpec, rows: Sequence[CudaRows], arch: str) -> None:
        gate, *up, down = (own.matrix for own in rows)
        ffn = next((kernel for kernel in FFN if kernel.dtype == gate.dtype), None)
        if ffn is None or spec.kind != "units" or not spec.is_ffn or len(up) != spec.gated:
            raise ValueError(f"there is no kernel for an FFN of {gate.dtype} that skips {spec.kind}")
        packed = pack_ffn(gate, up[0] if up else None, down.t())
        inputs, hidden, outputs = spec.sizes
        self._ffn, self._spec = ffn, spec
        self._launches = ffn.launch_hidden(hidden, inputs), ffn.launch_down(outputs)
        self._functions = functions_of(ffn, arch)
        self._given: dict[str, Tensor | int | None] = {
            "up": None,
            **packed,
            "threshold": spec.thresholds[0].to(device=gate.device, dtype=torch.float32).contiguous(),
            "activation": ACTIVATIONS.index(spec.activation),
            "hidden": hidden,
            "inputs": inputs,
            "stride": packed["gate"].shape[1],
            "outputs": outputs,
        }
        held = {own.matrix.data_ptr() for own in rows}
        self.nbytes = sum(_nbytes(value) for value in packed.values() if value.data_ptr() not in held)
        self._last: list[Tensor] = []
        self.counted = functools.partial(_counted, self._last, hidden)

    def run(self, x: Tensor, biases: Sequence[Tensor | None]) -> Tensor:
        """See `DeviceSkipKernel.run`."""
        hidden, outputs = self._spec.sizes[1:]
        first, second, last = (None if bias is None else bias.detach().float() for bias in biases)
        if self._spec.fused and first is not None:
            halves = first.split(hidden)
            first, second = halves if self._spec.fused == "gate" else halves[::-1]
        blocks = self._launches[0].grid[0]
        counts = torch.empty(blocks, dtype=torch.int32, device=x.device)
        y = x.new_empty(1, outputs)
        given: dict[str, Tensor | int | None] = {
            **self._given,
            "x": x,
            "gate_bias": first,
            "up_bias": second,
            "bias": last,
            "places": torch.empty(blocks * UNITS, dtype=torch.int32, device=x.device),
            "hidden_values": torch.empty(blocks * UNITS, dtype=torch.float32, device=x.device),
            "counts": counts,
            "y": y,
        }
        names = self._ffn.hidden_arguments, self._ffn.down_arguments
        for function, launch, own in zip(self._functions, self._launches, names, strict=True):
            function(launch, [given[name] for name in own], x.device)
        self._last[:] = [counts]
        return y


def _counted(last: list[Tensor], hidden: int) -> tuple[int, int]:
    """Units that stayed in the last call, and all of them."""
    return (int(last[0].sum()), hidden) if last else (0, 0)


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
