"""How Inductor's code calls the ops."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
from test_convolutions import compile_model, forced, prepared, same
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from sparsecomp.backend import compilations
from sparsecomp.targets.base import Candidate


class Linear(nn.Module):
    """A linear whose bias and residual may be left out."""

    def __init__(self, bias: bool, residual: bool) -> None:
        super().__init__()
        self.linear, self.residual = nn.Linear(64, 64, bias=bias), residual

    def forward(self, x: Tensor) -> Tensor:
        value = self.linear(x)
        return value + x if self.residual else value


def forced_linear() -> dict[str, Any]:
    options = forced("linear")
    for site in options["plan"]:
        object.__setattr__(site, "chosen", Candidate("rows", "unstructured"))
    return options


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_a_linear_is_a_function_with_an_output_of_inductors(bias: bool, residual: bool) -> None:
    model, x = prepared(Linear(bias, residual)), torch.randn(2, 24, 64)
    with torch.no_grad():
        given, (code,) = run_and_get_code(compile_model(model, options=forced_linear()), x)
        same(given, model(x))
    (call,) = re.findall(r"sparsecomp_calls\.linear\((.*)\)", code)
    _, second, third, _, out = call.split(", ")
    assert (second != "None", third != "None") == (bias, residual)
    assert out.startswith("out=buf")
    assert "torch.ops.sparsecomp.linear.default(" not in code


def test_sizes_may_change() -> None:
    model = prepared(Linear(True, True))
    compiled = compile_model(model, options=forced_linear(), dynamic=True)
    with torch.no_grad():
        for batch, tokens in ((2, 24), (3, 7), (1, 130)):
            x = torch.randn(batch, tokens, 64)
            same(compiled(x), model(x))
    assert compilations()[-1].rewritten == ["linear"]


def test_inputs_that_do_not_lie_row_by_row_are_copied() -> None:
    model, x = prepared(Linear(True, False)), torch.randn(24, 64, 2).permute(2, 0, 1)
    with torch.no_grad():
        given = compile_model(model, options=forced_linear())(x)
        assert (given - model(x)).abs().max() <= 1e-4 * given.abs().max()


def test_other_types_than_float32_are_converted() -> None:
    model, x = prepared(Linear(True, True)).bfloat16(), torch.randn(2, 24, 64).bfloat16()
    with torch.no_grad():
        same(compile_model(model, options=forced_linear())(x), model(x), 3e-2)
    assert compilations()[-1].rewritten == ["linear"]


def test_code_in_cpp_calls_the_op() -> None:
    model, x = prepared(Linear(True, True)), torch.randn(2, 24, 64)
    with torch.no_grad(), inductor_config.patch(cpp_wrapper=True):
        given, codes = run_and_get_code(compile_model(model, options=forced_linear()), x)
        same(given, model(x))
    assert "sparsecomp_calls" not in "".join(codes)
    assert compilations()[-1].rewritten == ["linear"]
