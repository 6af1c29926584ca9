"""Bias, activation and residual: the generated code against the definitions."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import ACTIVATIONS, HERE, Array, Guarded, needs_x86

from sparsecomp.kernels import tir
from sparsecomp.kernels.epilogue import Epilogue, activate, activate_reference
from sparsecomp.runtime.launch import KernelSource, Launch, Weights, function_of

LANES = (1, 4, 8, 16)
# Where the functions bend, and far outside.
GRID = np.concatenate([np.linspace(-12, 12, 24001), np.linspace(-120, 120, 4001), np.array([0.0, 1e-30, -1e-30])])


def elementwise(activation: str, lanes: int) -> Any:
    builder = tir.KernelBuilder("activate", ())
    with builder.build() as args, tir.loop(args.end - args.begin) as step:
        at = tir.bind((args.begin + step) * lanes)
        tir.store(args["y"], at, activate(activation, tir.bind(tir.load(args["x"], at, lanes)), lanes), lanes)
    return builder.function


def compiled(activation: str, lanes: int, values: Array) -> Array:
    """The activation as generated code of that many lanes computes it."""
    count = -(-len(values) // lanes) * lanes
    padded = np.zeros(count, np.float32)
    padded[: len(values)] = values
    identity = f"{activation} {lanes} {inspect.getsource(elementwise)}"
    source = KernelSource("activate", identity, lambda: elementwise(activation, lanes), HERE)
    out = Guarded((count,))
    call = Launch(function_of(source), Weights([]), [0], count // lanes, 1, 0)
    call.run(torch.from_numpy(padded), torch.zeros(1), None, out.tensor)
    out.check()
    return out.tensor.numpy()[: len(values)]


@needs_x86
@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_generated_code_is_the_definition(activation: str, lanes: int) -> None:
    values = GRID.astype(np.float32)
    expected = activate_reference(activation, values.astype(np.float64))
    error = np.abs(compiled(activation, lanes, values) - expected)
    assert (error <= 1e-6 * np.maximum(1.0, np.maximum(np.abs(values), np.abs(expected)))).all()


@needs_x86
def test_gelu_is_that_of_the_error_function() -> None:
    values = np.linspace(-8, 8, 16001).astype(np.float32)
    expected = np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in values.tolist()])
    error = np.abs(compiled("gelu", 8, values) - expected)
    assert (error <= 1e-6 * np.maximum(1.0, np.maximum(np.abs(values), np.abs(expected)))).all()


@needs_x86
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_values_and_zeros(activation: str) -> None:
    values = np.array([1e4, 1e10, 3e38, np.inf, 0.0], np.float32)
    given = compiled(activation, 4, values)
    expected = np.minimum(values, 6) if activation == "relu6" else values
    if activation == "relu2":
        with np.errstate(over="ignore"):
            expected = values * values
    assert np.array_equal(given[[3, 4]], expected[[3, 4]])
    assert np.allclose(given, expected, rtol=1e-6)
    if activation != "none":
        below = compiled(activation, 4, np.array([-1e4, -1e10], np.float32))
        # The tail of a negative value is cut off in units of the value itself.
        assert (np.abs(below) <= 1e-6 * np.array([1e4, 1e10])).all()


@needs_x86
@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays_nan(activation: str, lanes: int) -> None:
    given = compiled(activation, lanes, np.array([1.0, np.nan, -1.0], np.float32))
    assert np.isnan(given).tolist() == [False, True, False]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_reference_is_torch(activation: str) -> None:
    values = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    functions = {
        "none": lambda v: v,
        "relu": torch.relu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda v: torch.nn.functional.gelu(v, approximate="tanh"),
        "silu": torch.nn.functional.silu,
        "relu6": torch.nn.functional.relu6,
        "hardswish": torch.nn.functional.hardswish,
        "relu2": lambda v: torch.relu(v).square(),
    }
    given = activate_reference(activation, values.numpy())
    assert np.allclose(given, functions[activation](values).numpy(), atol=1e-12)


def test_the_reference_adds_bias_before_and_residual_after() -> None:
    total, bias = np.array([[1.0, -3.0]], np.float32), np.array([-2.0, 4.0], np.float32)
    residual = np.array([[-5.0, 6.0]], np.float32)
    assert Epilogue("relu").reference(total, bias, residual).tolist() == [[0.0, 1.0]]
    given = Epilogue("relu", True).reference(total, bias, residual)
    assert given.tolist() == [[-5.0, 7.0]]
    assert given.dtype == np.float32
    with pytest.raises(ValueError, match="adds a residual, and none was given"):
        Epilogue("relu", True).reference(total, bias, None)


def test_an_unknown_activation_is_explained() -> None:
    with pytest.raises(
        ValueError, match="unknown activation 'tanh': expected one of none, relu, gelu, gelu_tanh, silu"
    ):
        Epilogue("tanh")
    with pytest.raises(ValueError, match="unknown activation 'tanh'"):
        activate_reference("tanh", np.zeros(1))
    with pytest.raises(ValueError, match="unknown activation 'tanh'"):
        activate("tanh", None, 4)
