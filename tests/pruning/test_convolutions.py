"""Criteria on convolutions: they prune as a linear on the patches would be pruned, and keep more than magnitude."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsecomp.patterns import Pattern
from sparsecomp.pruning import Reconstruction, sparsify_

CALIBRATED = [("wanda", None), ("ria", None), ("sparsegpt", None), ("magnitude", "dsnot"), ("sparsegpt", "dsnot")]


def images(number: int, channels: int = 4, seed: int = 0) -> Tensor:
    """Smooth maps whose channels differ in size, as real ones do."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(number, channels, 12, 12, generator=generator)
    smooth = functional.avg_pool2d(noise, 3, 1, 1) + 0.2 * noise
    return smooth * torch.linspace(0.2, 3.0, channels)[:, None, None] + 0.1


@pytest.mark.parametrize("text", ["unstructured@0.5", "2:4", "4:2:4", "4x1@0.5", "taps:4:9", "4:taps:4:9"])
@pytest.mark.parametrize(("criterion", "refine"), CALIBRATED)
def test_a_convolution_is_a_linear_on_its_patches(text: str, criterion: str, refine: Any) -> None:
    conv, x = nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False), images(6)
    patches = functional.unfold(x, 3, stride=2, padding=1).transpose(1, 2)
    linear = nn.Linear(36, 8, bias=False)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.flatten(1))
    options: dict[str, Any] = {"criterion": criterion, "refine": refine}
    sparsify_(conv, text, calibration=[x], **options)
    if "taps" not in text:
        sparsify_(linear, text, calibration=[patches], **options)
        torch.testing.assert_close(conv.weight.flatten(1), linear.weight, rtol=1e-3, atol=1e-4)
    assert Pattern.parse(text).check(conv.weight.flatten(1))
    assert conv.weight.count_nonzero() > 0


@pytest.mark.parametrize("text", ["unstructured@0.6", "2:4", "8:taps:4:9"])
def test_calibrated_criteria_lose_less_than_magnitude(text: str) -> None:
    def lost(**options: Any) -> float:
        torch.manual_seed(1)
        conv = nn.Conv2d(8, 32, 3, padding=1, groups=2)
        dense = conv(images(8, 8, seed=1))
        sparsify_(conv, text, **options)
        return float((conv(images(8, 8, seed=1)) - dense).square().mean())

    with torch.no_grad():
        calibration = {"calibration": [images(8, 8)]}
        plain = lost()
        wanda, sparsegpt = (lost(criterion=name, **calibration) for name in ("wanda", "sparsegpt"))
    # Of neighbouring taps, which see nearly the same, four next to each other differ too little for Wanda to choose.
    assert wanda < (1.05 if text == "2:4" else 1) * plain
    assert sparsegpt < 0.8 * wanda


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(channels, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(functional.relu(self.norm(self.first(x))))


def test_blocks_of_convolutions_are_reconstructed() -> None:
    model = nn.Sequential(*(Residual(8) for _ in range(3))).eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    batches, held = list(images(32, 8).split(8)), images(8, 8, seed=5)
    with torch.no_grad():
        dense = model(held)

    def lost(**options: Any) -> float:
        model.load_state_dict(state)
        assert len(sparsify_(model, "unstructured@0.6", criterion="wanda", calibration=batches, **options)) == 6
        assert all(
            conv.weight.count_nonzero() <= 0.41 * conv.weight.numel()
            for conv in model.modules()
            if isinstance(conv, nn.Conv2d)
        )
        with torch.no_grad():
            return float((model(held) - dense).square().mean())

    plain = lost()
    assert lost(reconstruct=Reconstruction(steps=60, learning_rate=2e-3)) < 0.5 * plain


def test_kernel_patterns_are_for_kernels_of_their_taps() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(9, 9))
    before = model[0].weight.clone()
    with pytest.raises(ValueError, match=r"'4:taps:4:9' is for convolutions whose kernels have 9 taps; module '1' has"):
        sparsify_(model, "4:taps:4:9")
    assert torch.equal(model[0].weight, before)
    with pytest.raises(ValueError, match=r"module '2' has a weight of shape \[9, 9\]"):
        sparsify_(model, "taps:4:9", filter_fn=lambda module, _: isinstance(module, nn.Linear))
    assert sparsify_(model, "taps:4:9", filter_fn=lambda _, name: name == "0") == ["0"]
    kept = model[0].weight.ne(0)
    assert (kept == kept[:, :1]).all()
    assert (kept[:, 0].flatten(1).sum(1) == 4).all()
