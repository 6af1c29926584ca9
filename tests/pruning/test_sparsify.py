"""Pruning whole models in place."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune

from sparsecomp.patterns import Pattern
from sparsecomp.pruning import magnitude, sparsify_


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.LayerNorm(20), nn.Linear(20, 7))


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, torch.Tensor], versions: list[int]) -> bool:
    after = model.state_dict()
    same = all(torch.equal(torch.nan_to_num(after[name]), torch.nan_to_num(before[name])) for name in before)
    return same and [parameter._version for parameter in model.parameters()] == versions


@settings(max_examples=25)
@given(st.sampled_from(["unstructured@0.8", "unstructured@0.0", "2:4", "4:2:4", "32:1:8", "4x1@0.5", "4x4@0.9"]))
def test_the_linears_satisfy_the_pattern_and_nothing_else_changes(text: str) -> None:
    model = mlp()
    before = copy.deepcopy(model)
    pattern = Pattern.parse(text)
    assert sparsify_(model, text) == ["0", "3"]
    for index in (0, 3):
        assert pattern.check(model[index].weight)
        assert torch.equal(model[index].weight, pattern.project(before[index].weight))
        assert torch.equal(model[index].bias, before[index].bias)
        assert model[index].weight.requires_grad
    assert torch.equal(model[2].weight, before[2].weight)


def test_weights_change_in_place_and_their_versions_advance() -> None:
    model = mlp()
    weight = model[0].weight
    address, version = weight.data_ptr(), weight._version
    sparsify_(model, Pattern.parse("2:4"))
    assert model[0].weight is weight
    assert weight.data_ptr() == address
    assert weight._version > version
    assert weight.grad_fn is None


def test_the_filter_sees_the_linears_and_their_names() -> None:
    model = mlp()
    seen = []

    def last(module: nn.Module, name: str) -> bool:
        seen.append((type(module), name))
        return name == "3"

    assert sparsify_(model, "unstructured@0.5", filter_fn=last) == ["3"]
    assert seen == [(nn.Linear, "0"), (nn.Linear, "3")]
    assert (model[0].weight != 0).all()


def test_the_model_may_be_a_linear_or_hold_subclasses() -> None:
    linear = nn.Linear(8, 8, bias=False)
    assert sparsify_(linear, "2:4") == [""]
    layer = nn.TransformerEncoderLayer(16, 2, 32)
    assert sparsify_(layer, "2:4") == ["self_attn.out_proj", "linear1", "linear2"]


def test_shared_weights_are_pruned_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.Linear(16, 16), "c": nn.Linear(16, 16)})
    model["b"].weight = model["a"].weight
    model["c"] = model["a"]
    version = model["a"].weight._version
    expected = Pattern.parse("unstructured@0.5").project(model["a"].weight)
    assert sparsify_(model, "unstructured@0.5") == ["a", "b", "c"]
    assert torch.equal(model["b"].weight, expected)
    assert model["a"].weight._version == version + 1


def test_dense_drops_nothing() -> None:
    model = mlp()
    before, versions = state(model), [parameter._version for parameter in model.parameters()]
    assert sparsify_(model, "dense") == []
    assert unchanged(model, before, versions)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(dtype: torch.dtype) -> None:
    model = mlp().to(dtype)
    sparsify_(model, "2:4")
    assert model[0].weight.dtype == dtype
    assert Pattern.parse("2:4").check(model[0].weight)


def with_nan(model: nn.Sequential) -> None:
    with torch.no_grad():
        model[3].weight[0, 0] = math.nan


def with_parametrization(model: nn.Sequential) -> None:
    parametrizations.weight_norm(model[3])


def with_pruning_hook(model: nn.Sequential) -> None:
    prune.l1_unstructured(model[3], "weight", 0.5)


def with_expanded_weight(model: nn.Sequential) -> None:
    model[3].weight = nn.Parameter(torch.ones(1, 20).expand(7, 20))


def with_float8(model: nn.Sequential) -> None:
    model[3].weight = nn.Parameter(model[3].weight.to(torch.float8_e4m3fn), requires_grad=False)


def with_inference_weight(model: nn.Sequential) -> None:
    with torch.inference_mode():
        model[3].weight = nn.Parameter(torch.ones(7, 20), requires_grad=False)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (with_nan, "module '3' cannot be pruned to 2:4: the score holds NaN"),
        (with_parametrization, "module '3'.*computed from other tensors"),
        (with_pruning_hook, "module '3'.*computed from other tensors"),
        (with_expanded_weight, "module '3'.*clone it first"),
        (with_float8, "module '3'.*float8_e4m3fn"),
    ],
)
def test_one_bad_module_leaves_the_whole_model_alone(spoil, message: str) -> None:  # type: ignore[no-untyped-def]
    model = mlp()
    spoil(model)
    parameters = [parameter.detach().float().nan_to_num() for parameter in model.parameters()]
    versions = [parameter._version for parameter in model.parameters()]
    with pytest.raises(ValueError, match=message):
        sparsify_(model, "2:4")
    assert [parameter._version for parameter in model.parameters()] == versions
    for parameter, before in zip(model.parameters(), parameters, strict=True):
        assert torch.equal(parameter.detach().float().nan_to_num(), before)


def test_inference_tensors_need_inference_mode() -> None:
    model = mlp()
    with_inference_weight(model)
    before = model[0].weight.clone()
    with pytest.raises(ValueError, match=r"module '3'.*inference_mode"):
        sparsify_(model, "2:4")
    assert torch.equal(model[0].weight, before)
    with torch.inference_mode():
        sparsify_(model, "2:4")
    assert Pattern.parse("2:4").check(model[3].weight)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4, device="meta")), "meta device"),
        (lambda: nn.Sequential(nn.LazyLinear(4)), "not initialised"),
        (lambda: nn.Sequential(nn.ReLU()), r"Sequential has no module that can be pruned \(nn\.Linear\)"),
        (lambda: torch.ones(4, 4), "expected a torch.nn.Module, given Tensor"),
    ],
)
def test_models_without_anything_to_prune(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        sparsify_(make(), "2:4")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("unstructured", "such as 'unstructured@0.8'"),
        ("16x1", "such as '16x1@0.8'"),
        ("3", "is not known"),
        ("5:4", "N must be from 1"),
    ],
)
def test_patterns_that_do_not_say_what_to_prune(pattern: str, message: str) -> None:
    model = mlp()
    before, versions = state(model), [parameter._version for parameter in model.parameters()]
    with pytest.raises(ValueError, match=message):
        sparsify_(model, pattern)
    assert unchanged(model, before, versions)


def test_a_filter_that_rejects_everything_is_an_error() -> None:
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(5)])
    with pytest.raises(ValueError, match=r"filter_fn rejected every .*: '0', '1', '2' and 2 more"):
        sparsify_(model, "2:4", filter_fn=lambda module, name: False)


def test_gradients_and_copies_survive() -> None:
    model = mlp()
    model(torch.ones(2, 12)).sum().backward()
    gradient = model[0].weight.grad
    sparsify_(model, "unstructured@0.8")
    assert model[0].weight.grad is gradient
    assert torch.equal(copy.deepcopy(model)[0].weight, model[0].weight)


def test_magnitude_ranks_by_absolute_value() -> None:
    weight = torch.tensor([[-2.0, 1.0, -0.0]], requires_grad=True)
    score = magnitude(weight)
    assert score.tolist() == [[2, 1, 0]]
    assert not score.requires_grad
    assert magnitude(weight.detach().half()).dtype == torch.float32
    assert magnitude(weight.detach().double()).dtype == torch.float64
