"""Masks that survive training."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks

from sparsecomp import freeze_masks, sparsify_


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8))


def pruned() -> nn.Module:
    model = network()
    sparsify_(model, "2:4")
    return model


def zeros(model: nn.Module) -> list[Tensor]:
    return [module.weight == 0 for module in model if isinstance(module, nn.Linear)]


def train(model: Callable[[Tensor], Tensor], step: Callable[[], Any], clear: Callable[[], Any], steps: int = 4) -> None:
    inputs, targets = torch.randn(64, 16), torch.randn(64, 8)
    for _ in range(steps):
        clear()
        nn.functional.mse_loss(model(inputs), targets).backward()
        step()


OPTIMIZERS = {
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, foreach=False),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_entries_stay_zero_and_the_others_train(name: str) -> None:
    model = pruned()
    before, start = zeros(model), copy.deepcopy(model.state_dict())
    optimizer = OPTIMIZERS[name](model.parameters())
    with freeze_masks(model):
        train(model, optimizer.step, optimizer.zero_grad)
    for drop, module, key in zip(before, (model[0], model[2]), ("0.weight", "2.weight"), strict=True):
        assert not module.weight[drop].any()
        assert not module.weight.grad[drop].any()
        assert (module.weight != start[key])[~drop].float().mean() > 0.95
    assert not torch.equal(model[0].bias, start["0.bias"])


def test_momentum_from_before_the_pruning_does_not_move_them() -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    train(model, optimizer.step, optimizer.zero_grad)
    sparsify_(model, "2:4")
    before = zeros(model)
    free = copy.deepcopy((model, optimizer.state_dict()))
    with freeze_masks(model):
        train(model, optimizer.step, optimizer.zero_grad)
    assert all(not module.weight[drop].any() for drop, module in zip(before, (model[0], model[2]), strict=True))

    # Without the masks the same steps move them: the test above is not passed by an optimiser that does nothing.
    moving = torch.optim.Adam(free[0].parameters())
    moving.load_state_dict(free[1])
    train(free[0], moving.step, moving.zero_grad)
    assert free[0][0].weight[before[0]].any()


def test_a_loop_without_an_optimiser_keeps_them() -> None:
    model = pruned()
    before = zeros(model)

    def step() -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad

    with freeze_masks(model):
        train(model, step, model.zero_grad)
    assert all(torch.equal(drop, now) for drop, now in zip(before, zeros(model), strict=True))


def test_a_compiled_model_and_a_compiled_step_train_with_them() -> None:
    model = pruned()
    before = zeros(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with freeze_masks(model):
        train(torch.compile(model, backend="aot_eager"), optimizer.step, optimizer.zero_grad)
        train(model, torch.compile(optimizer.step, backend="aot_eager"), optimizer.zero_grad)
    assert all(torch.equal(drop, now) for drop, now in zip(before, zeros(model), strict=True))


def test_the_state_dict_and_the_modules_are_not_touched() -> None:
    model = pruned()
    before = copy.deepcopy(model.state_dict())
    handle = freeze_masks(model)
    assert handle.names == ["0", "2"]
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    handle.remove()


def test_removed_masks_let_the_entries_train() -> None:
    model = pruned()
    before = zeros(model)
    hooks = len(_global_optimizer_post_hooks)
    handle = freeze_masks(model)
    handle.remove()
    handle.remove()
    assert len(_global_optimizer_post_hooks) == hooks
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer.step, optimizer.zero_grad)
    assert model[0].weight[before[0]].all()


def test_weights_that_do_not_train_yet_are_kept_when_they_do() -> None:
    model = pruned().requires_grad_(False)
    before = zeros(model)
    with freeze_masks(model):
        model.requires_grad_(True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        train(model, optimizer.step, optimizer.zero_grad)
    assert all(torch.equal(drop, now) for drop, now in zip(before, zeros(model), strict=True))


def test_a_frozen_model_is_freed_though_its_handle_is_lost() -> None:
    model = pruned()
    freeze_masks(model)
    weight = weakref.ref(model[0].weight)
    del model
    gc.collect()
    assert weight() is None


def test_dense_weights_and_adapters_that_begin_at_zero_are_left_free() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 8), nn.Linear(8, 8))
    sparsify_(model, "2:4", filter_fn=lambda _, name: name == "1")
    nn.init.zeros_(model[2].weight)
    handle = freeze_masks(model)
    assert handle.names == ["1"]
    handle.remove()


def test_a_model_without_zeros_is_an_error() -> None:
    with pytest.raises(ValueError, match="no weight of the model holds zeros"):
        freeze_masks(network())
