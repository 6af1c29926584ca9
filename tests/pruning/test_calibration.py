"""Calibration inputs and the walk through a model."""

from __future__ import annotations

import copy
from collections import UserDict
from types import SimpleNamespace

import pytest
import torch
from models import bert
from torch import Tensor, nn

from sparsecomp.pruning.calibration import Call, Part, Stream, as_calls, calibrating, find_blocks


class Block(nn.Module):
    """A residual block that takes its input and a scale."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + scale * self.down(torch.relu(self.up(x)))


class Stack(nn.Module):
    """Blocks in a row, with something before and behind them."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x, scale=0.5)
        return self.head(x)


class Doubling(Stack):
    """Blocks that do not take what the block before them gives."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(2 * x, scale=0.5)
        return self.head(x)


class InPlace(Stack):
    """Blocks whose input changes."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.forward = lambda x, scale, block=block: x.add_(block.down(block.up(x)))


class Caching(Stack):
    """Blocks that are given an object which may change."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.forward = lambda x, scale, block=block: Block.forward(block, x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        cache = SimpleNamespace()
        for block in self.blocks:
            x = block(x, cache)
        return self.head(x)


def inputs(count: int = 2) -> list[Tensor]:
    return [torch.randn(3, 4) for _ in range(count)]


def zero_the_block(part: Part) -> None:
    for parameter in part.module.parameters():
        parameter.zero_()


def walk(model: nn.Module, batches: list[Tensor], *, targets: bool = False) -> list[Part]:
    with calibrating(model):
        return list(Stream(model, as_calls(batches), find_blocks(model), targets=targets))


def block_inputs(model: nn.Module, batches: list[Tensor], number: int) -> list[Tensor]:
    seen: list[Tensor] = []
    handle = model.blocks[number].register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    return seen


def test_batches_may_be_tensors_tuples_and_mappings() -> None:
    x, y = torch.ones(1), torch.zeros(1)
    calls = as_calls(iter([x, (x, y), [x, None], {"a": x}, UserDict(a=x)]))
    assert [call.args for call in calls] == [(x,), (x, y), (x, None), (), ()]
    assert [call.kwargs for call in calls] == [{}, {}, {}, {"a": x}, {"a": x}]
    assert as_calls(calls) == calls


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "holds no batch"),
        (torch.ones(2, 3), "a single Tensor, not batches"),
        ({"input_ids": torch.ones(2)}, "a single dict, not batches"),
        ("text", "a single str, not batches"),
        (3, "a single int, not batches"),
        (["text"], "calibration batch 0 is a str"),
        ([torch.ones(1), []], "calibration batch 1 is a list"),
        ([{1: torch.ones(1)}], "calibration batch 0 is a dict"),
    ],
)
def test_what_is_no_batch_is_an_error(batches, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        as_calls(batches)


def test_blocks_are_the_list_with_the_most_weights() -> None:
    model = Stack()
    model.extra = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model.mixed = nn.Sequential(nn.Linear(99, 99), nn.ReLU())
    assert [name for name, _ in find_blocks(model)] == ["blocks.0", "blocks.1", "blocks.2"]
    assert find_blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU())) == []
    assert [name for name, _ in find_blocks(bert(2, 32, 2))] == ["encoder.layer.0", "encoder.layer.1"]


@pytest.mark.parametrize("kind", [Stack, Doubling])
def test_every_block_sees_what_the_pruned_model_gives_it(kind: type[Stack]) -> None:
    model, batches = kind(), inputs()
    dense = copy.deepcopy(model)
    with calibrating(model):
        for number, part in enumerate(Stream(model, as_calls(batches), find_blocks(model), targets=True)):
            assert part.module is model.blocks[number]
            for call, want in zip(part.calls, block_inputs(model, batches, number), strict=True):
                torch.testing.assert_close(call.args[0], want)
                assert call.kwargs == {"scale": 0.5}
            if kind is Stack:
                # What the dense model has at this place, whatever the pruned one makes of the blocks before.
                for target, x in zip(part.targets, block_inputs(dense, batches, number), strict=True):
                    torch.testing.assert_close(target, dense.blocks[number](x, 0.5).detach())
            zero_the_block(part)


def test_a_chain_runs_no_pass_after_the_first_and_stops_behind_the_last_block() -> None:
    model = Stack()
    runs = {"first": 0, "head": 0}
    for name in runs:

        def count(*_: object, name: str = name) -> None:
            runs[name] += 1

        getattr(model, name).register_forward_hook(count)
    walk(model, inputs(2), targets=True)
    assert runs == {"first": 2, "head": 0}


@pytest.mark.parametrize("kind", [InPlace, Caching])
def test_blocks_that_cannot_run_twice_come_as_the_whole_model(kind: type[Stack]) -> None:
    model, batches = kind(), inputs()
    parts = walk(model, batches)
    assert [(part.name, part.module) for part in parts] == [("", model)]
    assert [call.args[0] for call in parts[0].calls] == batches


def llama() -> nn.Module:
    """Caches keys and values unless it is told not to, and hands rotary embeddings to its blocks."""
    transformers = pytest.importorskip("transformers")
    settings = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
    )
    model: nn.Module = transformers.LlamaModel(settings).eval()
    model.norm = nn.Identity()  # so that the model gives what the last block does
    return model


@pytest.mark.parametrize("make", [lambda: bert(3, 32, 2, vocab_size=50), llama], ids=["bert", "llama"])
def test_models_of_transformers_are_chains(make) -> None:  # type: ignore[no-untyped-def]
    model = make()
    batches = [{"input_ids": torch.arange(16).reshape(2, 8)}, {"input_ids": torch.arange(5)[None]}]
    parts = walk(model, batches, targets=True)  # type: ignore[arg-type]
    assert len(parts) == 3
    with torch.no_grad():
        for batch, target in zip(batches, parts[-1].targets, strict=True):
            torch.testing.assert_close(model(**batch).last_hidden_state, target)


def test_modes_and_settings_come_back() -> None:
    model = Stack().train()
    model.blocks[1].eval()
    model.config = SimpleNamespace(use_cache=True)
    model.blocks[2].config = SimpleNamespace(use_cache=True)
    with pytest.raises(RuntimeError, match="stop"), calibrating(model):
        assert not model.training
        assert not model.config.use_cache
        assert not model.blocks[2].config.use_cache
        assert not torch.is_grad_enabled()
        raise RuntimeError("stop")
    assert [model.training, model.blocks[0].training, model.blocks[1].training] == [True, True, False]
    assert model.config.use_cache
    assert model.blocks[2].config.use_cache
    assert torch.is_grad_enabled()


def test_no_hook_stays() -> None:
    for model in (Stack(), Doubling(), Caching()):
        walk(model, inputs())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_call_replaces_an_argument() -> None:
    call = Call((1, 2), {"a": 3})
    assert call.replace(0, 9) == Call((9, 2), {"a": 3})
    assert call.replace("a", 9) == Call((1, 2), {"a": 9})
    assert list(call.slots()) == [(0, 1), (1, 2), ("a", 3)]


@pytest.mark.parametrize("bias", [True, False])
def test_a_call_gives_what_the_module_gives(bias: bool) -> None:
    # Without gradients float32 linears take another library; strides, single rows and other types must not matter.
    torch.manual_seed(0)
    linear = nn.Linear(24, 16, bias=bias)
    inputs = [torch.randn(3, 5, 24), torch.randn(24), torch.randn(0, 24), torch.randn(5, 48)[:, ::2]]
    with torch.no_grad():
        for x in inputs:
            torch.testing.assert_close(Call((x,), {}).run(linear), linear(x))
        with torch.autocast("cpu", torch.bfloat16):
            assert Call((inputs[0],), {}).run(linear).dtype == torch.bfloat16
        assert Call((inputs[0].double(),), {}).run(copy.deepcopy(linear).double()).dtype == torch.float64
    out = Call((inputs[0],), {}).run(linear)
    assert out.requires_grad
