"""Block-wise reconstruction of the dense output."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn

from sparsecomp import Pattern, Reconstruction, sparsify_
from sparsecomp.pruning.calibration import Call
from sparsecomp.pruning.reconstruct import _Samples, reconstruct_block

QUICK = Reconstruction(steps=60, tokens=128, learning_rate=3e-3)


class Block(nn.Module):
    """A feed-forward block with a norm, and an argument that is not one for each input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 48)
        self.down = nn.Linear(48, 16)
        self.last = nn.Linear(16, 16)

    def forward(self, hidden: Tensor, table: Tensor | None = None) -> tuple[Tensor]:
        inner = self.norm(hidden if table is None else hidden + table)
        return (hidden + self.last(self.down(torch.relu(self.up(inner)))),)


def pruned(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module, dict[nn.Parameter, Tensor]]:
    """The dense block, the block with two of its weights pruned, and their masks."""
    torch.manual_seed(0)
    dense = Block().to(dtype).eval()
    block = copy.deepcopy(dense)
    masks = {}
    for layer in (block.up, block.down):
        masks[layer.weight] = Pattern.parse("2:4").mask(layer.weight.abs())
        layer.weight.data.masked_fill_(~masks[layer.weight], 0)
    return dense, block, masks


def data(dense: nn.Module, sizes: Sequence[int] = (8, 8, 5), seed: int = 1) -> tuple[list[Call], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(dense.parameters()).dtype
    inputs = [torch.randn(size, 12, 16, generator=generator).to(dtype) for size in sizes]
    table = torch.randn(1, 12, 16, generator=generator).to(dtype)
    calls = [Call((value,), {"table": table}) for value in inputs]
    with torch.no_grad():
        return calls, [call.run(dense)[0] for call in calls]


def error(block: nn.Module, calls: Sequence[Call], targets: Sequence[Tensor], first: int = 0) -> float:
    """Squared error of all tokens from one on."""
    with torch.no_grad():
        differences = [call.run(block)[0] - target for call, target in zip(calls, targets, strict=True)]
    return sum(float(difference[:, first:].square().sum()) for difference in differences)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_falls_on_other_inputs_too_and_zeros_stay(dtype: torch.dtype) -> None:
    dense, block, masks = pruned(dtype)
    others = data(dense, seed=2)
    start = error(block, *others)
    before, after = reconstruct_block(block, masks, *data(dense), settings=QUICK)
    assert after < 0.7 * before
    assert error(block, *others) < 0.8 * start
    for weight, mask in masks.items():
        assert not weight[~mask].any()


def test_vectors_are_tuned_and_weights_that_were_not_pruned_are_not() -> None:
    dense, block, masks = pruned()
    reconstruct_block(block, masks, *data(dense), settings=QUICK)
    assert torch.equal(block.last.weight, dense.last.weight)
    assert not torch.equal(block.last.bias, dense.last.bias)
    assert not torch.equal(block.norm.weight, dense.norm.weight)


def test_gradients_and_their_requirement_stay_as_they_were() -> None:
    dense, block, masks = pruned()
    block.up.requires_grad_(False)
    block.down.weight.grad = torch.ones_like(block.down.weight)
    with torch.no_grad():
        reconstruct_block(block, masks, *data(dense), settings=QUICK)
    assert [p.requires_grad for p in block.up.parameters()] == [False, False]
    assert block.down.weight.requires_grad
    assert torch.equal(block.down.weight.grad, torch.ones_like(block.down.weight))
    assert block.up.weight.grad is None


def test_the_same_calls_give_the_same_block() -> None:
    results = []
    for seed in (3, 4):
        dense, block, masks = pruned()
        calls, targets = data(dense)
        torch.manual_seed(seed)
        reconstruct_block(block, masks, calls, targets, settings=QUICK)
        results.append(block.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name])


def test_a_block_that_cannot_get_better_is_left_as_it_was() -> None:
    dense, _, _ = pruned()
    block = copy.deepcopy(dense)
    masks = {block.up.weight: torch.ones_like(block.up.weight, dtype=torch.bool)}
    assert reconstruct_block(block, masks, *data(dense), settings=QUICK) == (0.0, 0.0)
    assert all(torch.equal(value, dense.state_dict()[name]) for name, value in block.state_dict().items())


def test_a_rate_that_is_too_high_leaves_the_block_as_it_was() -> None:
    dense, block, masks = pruned()
    start = copy.deepcopy(block.state_dict())
    before, after = reconstruct_block(block, masks, *data(dense), settings=Reconstruction(20, 128, 1e6))
    assert before == after
    assert all(torch.equal(value, start[name]) for name, value in block.state_dict().items())


def test_a_token_of_huge_activations_does_not_outweigh_the_others() -> None:
    dense, block, masks = pruned()
    calls, targets = data(dense)
    with torch.no_grad():
        for call in calls:
            call.args[0][:, 0] *= 1e3
        targets = [call.run(dense)[0] for call in calls]
    start = error(block, calls, targets, first=1)
    reconstruct_block(block, masks, calls, targets, settings=QUICK)
    assert error(block, calls, targets, first=1) < 0.8 * start


def test_a_step_sees_about_as_many_tokens_as_asked_for_and_a_round_every_input_once() -> None:
    dense, _, _ = pruned()
    calls, targets = data(dense, sizes=(8, 8, 5))
    samples = _Samples(dense, calls, targets, tokens=36)
    seen = torch.zeros(3, 8)
    stream = samples.batches()
    while seen.sum() < 21:
        tokens = 0
        for (index, rows), (call, target) in zip(batch := next(stream), samples.take(batch), strict=True):
            assert rows is not None
            seen[index, rows] += 1
            torch.testing.assert_close(call.run(dense)[0], target)
            tokens += 12 * len(rows)
        assert 12 <= tokens <= 36
    assert torch.equal(seen, torch.tensor([[1.0] * 8, [1.0] * 8, [1.0] * 5 + [0.0] * 3]))


class Mixing(nn.Module):
    """Its outputs depend on the other inputs of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden - hidden.mean(0))


def test_a_batch_whose_inputs_depend_on_each_other_is_not_cut() -> None:
    block = Mixing()
    calls = [Call((torch.randn(6, 4, 16),), {}) for _ in range(3)]
    samples = _Samples(block, calls, [call.run(block) for call in calls], tokens=8)
    assert [rows for batch, _ in zip(samples.batches(), range(6), strict=False) for _, rows in batch] == [None] * 6


def test_inference_mode_is_an_error() -> None:
    dense, block, masks = pruned()
    calls, targets = data(dense)
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        reconstruct_block(block, masks, calls, targets, settings=QUICK)


@pytest.mark.parametrize(
    "arguments", [{"steps": 0}, {"steps": 1.5}, {"tokens": -1}, {"learning_rate": 0.0}, {"learning_rate": float("nan")}]
)
def test_bad_settings_are_an_error(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}="):
        Reconstruction(**arguments)


def test_a_pruned_model_comes_closer_to_the_dense_one() -> None:
    dense = models.bert(layers=3, width=32, heads=2, vocab_size=200)
    for parameter in dense.parameters():
        parameter.data.mul_(4 if parameter.dim() == 2 else 1)  # of random weights a block does little else
    calibration = [models.token_ids(8, 16, seed=seed) % 200 for seed in range(8)]
    inputs = models.token_ids(16, 16, seed=9) % 200
    errors = []
    for settings in (False, Reconstruction(steps=60, tokens=256, learning_rate=3e-3)):
        model = copy.deepcopy(dense)
        sparsify_(
            model,
            "2:4",
            criterion="wanda",
            calibration=calibration,
            reconstruct=settings,
            filter_fn=models.is_encoder_linear,
        )
        linears = [module for name, module in model.named_modules() if models.is_encoder_linear(module, name)]
        assert all(Pattern.parse("2:4").check(module.weight) for module in linears)
        with torch.no_grad():
            errors.append(nn.functional.mse_loss(model(inputs)[0], dense(inputs)[0]))
    assert errors[1] < 0.8 * errors[0]
