from __future__ import annotations

import copy
import pickle
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from fakes import Block, FakeTarget, compile_model, pruned, same
from torch import Tensor, nn

from sparsecomp.backend import Compilation, compilations


def last() -> Compilation:
    return compilations()[-1]


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class TestModes:
    def test_under_grad_it_trains_as_inductor_does(self) -> None:
        model = pruned(Block())
        other = copy.deepcopy(model)
        target = FakeTarget()
        compiled = compile_model(model, target)
        x = torch.randn(4, 32)
        compiled(x).square().sum().backward()
        other(x).square().sum().backward()
        for given, expected in zip(model.parameters(), other.parameters(), strict=True):
            assert given.grad is not None
            assert expected.grad is not None
            same(given.grad, expected.grad)
        assert last().rewritten == []
        assert "gradients are enabled and 4 of 5 inputs" in last().reasons[0]
        assert target.prepared == []
        with torch.no_grad():
            same(compiled(x), model(x))
        assert last().rewritten == ["up", "down"]

    def test_frozen_parameters_run_sparse_under_grad(self) -> None:
        model = pruned(Block()).requires_grad_(False)
        x = torch.randn(4, 32)
        same(compile_model(model)(x), model(x))
        assert last().rewritten == ["up", "down"]
        given = torch.randn(4, 32, requires_grad=True)
        torch.compile(model, backend="sparse", options={"target": FakeTarget()})(given).sum().backward()
        assert last().rewritten == []
        assert given.grad is not None

    def test_gradients_enabled_inside(self) -> None:
        model = pruned(Block())

        def function(x: Tensor) -> Tensor:
            with torch.enable_grad():
                return model(x).sum()

        x = torch.randn(4, 32)
        with torch.no_grad():
            result = compile_model(function)(x)
        same(result.detach(), model(x).sum().detach())
        assert last().rewritten == []

    def test_inference_mode(self) -> None:
        model = pruned(Block())
        x = torch.randn(4, 32)
        compiled = compile_model(model)
        with torch.inference_mode():
            same(compiled(x), model(x))
        assert last().rewritten == ["up", "down"]
        with torch.no_grad():
            model.up.weight.mul_(2)
        with torch.inference_mode():
            same(compiled(x), model(x))

    def test_weights_made_in_inference_mode(self) -> None:
        with torch.inference_mode():
            model = pruned(Block())
            x = torch.randn(4, 32)
            same(compile_model(model)(x), model(x))
        assert last().rewritten == []
        assert all("inference_mode" in choice.reason for choice in last().plan)

    @pytest.mark.parametrize("inside", [False, True])
    def test_autocast(self, inside: bool) -> None:
        model = pruned(Block())

        def function(x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
                return model.up(x)

        x = torch.randn(4, 32)
        compiled = compile_model(function)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=not inside):
            given, expected = compiled(x), function(x)
        assert given.dtype == expected.dtype
        assert torch.allclose(given.float(), expected.float(), atol=3e-2)
        assert last().rewritten == []
        assert any("autocast" in reason for reason in last().reasons)

    @pytest.mark.usefixtures("threads", "no_grad")
    def test_numbers_of_threads(self) -> None:
        model = pruned(Block())
        x = torch.randn(64, 32)
        compiled = compile_model(model)
        for number in (1, 2, 1):
            torch.set_num_threads(number)
            same(compiled(x), model(x))
            assert torch.get_num_threads() == number

    @pytest.mark.parametrize("shared", [False, True])
    def test_two_threads(self, shared: bool) -> None:
        """Two models of a class, hence one compiled graph; or one model in both threads."""
        models = [pruned(Block()) for _ in range(2)]
        if shared:
            models[1] = models[0]
        target = FakeTarget()  # equal options, without which Dynamo would not share the graph
        compiled = [compile_model(model, target) for model in models]
        failures: list[BaseException] = []
        barrier = threading.Barrier(2)

        # Switch as often as possible: a thread must not see the weights of the other.
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)

        def work(index: int) -> None:
            try:
                barrier.wait()
                with torch.no_grad():
                    for step in range(300):
                        x = torch.randn(1 + step % 3, 32)
                        same(compiled[index](x), models[index](x))
            except BaseException as error:  # noqa: BLE001 -- told to the main thread
                failures.append(error)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
        assert not failures, failures

    @pytest.mark.usefixtures("no_grad")
    def test_copies_before_compiling(self) -> None:
        model = pruned(Block())
        x = torch.randn(4, 32)
        expected = model(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
            same(compile_model(other)(x), expected)
            assert last().rewritten == ["up", "down"]

    @pytest.mark.usefixtures("no_grad")
    def test_training_mode_with_dropout(self) -> None:
        model = nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.5), nn.Linear(32, 32))
        pruned(model)
        model.train()
        assert compile_model(model)(torch.randn(4, 32)).shape == (4, 32)
