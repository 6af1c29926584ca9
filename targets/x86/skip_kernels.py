"""Operations that skip on x86: which kernels run one after the other, on which weights."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsecomp.kernels import skip
from sparsecomp.kernels.epilogue import Epilogue
from sparsecomp.patterns.gathered import MaskWeight
from sparsecomp.runtime.launch import KernelSource, Weights, function_of
from sparsecomp.runtime.steps import At, Base, Operand, Step, StepSequence
from sparsecomp.targets.cpu.level import Level
from sparsecomp.targets.skip import SkipKernel, SkipRows, SkipSpec

_MAX_CALLS = 64
_ROWS_FEW = (2, 4)
"""Tokens up to which four rows are streamed at once; beyond, sums would not fit the registers."""
_WORD = 16
_BIASES = (Base.BIAS0, Base.BIAS1, Base.BIAS2)


class X86Rows(SkipRows):
    """Rows of float32, or packed values with a bit mask."""

    def __init__(self, matrix: Tensor, *, masked: bool) -> None:
        """Pack `[units, width]`; a contiguous float32 matrix that stays dense is used as it is and kept alive."""
        self.masked = masked
        self.shape = (matrix.shape[0], matrix.shape[1])
        if masked:
            packed = MaskWeight.pack(matrix)
            # The kernel looks at the mask behind the last one.
            masks = np.concatenate([packed.masks.ravel(), np.zeros(1, np.uint16)])
            ends = np.append(packed.ptr, np.int32(packed.values.size - _WORD))
            weights = Weights([packed.values, masks, ends])
            self.pointers: list[int | None] = list(weights.pointers)[:3]
            self.nbytes = weights.nbytes
            self._alive: Any = weights
        else:
            rows = matrix.detach().to(torch.float32).contiguous()
            self.pointers = [rows.data_ptr(), None, None]
            self.nbytes = 0 if rows.data_ptr() == matrix.data_ptr() else rows.numel() * rows.element_size()
            self._alive = rows


class X86SkipKernel(SkipKernel):
    """See `SkipKernel`; a sequence of steps for every number of tokens and threads."""

    def __init__(self, level: Level, spec: SkipSpec, rows: Sequence[X86Rows]) -> None:
        """Make it.

        Args:
            level: of instructions.
            spec: what to compute.
            rows: `units`: of gate and up with a row for each unit of their outputs, of down with a row for each of its
                inputs. `inputs`: of every linear with a row for each of its inputs.
        """
        self._level, self._spec, self._rows = level, spec, rows
        self.counters = np.zeros((1 if spec.kind == "units" else len(rows), skip.COUNTERS), np.int64)
        self._ignored = np.zeros(skip.COUNTERS, np.int64)
        self._zeros = torch.zeros(max(spec.sizes))
        self._thresholds = [threshold.detach().float().contiguous() for threshold in spec.thresholds]
        self._calls: dict[tuple[int, int, bool, tuple[bool, ...]], StepSequence] = {}

    def build(self, tokens: int, residual: bool) -> None:
        """See `SkipKernel.build`."""
        self._sequence(tokens, torch.get_num_threads(), residual, (True, True, True))

    def run(self, x: Tensor, biases: Sequence[Tensor | None], residual: Tensor | None, out: Tensor) -> None:
        """See `SkipKernel.run`."""
        given = (biases[0] is not None, biases[1] is not None, biases[2] is not None)
        key = (x.shape[0], torch.get_num_threads(), residual is not None, given)
        call = self._calls.get(key)
        if call is None:
            if len(self._calls) >= _MAX_CALLS:
                self._calls.clear()
            call = self._calls[key] = self._sequence(*key)
        call.run(x, out, biases, residual)

    def _sequence(self, tokens: int, threads: int, residual: bool, biases: tuple[bool, ...]) -> StepSequence:
        given = [At(base) if has else None for base, has in zip(_BIASES, biases, strict=True)]
        plan = _Plan(self._level, tokens, threads, self._spec, given)
        plan.zeros, plan.ignored = self._zeros.data_ptr(), self._ignored.ctypes.data
        counters = [row.ctypes.data for row in self.counters]
        thresholds = [threshold.data_ptr() for threshold in self._thresholds]
        if self._spec.kind == "units":
            plan.units(self._rows, thresholds[0], counters[0], residual)
        elif self._spec.is_ffn:
            plan.inputs(self._rows, thresholds, counters, residual)
        else:
            plan.linear(self._rows[0], thresholds[0], counters[0], residual)
        units = max(self._spec.sizes)
        scratch = skip.scratch_floats(units, tokens, _streams(tokens))
        return StepSequence(plan.steps, threads, plan.floats, scratch)


def _streams(tokens: int) -> int:
    return 4 if tokens <= _ROWS_FEW[1] else _ROWS_FEW[0]


class _Plan:
    """Writes the steps of one kind of call, and gives places in the workspace to what they hand on."""

    zeros: int
    ignored: int

    def __init__(self, level: Level, tokens: int, threads: int, spec: SkipSpec, biases: Sequence[At | None]) -> None:
        self.steps: list[Step] = []
        self.floats = 0
        self._level, self._tokens, self._parts = level, tokens, max(threads, 1)
        self._spec, self._biases = spec, biases

    def linear(self, rows: X86Rows, threshold: int, counters: int, residual: bool) -> None:
        """One linear that skips inputs."""
        parts = self._sum_rows(rows, At(Base.X), threshold, counters, waits=False)
        self._finish(parts, rows.shape[1], self._biases[0], residual)

    def units(self, rows: Sequence[X86Rows], threshold: int, counters: int, residual: bool) -> None:
        """An FFN that skips hidden units."""
        gate, down = rows[0], rows[-1]
        hidden = gate.shape[0]
        active = self._place(2 * self._tokens * hidden if self._spec.gated else self._tokens * hidden)
        gate_bias, up_bias = self._hidden_biases(hidden)
        schedule = self._schedule(gate)
        epilogue = Epilogue(self._spec.activation)
        dots = self._function("dots", (schedule, epilogue), lambda: skip.build_dots(schedule, epilogue))
        weights = [*gate.pointers, self.ignored]
        dims = [gate.shape[1], hidden, self._parts]
        self.steps.append(Step(dots, At(Base.X), gate_bias, None, active, weights, dims, hidden))
        values, limits, own = active, threshold, counters
        if self._spec.gated:
            up = rows[1]
            kept_schedule = self._schedule(up)
            kept = self._function("kept_dots", (kept_schedule,), lambda: skip.build_kept_dots(kept_schedule))
            weights = [*up.pointers, counters]
            self.steps.append(Step(kept, At(Base.X), up_bias, threshold, active, weights, dims, self._parts, True))
            values = At(Base.WORKSPACE, active.floats + self._tokens * hidden)
            limits, own = self.zeros, self.ignored
        parts = self._sum_rows(down, values, limits, own, waits=True)
        self._finish(parts, down.shape[1], self._biases[2], residual)

    def inputs(
        self, rows: Sequence[X86Rows], thresholds: Sequence[int], counters: Sequence[int], residual: bool
    ) -> None:
        """An FFN that skips inputs of its linears."""
        down, hidden = rows[-1], rows[-1].shape[0]
        firsts = [
            self._sum_rows(own, At(Base.X), threshold, counter, waits=False)
            for own, threshold, counter in zip(rows[:-1], thresholds[:-1], counters[:-1], strict=True)
        ]
        gate_bias, up_bias = self._hidden_biases(hidden)
        value = self._place(self._tokens * hidden)
        second = firsts[1] if self._spec.gated else None
        self._add_parts(firsts[0], second, (gate_bias, up_bias), hidden, Epilogue(self._spec.activation), None, value)
        parts = self._sum_rows(down, value, thresholds[-1], counters[-1], waits=True)
        self._finish(parts, down.shape[1], self._biases[2], residual)

    def _hidden_biases(self, hidden: int) -> tuple[Operand, Operand]:
        first, second = self._biases[0], self._biases[1]
        if self._spec.fused and first is not None:
            halves = (first, At(first.base, hidden))
            first, second = halves if self._spec.fused == "gate" else halves[::-1]
        return (first or self.zeros), (second or self.zeros)

    def _sum_rows(self, rows: X86Rows, values: At, threshold: int, counters: int, *, waits: bool) -> At:
        """The rows of what stays, summed by every part for itself; gives the place of the parts."""
        units, outputs = rows.shape
        schedule = self._schedule(rows)
        lanes = self._level.lanes
        parts = self._place(self._parts * self._tokens * skip.padded(outputs, lanes))
        function = self._function("rows", (schedule,), lambda: skip.build_rows(schedule))
        weights = [*rows.pointers, counters]
        dims = [outputs, units, self._parts]
        self.steps.append(Step(function, values, threshold, None, parts, weights, dims, self._parts, waits))
        return parts

    def _finish(self, parts: At, outputs: int, bias: Operand, residual: bool) -> None:
        activation = "none" if self._spec.is_ffn else self._spec.activation
        extra = At(Base.RESIDUAL) if residual else None
        biases = (bias or self.zeros, None)
        self._add_parts(parts, None, biases, outputs, Epilogue(activation, residual), extra, At(Base.Y))

    def _add_parts(
        self,
        first: At,
        second: At | None,
        biases: tuple[Operand, Operand],
        outputs: int,
        epilogue: Epilogue,
        residual: At | None,
        to: At,
    ) -> None:
        lanes, gated = self._level.lanes, second is not None
        function = self._function("sum", (lanes, epilogue, gated), lambda: skip.build_sum(lanes, epilogue, gated))
        dims = [self._tokens, outputs, self._parts]
        items = self._tokens * skip.padded(outputs, lanes) // lanes
        extra = second if second is not None else residual
        self.steps.append(Step(function, first, biases[0], extra, to, [biases[1]], dims, items, True))

    def _place(self, floats: int) -> At:
        at = At(Base.WORKSPACE, self.floats)
        self.floats += -(-floats // _WORD) * _WORD
        return at

    def _schedule(self, rows: X86Rows) -> skip.SkipSchedule:
        lanes = _WORD if rows.masked else self._level.lanes
        return skip.SkipSchedule(lanes, self._tokens, _streams(self._tokens), rows.masked)

    def _function(self, name: str, shape: tuple[Any, ...], build: Callable[[], Any]) -> ctypes.c_void_p:
        key = (self._level.name, name, shape)
        if key not in _functions:
            source = KernelSource(f"skip_{name}", repr(shape), build, self._level.tvm_target)
            _functions[key] = function_of(source)
        return _functions[key]


_functions: dict[tuple[Any, ...], ctypes.c_void_p] = {}
