"""Max pooling of maps that lie channels first: the op, and the graphs that it is put into."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import needs_x86
from torch import Tensor, nn
from torch.nn import functional

import sparsecomp
from sparsecomp.runtime.pool import MAX_POOL
from sparsecomp.targets.x86.cpu import LEVELS, supported
from sparsecomp.window import Window, form_of

pytestmark = needs_x86


def pooled(x: Tensor, window: Window, target: str = "x86") -> Tensor:
    result: Tensor = MAX_POOL(x, target, form_of(window, x.shape[1]))
    return result


@settings(deadline=None, max_examples=60)
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    size=st.tuples(st.integers(4, 40), st.integers(4, 40)),
    images=st.integers(1, 2),
    seed=st.integers(0, 1000),
    level=st.sampled_from([name for name in LEVELS if supported(name)]),
)
def test_it_gives_what_torch_gives(
    kernel: tuple[int, int], stride: tuple[int, int], size: tuple[int, int], images: int, seed: int, level: str
) -> None:
    x = torch.randn(images, 3, *size, generator=torch.Generator().manual_seed(seed)) - 3
    padding = (kernel[0] // 2, kernel[1] // 2)
    window = Window(kernel, stride, padding, groups=3)
    assert torch.equal(pooled(x, window, f"x86:{level}"), functional.max_pool2d(x, kernel, stride, padding))


def test_it_passes_on_what_is_no_number() -> None:
    x = torch.randn(1, 2, 9, 20, generator=torch.Generator().manual_seed(0))
    x[0, 1, 4, 7], x[0, 0, 2, 3], x[0, 0, 0, 0] = float("nan"), float("inf"), float("-inf")
    expected = functional.max_pool2d(x, 3, 2, 1)
    assert expected.isnan().any()
    torch.testing.assert_close(
        pooled(x, Window((3, 3), (2, 2), (1, 1), groups=2)), expected, rtol=0, atol=0, equal_nan=True
    )


class Network(nn.Module):
    def __init__(self, activation: nn.Module, before: nn.Module, pool: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 64, 3, padding=1)
        self.activation, self.before, self.pool = activation, before, pool
        self.last = nn.Conv2d(64, 64, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.before(self.activation(self.conv(x))))
        result: Tensor = self.last(x)
        return result


def calls_of_op(model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> int:
    """Compile a model, compare it with itself, and count the calls of our op in its graph."""
    from sparsecomp import backend

    counts: list[int] = []
    original = backend.use_pools

    def counting(*args: object) -> int:
        counts.append(original(*args))  # type: ignore[arg-type]
        return counts[-1]

    monkeypatch.setattr(backend, "use_pools", counting)
    sparsecomp.sparsify_(model, "unstructured@0.9")
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="sparse")(x), model(x), rtol=1e-4, atol=1e-4)
    return sum(counts)


@pytest.mark.parametrize(
    ("activation", "before", "pool", "found"),
    [
        (nn.ReLU(), nn.Identity(), nn.MaxPool2d(3, 2, 1), 1),
        (nn.Identity(), nn.Identity(), nn.MaxPool2d(2), 1),
        (nn.ReLU(), nn.ZeroPad2d((0, 1, 0, 1)), nn.MaxPool2d(3, 2), 1),
        (nn.Identity(), nn.ZeroPad2d((0, 1, 0, 1)), nn.MaxPool2d(3, 2), 0),  # a zero may be the largest
        (nn.ReLU(), nn.ConstantPad2d((0, 1, 0, 1), 1.0), nn.MaxPool2d(3, 2), 0),
        (nn.ReLU(), nn.Identity(), nn.MaxPool2d(3, 2, ceil_mode=True), 0),
        (nn.ReLU(), nn.Identity(), nn.MaxPool2d(2, 3), 0),  # columns three apart
        (nn.ReLU(), nn.Identity(), nn.AvgPool2d(2), 0),
    ],
)
def test_it_takes_the_place_of_poolings_that_read_a_sparse_convolution(
    activation: nn.Module, before: nn.Module, pool: nn.Module, found: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = Network(activation, before, pool).eval()
    assert calls_of_op(model, torch.randn(1, 16, 40, 40), monkeypatch) == found
