"""`explain` of models without values: on the meta device, or of fake tensors, also such of a card that is not here."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import sparsecomp
from sparsecomp.targets.cuda.target import SEMI
from sparsecomp.valueless import runnable

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
MODELS: dict[str, tuple[str, dict[str, int]]] = {
    "Bert": ("Model", SMALL),
    "ViT": ("Model", {**SMALL, "image_size": 32, "patch_size": 8}),
    "Llama": ("ForCausalLM", {**SMALL, "num_key_value_heads": 2}),
    "GPT2": ("LMHeadModel", {"n_embd": 64, "n_layer": 2, "n_head": 4}),
}
each_kind = pytest.mark.parametrize("kind", ["meta", "cpu", "cuda"])


def valueless(model: nn.Module, kind: str, *inputs: Tensor) -> tuple[Any, ...]:
    """A model and its inputs on the meta device, or with fake tensors of another one."""
    if kind == "meta":
        return (model.to("meta"), *(value.to("meta") for value in inputs))
    mode = FakeTensorMode()

    def fake(value: Tensor) -> Tensor:
        with mode:  # a fake tensor's .to("cuda") needs a PyTorch with CUDA
            return torch.empty(tuple(value.shape), dtype=value.dtype, device=kind)

    for module in model.modules():
        for name, value in module._parameters.items():
            module._parameters[name] = None if value is None else nn.Parameter(fake(value), value.requires_grad)
        for name, value in module._buffers.items():
            module._buffers[name] = None if value is None else fake(value)
    return (model, *map(fake, inputs))


@each_kind
@pytest.mark.parametrize("name", MODELS)
def test_every_layer_of_a_transformer_is_explained_as_it_is_called(name: str, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    head, sizes = MODELS[name]
    model = getattr(transformers, name + head)(getattr(transformers, f"{name}Config")(**sizes)).eval()
    layers = (nn.Linear, nn.Conv2d, transformers.pytorch_utils.Conv1D)
    names = {path for path, module in model.named_modules() if isinstance(module, layers)}
    x = torch.zeros(2, 3, 32, 32) if name == "ViT" else torch.zeros(2, 16, dtype=torch.long)
    report = sparsecomp.explain(*valueless(model, kind, x), target="cuda:h100", assume="2:4")
    assert {choice.name for choice in report} == names
    assert report.graphs == 1
    assert all(choice.dense_us for choice in report)


class Positions(nn.Module):
    """Tensors are made in the forward pass, one of them where Dynamo does not look."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(512, 512)
        self.scales = [torch.ones(512)]  # no buffer

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.arange(512, device=x.device) * self.scales[0]
        torch._dynamo.graph_break()
        y: Tensor = self.linear(x * torch.ones(512, device=x.device))
        return y


@each_kind
def test_a_forward_pass_makes_tensors(kind: str) -> None:
    with torch.device("meta" if kind == "meta" else "cpu"):
        made = Positions()
    if kind == "cuda" and torch.cuda.is_available():
        pytest.skip("the model holds a tensor on the CPU, and there is a card")
    (choice,) = sparsecomp.explain(*valueless(made, kind, torch.zeros(2, 512)), target="cuda:h100")
    assert choice.reason == "dense: its zeros are not known, as its weight has no values; assume a pattern"


def test_weights_with_values_count_as_they_are_beside_inputs_without() -> None:
    model = nn.Linear(4096, 4096).half()
    sparsecomp.sparsify_(model, "2:4")
    for x in (torch.zeros(4096, 4096, device="meta").half(), FakeTensorMode().from_tensor(torch.zeros(4096, 4096))):
        (choice,) = sparsecomp.explain(model, x.half(), target="cuda:h100")
        assert choice.chosen == SEMI
        assert choice.density == pytest.approx(0.5, abs=0.01)


def test_a_model_on_the_meta_device_is_left_as_it_is() -> None:
    with torch.device("meta"):
        model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.zeros(2, 8)
    model[1].weight = model[0].weight
    before = dict(model.named_parameters(remove_duplicate=False))
    with runnable(model, (x,), {}) as (run, (given,), named):
        assert isinstance(run, nn.Sequential)
        assert all(isinstance(value, FakeTensor) and value.is_cpu for value in (*run.parameters(), given))
        assert run[0].weight is run[1].weight
        assert isinstance(torch.zeros(1), FakeTensor)
        assert named == {}
    assert all(value is before[name] for name, value in model.named_parameters(remove_duplicate=False))
    assert all(value.is_meta and not isinstance(value, FakeTensor) for value in before.values())
    assert not isinstance(torch.zeros(1), FakeTensor)


def test_the_mode_of_fake_tensors_is_put_back() -> None:
    (model, x), error = valueless(nn.Linear(8, 8), "cpu", torch.zeros(2, 8)), KeyError("from inside")
    with pytest.raises(KeyError), runnable(model, (x,), {}):
        assert x.fake_mode.allow_non_fake_inputs
        raise error
    assert not x.fake_mode.allow_non_fake_inputs


def test_what_cannot_be_copied_runs_on_the_meta_device() -> None:
    with torch.device("meta"):
        model, x = nn.Linear(8, 8), torch.zeros(2, 8)
    model.lock = threading.Lock()
    for call in (model, lambda value: model(value)):
        with runnable(call, (x,), {}) as (run, (given,), _):
            assert run is call
            assert given is x
        assert len(sparsecomp.explain(call, x, target="cuda:h100")) == 1


class Recurrent(nn.Module):
    """Dynamo leaves the whole forward pass to eager mode, unless its configuration says otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.lstm, self.after = nn.Linear(64, 64), nn.LSTM(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.after(self.lstm(self.before(x))[0])
        return y


@pytest.mark.parametrize("kind", [None, "meta", "cpu"])
def test_layers_beside_an_lstm_are_explained_where_dynamo_takes_it(kind: str | None) -> None:
    model, x = Recurrent().requires_grad_(False), torch.zeros(5, 2, 64)
    if kind is not None:
        model, x = valueless(model, kind, x)
    report = sparsecomp.explain(model, x, target="cuda:h100")
    assert len(report) == 0
    assert "RNN, GRU or LSTM (lstm) to eager mode" in report.notes[0]
    with torch._dynamo.config.patch(allow_rnn=True):
        report = sparsecomp.explain(model, x, target="cuda:h100")
    assert [choice.name for choice in report] == ["before", "after"]
    assert report.notes == []
