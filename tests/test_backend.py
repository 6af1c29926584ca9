from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fakes import Block, FakeTarget, compile_model, pruned, same
from torch import Tensor, nn

import sparsecomp
from sparsecomp import Pattern, Plan
from sparsecomp.backend import Compilation, compilations
from sparsecomp.planner import SiteChoice
from sparsecomp.targets.base import DENSE


def last() -> Compilation:
    return compilations()[-1]


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.usefixtures("no_grad")
class TestCompiling:
    def test_rewrites_what_wins(self) -> None:
        model, target = pruned(Block()), FakeTarget()
        x = torch.randn(4, 32)
        same(compile_model(model, target)(x), model(x))
        assert last().rewritten == ["up", "down"]
        assert target.runs > 0
        assert last().packed_bytes == sum(int(m.weight.count_nonzero()) * 8 for m in (model.up, model.down))
        assert last().dense_bytes == 2 * 32 * 48 * 4

    def test_found_by_name_without_an_import(self) -> None:
        assert "sparse" in torch._dynamo.list_backends()

    def test_a_dense_model_is_left_alone(self) -> None:
        model, target = Block().eval(), FakeTarget(us=1.0)
        x = torch.randn(4, 32)
        same(compile_model(model, target)(x), model(x))
        assert last().rewritten == []
        assert {choice.reason for choice in last().plan} == {"dense: the weight has no zeros"}
        assert target.prepared == []

    def test_exclude(self) -> None:
        model = pruned(Block())
        compile_model(model, exclude=["^up$"])(torch.randn(4, 32))
        assert last().rewritten == ["down"]
        assert last().plan.sites[0].reason == "dense: excluded by '^up$'"

    def test_patterns(self) -> None:
        model = pruned(Block())
        compile_model(model, patterns=["2:4"])(torch.randn(4, 32))
        assert last().rewritten == []

    def test_a_plan_is_followed(self) -> None:
        model = pruned(Block())
        plan = Plan("fake", [SiteChoice("up", (48, 32), 0, 1.0, DENSE, "")])
        compile_model(model, plan=plan)(torch.randn(4, 32))
        assert last().rewritten == ["down"]
        assert last().plan.sites[0].reason == "dense: the plan says so"

    def test_dynamic_shapes(self) -> None:
        model, target = pruned(Block()), FakeTarget()
        compiled = compile_model(model, target)
        before = len(compilations())
        for shape in ((4, 32), (7, 32), (9, 32), (1, 32), (2, 3, 32), (3, 5, 32), (4, 6, 32)):
            x = torch.randn(shape)
            same(compiled(x), model(x))
        assert len(compilations()) - before <= 5
        assert last().rewritten == ["up", "down"]

    def test_dynamic_from_the_start(self) -> None:
        model = pruned(Block())
        compiled = torch.compile(model, backend="sparse", dynamic=True, options={"target": FakeTarget()})
        before = len(compilations())
        for tokens in (5, 9, 17):
            x = torch.randn(tokens, 32)
            same(compiled(x), model(x))
        assert len(compilations()) - before == 1
        assert all(choice.dynamic for choice in last().plan)

    def test_graph_breaks(self) -> None:
        class Broken(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second = Block(), Block()

            def forward(self, x: Tensor) -> Tensor:
                x = self.first(x)
                torch._dynamo.graph_break()
                return self.second(x)

        model = pruned(Broken())
        x = torch.randn(4, 32)
        before = len(compilations())
        same(compile_model(model)(x), model(x))
        done = compilations()[before:]
        assert [record.rewritten for record in done] == [["first.up", "first.down"], ["second.up", "second.down"]]

    def test_compiled_twice(self) -> None:
        model = pruned(Block())
        x = torch.randn(4, 32)
        expected = model(x)
        one, two = compile_model(model), compile_model(model)
        nested = compile_model(one)
        for compiled in (one, two, nested):
            same(compiled(x), expected)

    def test_functions_and_closures(self) -> None:
        weight = nn.Parameter(Pattern.parse("unstructured@0.9").project(torch.randn(32, 48)))

        def function(x: Tensor) -> Tensor:
            return torch.relu(x @ weight)

        x = torch.randn(4, 32)
        target = FakeTarget()
        same(compile_model(function, target)(x), function(x))

    def test_fullgraph(self) -> None:
        model = pruned(Block())
        x = torch.randn(4, 32)
        options: Any = {"target": FakeTarget()}
        same(torch.compile(model, backend="sparse", fullgraph=True, options=options)(x), model(x))
        assert last().rewritten == ["up", "down"]

    def test_compile_in_place(self) -> None:
        model = pruned(Block())
        x = torch.randn(4, 32)
        expected = model(x)
        model.compile(backend="sparse", options={"target": FakeTarget()})
        same(model(x), expected)
        assert last().rewritten == ["up", "down"]

    def test_shared_weights(self) -> None:
        model = Block(32, 32)
        model.down.weight = model.up.weight
        pruned(model)
        x = torch.randn(4, 32)
        same(compile_model(model)(x), model(x))
        assert last().rewritten == ["up", "down"]

    @pytest.mark.parametrize("sparse", [True, False])
    def test_encoder_layers_of_torch(self, sparse: bool) -> None:
        """Without gradients each is one operation to Dynamo, which is taken apart only where something inside wins."""
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
        if sparse:
            sparsecomp.sparsify_(model, "unstructured@0.9", filter_fn=lambda _, name: "layers.1.linear" in name)
        x = torch.randn(2, 5, 32)
        same(compile_model(model)(x), model(x))
        assert last().rewritten == (["layers.1.linear1", "layers.1.linear2"] if sparse else [])
        report = sparsecomp.explain(model, x, options={"target": FakeTarget()})
        assert len(report) == 8
        assert [choice.name for choice in report.rewritten] == last().rewritten

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float16])
    def test_types(self, dtype: torch.dtype) -> None:
        model = pruned(Block()).to(dtype)
        x = torch.randn(4, 32, dtype=dtype)
        given, expected = compile_model(model)(x), model(x)
        assert given.dtype == dtype
        assert torch.allclose(given.float(), expected.float(), atol=3e-2, rtol=3e-2)
        assert bool(last().rewritten) is (dtype == torch.bfloat16)
        if dtype != torch.bfloat16:
            assert all(choice.declined for choice in last().plan)


@pytest.mark.usefixtures("no_grad")
class TestWeights:
    """A compiled model uses the weights that it has, not those that it had."""

    def check(self, change: Callable[[Block], Any]) -> FakeTarget:
        model, target = Block(), FakeTarget()
        pruned(model)
        compiled = compile_model(model, target)
        x = torch.randn(4, 32)
        compiled(x)
        before = len(compilations())
        change(model)
        same(compiled(x), model(x))
        same(compiled(x), model(x))
        assert len(compilations()) == before
        return target

    def test_in_place(self) -> None:
        self.check(lambda model: model.up.weight.mul_(2))

    def test_zeros_moved(self) -> None:
        self.check(lambda model: model.up.weight.copy_(model.up.weight.roll(1, 1)))

    def test_loaded(self) -> None:
        self.check(lambda model: model.load_state_dict(pruned(Block()).state_dict()))

    def test_no_longer_sparse(self) -> None:
        target = self.check(lambda model: model.load_state_dict(Block().state_dict()))
        # The op falls back to dense: the sparse kernels ran for the first call only.
        assert target.runs == 2

    def test_data_replaced(self) -> None:
        def change(model: Block) -> None:
            model.up.weight.data = torch.randn(48, 32)

        self.check(change)

    def test_parameter_replaced(self) -> None:
        def change(model: Block) -> None:
            model.up.weight = nn.Parameter(torch.randn(48, 32))

        self.check(change)

    def test_optimiser_step(self) -> None:
        def change(model: Block) -> None:
            with torch.enable_grad():
                model(torch.randn(4, 32)).square().sum().backward()
            torch.optim.SGD(model.parameters(), lr=0.1).step()

        self.check(change)

    def test_weights_are_not_packed_again_without_a_change(self) -> None:
        model, target = pruned(Block()), FakeTarget()
        compiled = compile_model(model, target)
        x = torch.randn(4, 32)
        for _ in range(3):
            compiled(x)
        assert len(target.prepared) == 2

    def test_changed_inside_the_graph(self) -> None:
        class Decaying(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(32, 32)

            def forward(self, x: Tensor) -> Tensor:
                self.linear.weight.mul_(0.5)
                return self.linear(x)

        model = pruned(Decaying())
        other = copy.deepcopy(model)
        compiled = compile_model(model)
        x = torch.randn(4, 32)
        for _ in range(3):
            same(compiled(x), other(x))

    def test_one_graph_serves_models_of_a_class(self) -> None:
        """Dynamo gives modules of one class the same compiled code: every call must find its own weights."""
        models = [pruned(Block()) for _ in range(3)]
        target = FakeTarget()
        compiled = [compile_model(model, target) for model in models]
        x = torch.randn(4, 32)
        before = len(compilations())
        for _ in range(3):
            for model, fast in zip(models, compiled, strict=True):
                same(fast(x), model(x))
        assert len(compilations()) - before == 1
        # Packed once for each model, not at each change from one to the other.
        assert len(target.prepared) == 6

    def test_buffers(self) -> None:
        class Buffered(nn.Module):
            weight: Tensor

            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("weight", Pattern.parse("unstructured@0.9").project(torch.randn(48, 32)))

            def forward(self, x: Tensor) -> Tensor:
                return nn.functional.linear(x, self.weight)

        model, target = Buffered().eval(), FakeTarget()
        compiled = compile_model(model, target)
        x = torch.randn(4, 32)
        same(compiled(x), model(x))
        model.weight.copy_(model.weight.roll(1, 0))
        same(compiled(x), model(x))
