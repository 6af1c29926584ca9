"""Several kernels one after the other on the same team of threads: what one operation of an FFN needs.

A step may read what the steps before it wrote; that goes through a workspace which belongs to the calling thread, so
that one sequence serves any number of callers at once.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from torch import Tensor

from sparsecomp.runtime.launch import native_library

_OPERANDS = 8
_FLOAT = 4


class Base(IntEnum):
    """What an operand is counted from; the order is that of `native.c`."""

    WORKSPACE = 0
    X = 1
    Y = 2
    BIAS0 = 3
    BIAS1 = 4
    BIAS2 = 5
    RESIDUAL = 6


@dataclass(frozen=True)
class At:
    """A place so many floats from a base."""

    base: Base
    floats: int = 0


Operand = At | int | None
"""A place that a call gives, a fixed address, or nothing."""


@dataclass(frozen=True)
class Step:
    """One kernel of a sequence.

    Attributes:
        function: its address.
        x, bias, residual, y: operands.
        weights: up to four operands.
        dims: sizes.
        items: work items, split evenly over the threads.
        waits: whether it reads what earlier steps wrote.
    """

    function: ctypes.c_void_p
    x: Operand
    bias: Operand
    residual: Operand
    y: Operand
    weights: Sequence[Operand]
    dims: Sequence[int]
    items: int
    waits: bool = False


class _Step(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_void_p),
        ("fixed", ctypes.c_void_p * _OPERANDS),
        ("offset", ctypes.c_int64 * _OPERANDS),
        ("base", ctypes.c_int32 * _OPERANDS),
        ("dims", ctypes.POINTER(ctypes.c_int32)),
        ("items", ctypes.c_int32),
        ("waits", ctypes.c_int32),
    ]


@functools.cache
def _runner() -> Any:
    function: Any = native_library().sparsecomp_run
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    function.argtypes = [pointer, number, number, ctypes.c_int64, ctypes.c_int64] + [pointer] * 6
    function.restype = number
    return function


class StepSequence:
    """Steps with everything made ready that does not change from call to call."""

    def __init__(self, steps: Sequence[Step], threads: int, workspace_floats: int, scratch_floats: int) -> None:
        """Make it.

        Args:
            steps: in order. What their fixed addresses point to, the caller keeps alive.
            threads: at most this many.
            workspace_floats: that the steps share.
            scratch_floats: of one thread.
        """
        self._runner = _runner()
        self._dims = [(ctypes.c_int32 * len(step.dims))(*step.dims) for step in steps]
        self._steps = (_Step * len(steps))(*map(_native, steps, self._dims))
        self._numbers = (len(steps), threads, _FLOAT * max(workspace_floats, 1), _FLOAT * max(scratch_floats, 1))

    def run(self, x: Tensor, out: Tensor, biases: Sequence[Tensor | None], residual: Tensor | None) -> None:
        """Run the steps; all tensors are contiguous, float32 and on the CPU.

        Args:
            x: base `X`.
            out: base `Y`, written.
            biases: the three bases `BIAS0` to `BIAS2`.
            residual: base `RESIDUAL`.

        Raises:
            MemoryError: memory between the steps could not be allocated.
        """
        first, second, third = biases
        failed = self._runner(
            self._steps,
            *self._numbers,
            x.data_ptr(),
            out.data_ptr(),
            None if first is None else first.data_ptr(),
            None if second is None else second.data_ptr(),
            None if third is None else third.data_ptr(),
            None if residual is None else residual.data_ptr(),
        )
        if failed:
            raise MemoryError(f"no memory for {self._numbers[2]} bytes, and {self._numbers[3]} per thread")


def _native(step: Step, dims: ctypes.Array[ctypes.c_int32]) -> _Step:
    native = _Step()
    native.kernel = step.function
    weights = [*step.weights, None, None, None, None][:4]
    for place, operand in enumerate((step.x, step.bias, step.residual, step.y, *weights)):
        native.base[place] = -1
        if isinstance(operand, At):
            native.base[place], native.offset[place] = operand.base, _FLOAT * operand.floats
        else:
            native.fixed[place] = operand
    native.dims = ctypes.cast(dims, ctypes.POINTER(ctypes.c_int32))
    native.items, native.waits = step.items, step.waits
    return native
