"""What follows the sums of a linear or a convolution while they are still in registers: bias, activation, residual.

Arithmetic is float32 multiply-adds and at most one division, so that every target vectorises it: no call to a math
library.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sparsecomp.kernels import tir
from sparsecomp.kernels.tir import Expr

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu", "relu6", "hardswish", "relu2")

# The normal distribution function as 1/2 + z P(t), with z = x clipped to [-5, 5] and t = 2 z^2 / 25 - 1. P is the
# minimax polynomial of degree 12, by iteratively reweighted least squares on Chebyshev nodes; in t, not in z^2, so that
# float32 keeps its digits. |error| <= 2.9e-7, half of which is the clipped tail.
_NORMAL_BOUND = 5.0
_NORMAL = (
    0.14136378760112084,
    -0.07029628068238025,
    0.05152052294904673,
    -0.040442605936206535,
    0.03144216424721941,
    -0.023268661867350153,
    0.016402211954111713,
    -0.011164315753963427,
    0.006410432351074273,
    -0.0026856011538480126,
    0.0017228738940810882,
    -0.0016132547187359264,
    0.0006087007785747678,
)


@dataclass(frozen=True)
class Epilogue:
    """``activation(sum + bias) [+ residual]``, or with `residual_first` ``activation(sum + bias + residual)``."""

    activation: str = "none"
    residual: bool = False
    residual_first: bool = False

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {self.activation!r}: expected one of {', '.join(ACTIVATIONS)}")

    def apply(self, args: tir.Arguments, total: Expr, bias: Expr, at: Expr, lanes: int) -> Expr:
        """The value to store at ``y[at : at + lanes]`` for the sums ``total``."""
        value = total + bias
        if self.residual and self.residual_first:
            value = value + tir.load(args["residual"], at, lanes)
        value = activate(self.activation, tir.bind(value), lanes)
        if self.residual and not self.residual_first:
            value = value + tir.load(args["residual"], at, lanes)
        return value

    def reference(
        self, total: npt.NDArray[np.float32], bias: npt.NDArray[np.float32], residual: npt.NDArray[np.float32] | None
    ) -> npt.NDArray[np.float32]:
        """The same in NumPy, in float64 inside."""
        if self.residual and residual is None:
            raise ValueError("this epilogue adds a residual, and none was given")
        value = total.astype(np.float64) + bias
        if residual is not None and self.residual and self.residual_first:
            value = value + residual
        value = activate_reference(self.activation, value)
        if residual is not None and self.residual and not self.residual_first:
            value = value + residual
        return value.astype(np.float32)


def activate(activation: str, v: Expr, lanes: int) -> Expr:
    """``activation`` of a vector of ``lanes`` float32."""

    def c(value: float) -> Expr:
        return tir.const(value, lanes=lanes)

    if activation == "none":
        return v
    if activation == "relu":
        # Written so that NaN stays NaN, as torch.relu keeps it.
        return tir.select(v < c(0.0), c(0.0), v)
    if activation == "relu2":
        # So et al., arXiv:2109.08668, section 4.
        return tir.select(v < c(0.0), c(0.0), v * v)
    if activation == "relu6":
        # As above: a comparison with NaN is false, so that it passes.
        return tir.select(v < c(0.0), c(0.0), tir.select(v > c(6.0), c(6.0), v))
    if activation == "hardswish":
        # Howard et al., arXiv:1905.02244, section 5.2.
        return v * (tir.minimum(tir.maximum(v + c(3.0), c(0.0)), c(6.0)) * c(1 / 6))
    if activation == "silu":
        return v / (c(1.0) + _exp(c(0.0) - v, lanes))
    if activation == "gelu_tanh":
        inner = tir.bind(c(math.sqrt(2 / math.pi)) * v * (c(1.0) + c(0.044715) * v * v))
        # 0.5 (1 + tanh(z)) = 1 / (1 + exp(-2 z))
        return v / (c(1.0) + _exp(c(-2.0) * inner, lanes))
    if activation == "gelu":
        # x times the normal distribution function (Hendrycks and Gimpel, arXiv:1606.08415, section 2).
        z = tir.bind(tir.minimum(tir.maximum(v, c(-_NORMAL_BOUND)), c(_NORMAL_BOUND)))
        t = tir.bind(z * z * c(2 / _NORMAL_BOUND**2) - c(1.0))
        series = c(_NORMAL[-1])
        for coefficient in reversed(_NORMAL[:-1]):
            series = series * t + c(coefficient)
        return v * (z * series + c(0.5))
    raise ValueError(f"unknown activation {activation!r}")


def _exp(v: Expr, lanes: int) -> Expr:
    """Exp as 2^n times the Taylor polynomial of 2^f on |f| <= 1/2 (degree 6: relative error below 2e-7)."""
    scaled = tir.bind(v * tir.const(math.log2(math.e), lanes=lanes))
    # Bounds of the exponent of a normal float32; NaN passes through the polynomial.
    scaled = tir.bind(tir.minimum(tir.maximum(scaled, tir.const(-126.0, lanes=lanes)), tir.const(126.0, lanes=lanes)))
    suffix = f"x{lanes}" if lanes > 1 else ""
    # Truncation of a positive number is its floor: no rounding instruction is needed.
    n = tir.bind(tir.cast(f"int32{suffix}", scaled + tir.const(126.5, lanes=lanes)) - tir.const(126, "int32", lanes))
    f = tir.bind(scaled - tir.cast(f"float32{suffix}", n))
    series = tir.const(math.log(2) ** 6 / math.factorial(6), lanes=lanes)
    for k in range(5, -1, -1):
        series = series * f + tir.const(math.log(2) ** k / math.factorial(k), lanes=lanes)
    power = tir.reinterpret(f"float32{suffix}", (n + tir.const(127, "int32", lanes)) << tir.const(23, "int32", lanes))
    return series * power


def activate_reference(activation: str, v: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The activation in float64, from its definition."""
    if activation == "none":
        return v
    if activation == "relu":
        return np.maximum(v, 0.0)
    if activation == "relu2":
        return np.square(np.maximum(v, 0.0))
    if activation == "relu6":
        return np.clip(v, 0.0, 6.0)
    if activation == "hardswish":
        return v * np.clip(v + 3.0, 0.0, 6.0) / 6.0
    if activation == "silu":
        return v / (1.0 + np.exp(-v))
    if activation == "gelu_tanh":
        return 0.5 * v * (1.0 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))
    if activation == "gelu":
        return 0.5 * v * (1.0 + np.vectorize(math.erf)(v / math.sqrt(2)))
    raise ValueError(f"unknown activation {activation!r}")
