"""The main job on real kernels and real weights: what a user compiles gives the eager model's numbers."""

from __future__ import annotations

import copy
from typing import Any

import models
import pytest
import torch
from torch import nn

import sparsecomp
from sparsecomp.backend import compilations
from sparsecomp.targets import get_target

TOLERANCE = 1e-4


def mlp(width: int = 256) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)).eval()


def difference(given: torch.Tensor, expected: torch.Tensor) -> float:
    return float((given - expected).detach().abs().max() / expected.detach().abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["unstructured@0.8", "2:4", "32:2:4", "16x1@0.75"])
def test_minilm_keeps_its_numbers(pattern: str) -> None:
    model, tokenizer = models.minilm()
    sparsecomp.sparsify_(model, pattern, filter_fn=models.is_encoder_linear)
    compiled = torch.compile(model, backend="sparse", dynamic=True)
    with torch.no_grad():
        # Two batches of different length and size through one compiled model.
        for sentences in (list(models.SENTENCES), list(models.SENTENCES[:3])):
            batch = tokenizer(sentences, padding=True, return_tensors="pt")
            expected = model(**batch).last_hidden_state
            assert difference(compiled(**batch).last_hidden_state, expected) <= TOLERANCE


@pytest.mark.slow
def test_minilm_runs_its_encoder_sparse() -> None:
    model, tokenizer = models.minilm()
    sparsecomp.sparsify_(model, "unstructured@0.9", filter_fn=models.is_encoder_linear)
    batch = tokenizer(list(models.SENTENCES), padding=True, return_tensors="pt")
    with torch.no_grad():
        torch.compile(model, backend="sparse")(**batch)
    last = compilations()[-1]
    assert len(last.rewritten) == 36
    assert last.packed_bytes < last.dense_bytes / 4
    activations = {choice.activation for choice in last.plan if "intermediate" in choice.name}
    assert activations == {"gelu"}


class TestModelsOfOneClass:
    """Dynamo keeps one graph for all modules of a class; the choice must still fit each of them."""

    def test_a_pruned_copy_of_a_compiled_dense_model_runs_sparse(self) -> None:
        dense, x = mlp(), torch.randn(64, 256)
        with torch.no_grad():
            torch.compile(dense, backend="sparse")(x)
            before = len(compilations())
            assert not compilations()[-1].rewritten
            pruned = copy.deepcopy(dense)
            sparsecomp.sparsify_(pruned, "unstructured@0.95")
            compiled = torch.compile(pruned, backend="sparse")
            assert difference(compiled(x), pruned(x)) <= TOLERANCE
        assert len(compilations()) == before + 1
        assert len(compilations()[-1].rewritten) == 2

    def test_dense_layers_of_a_class_share_their_graph(self) -> None:
        x = torch.randn(8, 256)
        with torch.no_grad():
            before = len(compilations())
            for _ in range(12):
                model = mlp()
                compiled = torch.compile(model, backend="sparse")
                assert difference(compiled(x), model(x)) <= TOLERANCE
        assert len(compilations()) == before + 1

    def test_pruned_after_compiling(self) -> None:
        model, x = mlp(), torch.randn(64, 256)
        compiled = torch.compile(model, backend="sparse")
        with torch.no_grad():
            compiled(x)
            sparsecomp.sparsify_(model, "unstructured@0.95")
            assert difference(compiled(x), model(x)) <= TOLERANCE
        assert len(compilations()[-1].rewritten) == 2


def test_layers_that_share_a_weight_share_its_packed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)).eval()
    model[2].weight = model[0].weight  # type: ignore[union-attr]
    sparsecomp.sparsify_(model, "unstructured@0.95")
    target: Any = type(get_target())
    packed = []
    original = target.prepare

    def prepare(self: Any, candidate: Any, weight: torch.Tensor) -> Any:
        packed.append(candidate)
        return original(self, candidate, weight)

    monkeypatch.setattr(target, "prepare", prepare)
    x = torch.randn(64, 256)
    with torch.no_grad():
        compiled = torch.compile(model, backend="sparse")
        assert difference(compiled(x), model(x)) <= TOLERANCE
    assert len(compilations()[-1].rewritten) == 2
    assert len(packed) == 1


@pytest.mark.parametrize("level", ["x86:avx2", "x86:generic"])
@pytest.mark.parametrize("tokens", [1, 3, 70])
def test_every_level_that_this_cpu_runs(level: str, tokens: int) -> None:
    try:
        get_target(level)
    except ValueError as error:
        pytest.skip(str(error))
    model, x = mlp(), torch.randn(tokens, 256)
    sparsecomp.sparsify_(model, "unstructured@0.9")
    compiled = torch.compile(model, backend="sparse", options={"target": level, "verify": True})
    with torch.no_grad():
        assert difference(compiled(x), model(x)) <= TOLERANCE
    assert not any("verify" in choice.reason for choice in compilations()[-1].plan)


def test_bfloat16() -> None:
    model, x = mlp().bfloat16(), torch.randn(64, 256).bfloat16()
    sparsecomp.sparsify_(model, "unstructured@0.95")
    compiled = torch.compile(model, backend="sparse")
    with torch.no_grad():
        given = compiled(x)
    assert given.dtype == torch.bfloat16
    exact = copy.deepcopy(model).float()(x.float())
    assert difference(given.float(), exact) <= 2e-2
