"""Convolutions through `torch.compile`: what is folded in, what changes between calls, what stays dense and why."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from kernel_cases import needs_x86
from models import efficientnet_lite0
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.nn import functional

import sparsecomp
from sparsecomp.backend import compilations
from sparsecomp.planner import Plan
from sparsecomp.targets.base import Candidate, Problem
from sparsecomp.targets.x86.cpu import best_level
from sparsecomp.targets.x86.target import X86Target

pytestmark = needs_x86


def compile_model(model: nn.Module, options: dict[str, Any] | None = None, dynamic: bool | None = None) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="sparse", options=options or {}, dynamic=dynamic)


def same(given: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    assert given.dtype == expected.dtype
    assert given.stride() == expected.stride()
    assert (given - expected).abs().max() <= tolerance * expected.abs().max()


class Bottleneck(nn.Module):
    """As in ResNet: the residual comes before the last activation."""

    def __init__(self, channels: int = 32, stride: int = 1) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(channels, 24, 1, bias=False), nn.BatchNorm2d(24)
        self.second, self.norm2 = nn.Conv2d(24, 24, 3, stride, 1, bias=False), nn.BatchNorm2d(24)
        self.third, self.norm3 = nn.Conv2d(24, channels, 1, bias=False), nn.BatchNorm2d(channels)
        self.down = nn.Conv2d(channels, channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norm1(self.first(x)))
        y = functional.relu(self.norm2(self.second(y)))
        return functional.relu(self.norm3(self.third(y)) + self.down(x))


def prepared(model: nn.Module, sparsity: float = 0.8) -> nn.Module:
    """In evaluation mode, with statistics that are not those of a fresh model, and pruned."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    sparsecomp.sparsify_(model, f"unstructured@{sparsity}")
    return model.eval()


def forced(*names: str) -> dict[str, Any]:
    """Options under which these sites run the sparse kernel, whatever it is predicted to cost."""
    sites = [
        {"name": name, "out_features": 0, "in_features": 0, "chosen": {"kernel": "conv", "pattern": "unstructured"}}
        | {"tokens": 0}
        for name in names
    ]
    text = {"format": "sparsecomp-plan", "version": Plan("x86").version, "target": "x86", "sites": sites}
    return {"plan": Plan.from_json(json.dumps(text))}


BLOCK = forced("first", "second", "third", "down")


@pytest.mark.parametrize("stride", [1, 2])
def test_a_block_of_resnet_is_four_sites(stride: int) -> None:
    model, x = prepared(Bottleneck(stride=stride)), torch.randn(2, 32, 14, 14)
    with torch.no_grad():
        same(compile_model(model, options=BLOCK)(x), model(x))
    last = compilations()[-1]
    assert sorted(last.rewritten) == ["down", "first", "second", "third"]
    # Of the two convolutions that are added the later one takes the other as its residual, and the activation.
    found = {site.name: (site.activation, site.residual) for site in last.plan}
    assert found == {
        "first": ("relu", False),
        "second": ("relu", False),
        "third": ("none", False),
        "down": ("relu", True),
    }


@pytest.mark.parametrize("text", ["taps:3:9", "8:taps:3:9", "16:1:4", "2:4"])
def test_shared_taps_and_rows_run_under_their_names(text: str) -> None:
    model, x = nn.Sequential(nn.Conv2d(32, 48, 3, padding=1), nn.ReLU()), torch.randn(1, 32, 20, 20)
    sparsecomp.sparsify_(model, text)
    (choice,) = sparsecomp.explain(model, x, options={"patterns": [text]})
    assert f"conv[{text}]" in {str(item.candidate) for item in choice.predictions}
    with torch.no_grad():
        same(compile_model(model, options=forced("0"))(x), model(x))
    assert compilations()[-1].rewritten == ["0"]


def test_batch_and_size_may_change() -> None:
    model = prepared(Bottleneck())
    compiled = compile_model(model, options=BLOCK, dynamic=True)
    with torch.no_grad():
        for images, height, width in ((1, 14, 14), (3, 14, 14), (2, 9, 20), (1, 5, 5)):
            x = torch.randn(images, 32, height, width)
            same(compiled(x), model(x))


def test_changes_of_weights_and_statistics_are_seen() -> None:
    model, x = prepared(Bottleneck()), torch.randn(1, 32, 14, 14)
    compiled = compile_model(model, options=BLOCK)
    with torch.no_grad():
        compiled(x)
        model.second.weight.mul_(torch.rand_like(model.second.weight) < 0.5)
        model.norm2.running_mean.add_(0.3)
        model.norm3.weight.mul_(1.5)
        same(compiled(x), model(x))


def test_bfloat16_is_computed_in_float32() -> None:
    model, x = prepared(Bottleneck()).bfloat16(), torch.randn(1, 32, 14, 14).bfloat16()
    with torch.no_grad():
        same(compile_model(model, options=BLOCK)(x), model(x), 3e-2)


def test_verify_accepts_convolutions() -> None:
    model, x = prepared(Bottleneck()), torch.randn(1, 32, 14, 14)
    with torch.no_grad():
        compile_model(model, options={**BLOCK, "verify": True})(x)
    assert len(compilations()[-1].rewritten) == 4


@pytest.mark.parametrize("activation", [nn.ReLU6, nn.Hardswish, nn.SiLU, nn.GELU])
def test_activations_are_folded_in(activation: type[nn.Module]) -> None:
    model = prepared(nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), activation()))
    x = 3 * torch.randn(1, 16, 12, 12)
    with torch.no_grad():
        same(compile_model(model, options=forced("0"))(x), model(x))
    (site,) = compilations()[-1].plan
    assert (
        site.activation
        == {"ReLU6": "relu6", "Hardswish": "hardswish", "SiLU": "silu", "GELU": "gelu"}[activation.__name__]
    )


def test_one_dimension_and_padding_of_one_side() -> None:
    model = prepared(nn.Sequential(nn.ConstantPad1d((1, 2), 0.0), nn.Conv1d(8, 16, 4, stride=2)))
    x = torch.randn(2, 8, 31)
    with torch.no_grad():
        same(compile_model(model, options=forced("1"))(x), model(x))
    assert compilations()[-1].rewritten == ["1"]


def reasons(model: nn.Module, *inputs: Tensor) -> dict[str, str]:
    with torch.no_grad():
        return {choice.name: choice.reason for choice in sparsecomp.explain(model.eval(), *inputs)}


@pytest.mark.parametrize(
    ("layer", "shape", "reason"),
    [
        (nn.ConvTranspose2d(4, 4, 3), (1, 4, 5, 5), "a transposed convolution (conv_transpose2d)"),
        (nn.Conv3d(4, 4, 3), (1, 4, 5, 5, 5), "a three-dimensional convolution"),
        (nn.Conv2d(4, 4, 3, dtype=torch.float64), (1, 4, 5, 5), "its weight is float64"),
        (nn.Conv2d(4, 4, 3, dtype=torch.complex64), (1, 4, 5, 5), "a complex convolution"),
        (nn.Conv2d(4, 4, 4, padding="same"), (1, 4, 5, 5), "pads a kernel of 4 x 4 unevenly"),
        (nn.Conv2d(4, 4, 3), (4, 5, 5), "without a batch dimension"),
        (nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last), (1, 4, 5, 5), "laid out channels last"),
        (nn.Conv2d(4, 4, 3, groups=4), (1, 4, 5, 5), "it is a depthwise convolution"),
        (nn.Conv2d(4, 4, 3), (1, 4, 5, 5), "the weight has no zeros"),
    ],
)
def test_what_stays_dense_says_why(layer: nn.Module, shape: tuple[int, ...], reason: str) -> None:
    x = torch.randn(shape, dtype=next(layer.parameters()).dtype)
    (given,) = reasons(nn.Sequential(layer), x).values()
    assert given.startswith("dense: ")
    assert reason in given


def test_depthwise_convolutions_follow_sparse_ones() -> None:
    layers = [nn.Conv2d(32, 96, 1), nn.ReLU6(), nn.Conv2d(96, 96, 3, 1, 1, groups=96), nn.ReLU6(), nn.Conv2d(96, 32, 1)]
    model, x = prepared(nn.Sequential(*layers), 0.9), torch.randn(1, 32, 56, 56)
    with torch.no_grad():
        same(compile_model(model, options={**forced("0", "4")})(x), model(x))
    chosen = {choice.name: str(choice.chosen) for choice in compilations()[-1].plan}
    assert chosen["2"] in ("depthwise[dense]", "dense")
    assert model[2].weight.count_nonzero() == model[2].weight.numel()


@pytest.mark.slow
def test_efficientnet_lite0_is_dense_with_zeros() -> None:
    model = efficientnet_lite0()
    sparsecomp.sparsify_(
        model,
        "unstructured@0.8",
        filter_fn=lambda module, _: isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1),
    )
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, given = model(x), compile_model(model)(x)
    assert (given - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert len(compilations()[-1].rewritten) >= 32


class Dear(X86Target):
    """Convolutions take 100 us dense and 60 sparse, a conversion of layout what is said."""

    def __init__(self, us: float) -> None:
        super().__init__(best_level())
        self._us = us

    def predict(self, candidate: Candidate, problem: Problem) -> float:
        return 100.0 if candidate.is_dense else 60.0

    def layout_us(self, values: int, threads: int) -> float:
        return self._us


@pytest.mark.parametrize(("us", "sparse"), [(15.0, True), (25.0, False)])
def test_conversions_of_layout_count_and_are_shown(us: float, sparse: bool) -> None:
    model = nn.Sequential(*(nn.Conv2d(16, 16, 3, padding=1) for _ in range(3)), nn.Flatten())
    sparsecomp.sparsify_(model, "unstructured@0.9", filter_fn=lambda _, name: name == "1")
    x = torch.randn(1, 16, 25, 25)
    _, middle, _ = sparsecomp.explain(model, x, options={"target": Dear(us)})
    assert middle.chosen.is_dense != sparse
    if sparse:
        assert "its input of 0.04 MB changes to channels first (15 us)" in middle.reason
        assert "its output of 0.04 MB changes to channels last (15 us)" in middle.reason
    else:
        assert middle.reason.startswith("dense: beside dense convolutions, whose maps are channels last, conv[")
    # What a plan asks for is done.
    _, middle, _ = sparsecomp.explain(model, x, options={"target": Dear(us), **forced("1")})
    assert not middle.chosen.is_dense


class DearDepthwise(Dear):
    """And a depthwise convolution takes 120 us channels first."""

    def predict(self, candidate: Candidate, problem: Problem) -> float:
        return 120.0 if candidate.kernel == "depthwise" else super().predict(candidate, problem)


@pytest.mark.parametrize(("us", "first"), [(5.0, False), (15.0, True)])
def test_a_kernel_slower_than_dense_is_taken_where_it_saves_conversions(us: float, first: bool) -> None:
    layers = [nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 16, 1), nn.Flatten()]
    model = prepared(nn.Sequential(*layers), 0.9)
    x, options = torch.randn(1, 16, 25, 25), {"target": DearDepthwise(us)}
    _, middle, _ = sparsecomp.explain(model, x, options=options)
    assert str(middle.chosen) == ("depthwise[dense]" if first else "dense")
    if first:
        assert "120 us against dense 100 us, which would need its maps in another layout" in middle.reason
    with torch.no_grad():
        same(compile_model(model, options=options)(x), model(x))
    assert ("1" in compilations()[-1].rewritten) == first


def test_layouts_change_only_beside_dense_convolutions() -> None:
    """One conversion on either side of a dense convolution, fused with the activation and the pooling there."""
    layers = [nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1), nn.MaxPool2d(2), nn.Conv2d(16, 16, 3, padding=1)]
    model = nn.Sequential(*layers, nn.Hardswish(), nn.Conv2d(16, 16, 1)).eval()
    sparsecomp.sparsify_(model, "unstructured@0.9", filter_fn=lambda _, name: name != "3")
    x = torch.randn(1, 16, 28, 28)
    with torch.no_grad():
        given, (code,) = run_and_get_code(compile_model(model, options=forced("0", "1", "5")), x)
        same(given, model(x))
    calls = [line for line in code.splitlines() if "sparsecomp_calls.conv(" in line]
    assert len(calls) == 3
    last = [
        line.partition("=")[0].strip()
        for line in code.splitlines()
        if "empty_strided_cpu((1, 16, 14, 14), (3136, 1," in line
    ]
    assert len(last) == 1  # the pooled maps, for the dense convolution
    assert not [line for line in code.splitlines() if "empty_strided_cpu((1, 16, 28, 28), (12544, 1," in line]
