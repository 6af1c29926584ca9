"""Batch-norm statistics estimated again."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsecomp import sparsify_
from sparsecomp.pruning.batchnorm import FollowingNorms, reestimate_batchnorm


def network(seed: int = 0) -> nn.Module:
    """Two linears with batch norms and dropout between, whose statistics describe its own activations."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(16, 64),
        nn.BatchNorm1d(64),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(64, 64),
        nn.BatchNorm1d(64),
        nn.ReLU(),
    ).eval()
    reestimate_batchnorm(model, [torch.randn(512, 16)])
    return model


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_statistics_are_those_of_all_batches_together_whatever_their_sizes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    images = torch.randn(24, 3, 9, 9) * 3 + 100
    assert reestimate_batchnorm(model, images.split([16, 5, 3])) == ["1"]
    values = model[0](images).transpose(0, 1).flatten(1)
    torch.testing.assert_close(model[1].running_mean, values.mean(1))
    torch.testing.assert_close(model[1].running_var, values.var(1))


def test_it_repairs_a_trained_model_whose_weights_were_pruned() -> None:
    torch.manual_seed(0)
    centres = torch.randn(10, 16)
    labels = torch.randint(0, 10, (1024,))
    inputs = centres[labels] + 0.3 * torch.randn(1024, 16)
    layers: list[nn.Module] = []
    for width in (16, 64, 64, 64, 64):
        layers += [nn.Linear(width, 64), nn.BatchNorm1d(64), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for rows in torch.randperm(1024).split(128):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[rows]), labels[rows]).backward()
        optimizer.step()
    model.eval().requires_grad_(False)
    reestimate_batchnorm(model, [inputs])
    wanted = model(inputs).argmax(1)
    assert (wanted == labels).float().mean() > 0.9

    sparsify_(model, "unstructured@0.8")
    pruned = (model(inputs).argmax(1) == wanted).float().mean()
    assert reestimate_batchnorm(model, inputs.split(256)) == ["1", "4", "7", "10", "13"]
    assert (model(inputs).argmax(1) == wanted).float().mean() > pruned + 0.1


def test_modes_and_everything_but_the_statistics_stay() -> None:
    model = network().train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    before = snapshot(model)
    reestimate_batchnorm(model, [torch.randn(32, 16) + 1])
    assert [module.training for module in model.modules()] == modes
    assert all(norm.track_running_stats and norm.momentum == 0.1 for norm in (model[1], model[5]))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"1.running_mean", "1.running_var", "5.running_mean", "5.running_var"}
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_result_does_not_depend_on_dropout_or_on_the_statistics_before() -> None:
    first, second = network().train(), network()
    second[1].running_mean.add_(5)
    batches = [torch.randn(32, 16) for _ in range(3)]
    reestimate_batchnorm(first, batches)
    reestimate_batchnorm(second, batches)
    assert_same(first, snapshot(second))


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no batch"),
        ([torch.randn(8, 16), torch.full((8, 16), float("nan"))], "batch norm '1' meets values that are not finite"),
        ([torch.randn(8, 16), torch.randn(1, 16)], "batch norm '1' meets a single value per channel"),
    ],
)
def test_bad_batches_are_an_error_and_change_nothing(batches: list[torch.Tensor], message: str) -> None:
    model = network()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        reestimate_batchnorm(model, batches)
    assert_same(model, before)
    assert not any(module.training for module in model.modules())


def test_an_error_of_the_model_changes_nothing() -> None:
    model = network()
    before = snapshot(model)
    with pytest.raises(RuntimeError):
        reestimate_batchnorm(model, [torch.randn(8, 16), torch.randn(8, 7)])
    assert_same(model, before)
    assert model[1].track_running_stats


def test_a_batch_norm_that_is_not_reached_is_left_alone() -> None:
    model = network()
    model.spare = nn.BatchNorm1d(3)
    model.forward = lambda value: model[:7](value)
    assert reestimate_batchnorm(model, [torch.randn(8, 16)]) == ["1", "5"]


def test_statistics_that_follow_do_not_move_where_no_weight_does() -> None:
    model = network()
    before = snapshot(model)
    FollowingNorms(model, [torch.randn(8, 16) + 3]).move()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name])


@settings(max_examples=10)
@given(st.floats(0.25, 4), st.floats(-2, 2), st.integers(0, 100))
def test_statistics_that_follow_take_up_scales_and_shifts(scale: float, shift: float, seed: int) -> None:
    """Whatever the batches are: the output is that from before."""
    model, inputs = network(seed), torch.randn(64, 16)
    with torch.no_grad():
        expected = model(inputs)
        following = FollowingNorms(model, [torch.randn(8, 16) + 1])
        before = snapshot(model)
        model[0].weight.mul_(scale)
        model[0].bias.mul_(scale).add_(shift)
        with following.moved():
            torch.testing.assert_close(model(inputs), expected, rtol=1e-3, atol=1e-3)
        for index in (1, 5):
            torch.testing.assert_close(model[index].running_mean, before[f"{index}.running_mean"], rtol=0, atol=0)
            torch.testing.assert_close(model[index].running_var, before[f"{index}.running_var"], rtol=0, atol=0)


def test_models_without_stored_statistics_are_not_run() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.LayerNorm(4))
    assert reestimate_batchnorm(copy.deepcopy(model), [torch.randn(2, 7)]) == []
