"""What convolutions add and scale with: computed once where it is constant, and seen when it changes."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from test_convolutions import BLOCK, Bottleneck, compile_model, forced, prepared, same
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from sparsecomp.backend import compilations

MAPS = (1, 32, 14, 14)


def terms_in_code(model: nn.Module, options: dict[str, Any], *inputs: Tensor) -> bool:
    """Whether the compiled code gives terms to its convolutions; the output is checked."""
    with torch.no_grad():
        given, (code,) = run_and_get_code(compile_model(model, options=options), *inputs)
        same(given, model(*inputs))
    calls = [line.split(", ")[1] for line in code.splitlines() if "sparsecomp_calls.conv(" in line]
    assert calls
    return any(terms != "None" for terms in calls)


def test_constant_ones_are_not_computed_in_the_graph() -> None:
    model = prepared(Bottleneck())
    assert not terms_in_code(model, BLOCK, torch.randn(MAPS))
    assert len(compilations()[-1].rewritten) == 4


class Computed(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.conv = how, nn.Conv2d(32, 32, 1)
        self.register_buffer("other", torch.ones(32))

    def forward(self, x: Tensor) -> Tensor:
        bias = self.conv.bias
        if self.how == "computed":
            bias = bias * 2
        elif self.how == "changed":
            self.other.mul_(1.5)
            bias = self.other
        return nn.functional.conv2d(x, self.conv.weight, bias)


@pytest.mark.parametrize("how", ["held", "computed", "changed"])
def test_those_that_the_graph_computes_or_changes_are_given_at_each_call(how: str) -> None:
    model, x = prepared(Computed(how)), torch.randn(MAPS)
    compiled = compile_model(model, options=forced("conv"))
    with torch.no_grad():
        for _ in range(3):
            other = model.other.clone()
            given = compiled(x)
            model.other.copy_(other)
            same(given, model(x))
    assert compilations()[-1].rewritten == ["conv"]
    model.other.fill_(1.0)
    torch._dynamo.reset()
    if how != "changed":
        assert terms_in_code(model, forced("conv"), x) == (how == "computed")


def test_inference_tensors_are_given_at_each_call() -> None:
    model, x = prepared(Bottleneck()), torch.randn(MAPS)
    with torch.inference_mode():
        model.norm1.running_mean = model.norm1.running_mean.clone()
    with torch.no_grad():
        compiled = compile_model(model, options=BLOCK)
        same(compiled(x), model(x))
        with torch.inference_mode():
            model.norm1.running_mean.add_(1.0)
        same(compiled(x), model(x))
    assert len(compilations()[-1].rewritten) == 4


def test_changes_are_seen() -> None:
    """In place, of another storage, and of another tensor, whatever of them it is."""
    model, x = prepared(Bottleneck()), torch.randn(MAPS)
    compiled = compile_model(model, options=BLOCK)
    with torch.no_grad():
        same(compiled(x), model(x))
        for change in (
            lambda: model.norm1.running_var.mul_(2.0),
            lambda: setattr(model.down.bias, "data", torch.rand(32)),
            lambda: setattr(model.norm2, "bias", nn.Parameter(torch.rand(24))),
            lambda: model.load_state_dict({name: value * 1.1 for name, value in model.state_dict().items()}),
        ):
            before = compiled(x)
            change()
            same(compiled(x), model(x))
            assert not torch.equal(compiled(x), before)


def test_modules_that_share_code_have_their_own() -> None:
    """One after the other and at once in several threads, with one weight for all of them."""
    torch._dynamo.reset()
    x, models = torch.randn(MAPS), [prepared(Bottleneck()) for _ in range(3)]
    for number, model in enumerate(models):
        model.second.weight = models[0].second.weight
        with torch.no_grad():
            model.norm2.running_mean.fill_(0.25 * number)
            model.down.bias.fill_(float(number))
    compiled = [torch.compile(model, backend="sparse", options=BLOCK) for model in models]
    failed: list[BaseException] = []

    def work(own: int) -> None:
        try:
            with torch.no_grad():
                expected = models[own](x)
                for _ in range(50):
                    same(compiled[own](x), expected)
        except BaseException as error:  # noqa: BLE001 -- raised again below
            failed.append(error)

    for own in range(3):
        work(own)
    threads = [threading.Thread(target=work, args=(own,)) for own in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed[0]
