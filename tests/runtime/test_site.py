"""A rewritten linear at run time: which weight, which kernel, which types, and who keeps it alive."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from kernel_cases import close, needs_x86, random_weight
from torch import Tensor
from torch.nn import functional

from sparsecomp.runtime.cache import BuildError
from sparsecomp.runtime.failures import failures_of
from sparsecomp.runtime.site import RuntimeSite
from sparsecomp.targets import get_target
from sparsecomp.targets.base import DENSE, Candidate, Kernel, Target, WeightFacts
from sparsecomp.targets.x86 import X86Target

pytestmark = needs_x86

ROWS, GATHER = Candidate("rows", "unstructured"), Candidate("gather", "unstructured")
OUTPUTS, INPUTS = 20, 36


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class Watched(X86Target):
    """The target of this machine; counts what it packs and keeps no kernel alive."""

    def __init__(self) -> None:
        target = get_target(None)
        super().__init__(target.name.partition(":")[2])
        self.packed: list[tuple[Candidate, weakref.ref[Kernel]]] = []

    def prepare(self, candidate: Candidate, weight: Tensor) -> Kernel:
        kernel = super().prepare(candidate, weight)
        self.packed.append((candidate, weakref.ref(kernel)))
        return kernel


def make(
    weight: Tensor,
    *,
    transposed: bool = False,
    activation: str = "none",
    target: Target | None = None,
    choose: Callable[[WeightFacts, int], Candidate] = lambda facts, tokens: ROWS,
) -> RuntimeSite:
    return RuntimeSite("a.linear", weight, transposed, target or get_target(None), choose, activation)


def op(site: RuntimeSite, x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    return torch.ops.sparsecomp.linear(x, bias, residual, site.handle, OUTPUTS, "none")


def same(given: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert given.dtype == expected.dtype
    assert given.is_contiguous()
    close(given.float(), expected.float(), tolerance)


class TestCalls:
    @pytest.mark.parametrize("shape", [(INPUTS,), (1, INPUTS), (7, INPUTS), (2, 3, INPUTS), (2, 1, 4, INPUTS)])
    def test_shapes_of_x(self, shape: tuple[int, ...]) -> None:
        weight, x = random_weight(OUTPUTS, INPUTS), torch.randn(shape)
        same(op(make(weight), x), functional.linear(x, weight))

    @pytest.mark.parametrize("choice", [ROWS, GATHER, DENSE], ids=str)
    @pytest.mark.parametrize("residual", [False, True])
    def test_bias_activation_and_residual(self, choice: Candidate, residual: bool) -> None:
        weight, x, bias = random_weight(OUTPUTS, INPUTS), torch.randn(2, 3, INPUTS), torch.randn(OUTPUTS)
        extra = torch.randn(2, 3, OUTPUTS) if residual else None
        site = make(weight, activation="gelu", choose=lambda facts, tokens: choice)
        expected = functional.gelu(functional.linear(x, weight, bias))
        same(op(site, x, bias, extra), expected if extra is None else expected + extra)

    @pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh", "silu"])
    def test_dense_and_sparse_activations_agree(self, activation: str) -> None:
        weight, x = random_weight(OUTPUTS, INPUTS), torch.randn(5, INPUTS)
        sparse = make(weight, activation=activation)
        dense = make(weight, activation=activation, choose=lambda facts, tokens: DENSE)
        same(op(sparse, x), op(dense, x))

    @pytest.mark.parametrize("shape", [(0, INPUTS), (2, 0, INPUTS)])
    @pytest.mark.parametrize("choice", [ROWS, DENSE], ids=str)
    def test_no_tokens(self, shape: tuple[int, ...], choice: Candidate) -> None:
        site = make(random_weight(OUTPUTS, INPUTS), activation="relu", choose=lambda facts, tokens: choice)
        given = op(site, torch.randn(shape), torch.randn(OUTPUTS), torch.randn(*shape[:-1], OUTPUTS))
        assert given.shape == (*shape[:-1], OUTPUTS)

    @pytest.mark.parametrize("choice", [ROWS, DENSE], ids=str)
    def test_tensors_that_are_not_contiguous(self, choice: Candidate) -> None:
        weight = random_weight(OUTPUTS, INPUTS)
        site = make(weight, choose=lambda facts, tokens: choice)
        residual, bias = torch.randn(OUTPUTS, 5).t(), torch.randn(2 * OUTPUTS)[::2]
        for x in (
            torch.randn(INPUTS, 5).t(),
            torch.randn(5, 2 * INPUTS)[:, ::2],
            torch.randn(INPUTS).expand(5, INPUTS),
        ):
            same(op(site, x, bias, residual), functional.linear(x, weight, bias) + residual)
        x = torch.randn(3, 2, INPUTS).transpose(0, 1)
        same(op(site, x), functional.linear(x, weight))

    @pytest.mark.parametrize("choice", [ROWS, DENSE], ids=str)
    def test_bfloat16_in_and_out(self, choice: Candidate) -> None:
        weight = random_weight(OUTPUTS, INPUTS).bfloat16()
        x, bias, residual = (torch.randn(shape).bfloat16() for shape in ((4, INPUTS), (OUTPUTS,), (4, OUTPUTS)))
        site = make(weight, activation="gelu", choose=lambda facts, tokens: choice)
        given = op(site, x, bias, residual)
        exact = functional.gelu(functional.linear(x.float(), weight.float(), bias.float())) + residual.float()
        assert given.dtype == torch.bfloat16
        close(given.float(), exact, 2e-2)

    def test_sums_of_bfloat16_grow_in_float32(self) -> None:
        weight = torch.ones(OUTPUTS, 2048, dtype=torch.bfloat16)
        weight[:, ::2] = 0
        x = torch.ones(1, 2048, dtype=torch.bfloat16)
        site = make(weight)
        assert torch.equal(op(site, x), torch.full((1, OUTPUTS), 1024.0, dtype=torch.bfloat16))

    def test_weights_stored_transposed(self) -> None:
        weight, x = random_weight(OUTPUTS, INPUTS), torch.randn(5, INPUTS)
        for choice in (ROWS, GATHER, DENSE):
            site = make(weight.t().contiguous(), transposed=True, choose=lambda facts, tokens, c=choice: c)
            assert (site.facts.out_features, site.facts.in_features) == (OUTPUTS, INPUTS)
            same(op(site, x), x @ weight.t())

    def test_inputs_are_left_alone(self) -> None:
        weight, x = random_weight(OUTPUTS, INPUTS), torch.randn(5, INPUTS)
        bias, residual = torch.randn(OUTPUTS), torch.randn(5, OUTPUTS)
        before = [tensor.clone() for tensor in (weight, x, bias, residual)]
        op(make(weight, activation="silu"), x, bias, residual)
        assert all(torch.equal(a, b) for a, b in zip(before, (weight, x, bias, residual), strict=True))

    def test_under_inference_mode(self) -> None:
        weight = random_weight(OUTPUTS, INPUTS)
        site = make(weight)
        with torch.inference_mode():
            x = torch.randn(3, INPUTS)
            same(op(site, x), functional.linear(x, weight))


class TestOp:
    def test_meta_gives_the_shape(self) -> None:
        x = torch.empty(2, 3, INPUTS, device="meta", dtype=torch.bfloat16)
        given = torch.ops.sparsecomp.linear(x, None, None, 0, OUTPUTS, "none")
        assert (given.shape, given.dtype, given.device.type) == ((2, 3, OUTPUTS), torch.bfloat16, "meta")

    def test_schema_and_fake_tensors_hold(self) -> None:
        site = make(random_weight(OUTPUTS, INPUTS))
        arguments = (torch.randn(2, 3, INPUTS), torch.randn(OUTPUTS), None, site.handle, OUTPUTS, "none")
        torch.library.opcheck(
            torch.ops.sparsecomp.linear.default, arguments, test_utils=("test_schema", "test_faketensor")
        )

    def test_a_released_site_is_explained(self) -> None:
        site = make(random_weight(OUTPUTS, INPUTS))
        handle = site.handle
        del site
        gc.collect()
        with pytest.raises(RuntimeError, match=rf"site {handle}, which was released: compile the model again"):
            torch.ops.sparsecomp.linear(torch.randn(2, INPUTS), None, None, handle, OUTPUTS, "none")

    def test_handles_are_never_used_twice(self) -> None:
        weight = random_weight(OUTPUTS, INPUTS)
        assert len({make(weight).handle for _ in range(5)}) == 5


class TestChoices:
    def test_are_made_once_for_a_number_of_tokens(self) -> None:
        asked: list[int] = []

        def choose(facts: WeightFacts, tokens: int) -> Candidate:
            asked.append(tokens)
            return GATHER if tokens == 1 else ROWS

        target = Watched()
        weight = random_weight(OUTPUTS, INPUTS)
        site = make(weight, target=target, choose=choose)
        for tokens in (1, 9, 1, 9, 12):
            x = torch.randn(tokens, INPUTS)
            same(op(site, x), functional.linear(x, weight))
        assert asked == [1, 9, 12]
        assert [candidate for candidate, _ in target.packed] == [GATHER, ROWS]

    def test_their_number_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sparsecomp.runtime.weight_site._MAX_CHOICES", 3)
        target, weight = Watched(), random_weight(OUTPUTS, INPUTS)
        site = make(weight, target=target)
        for tokens in (*range(1, 9), *range(1, 9)):
            x = torch.randn(tokens, INPUTS)
            same(op(site, x), functional.linear(x, weight))
        assert len(target.packed) == 1

    def test_prepare_builds_ahead(self, monkeypatch: pytest.MonkeyPatch) -> None:
        target, weight = Watched(), random_weight(OUTPUTS, INPUTS)
        site = make(weight, target=target, activation="relu")
        site.prepare(6, True)
        ((candidate, _),) = target.packed
        assert candidate == ROWS
        monkeypatch.setattr("sparsecomp.targets.x86.kernels.function_of", lambda source: pytest.fail("built late"))
        x, residual = torch.randn(6, INPUTS), torch.randn(6, OUTPUTS)
        same(op(site, x, None, residual), functional.relu(functional.linear(x, weight)) + residual)

    def test_bytes_and_code_of_what_is_used(self) -> None:
        weight = random_weight(OUTPUTS, INPUTS)
        site = make(weight, choose=lambda facts, tokens: DENSE if tokens > 10 else ROWS)
        op(site, torch.randn(20, INPUTS))
        assert site.nbytes == 4 * OUTPUTS * INPUTS
        assert site.source == "dense"
        op(site, torch.randn(4, INPUTS))
        kernel = get_target(None).prepare(ROWS, weight)
        assert site.nbytes == kernel.nbytes
        assert site.source.startswith("; rows[unstructured]\n")
        assert "rows:" in site.source


class TestChangedWeights:
    def test_zeros_that_moved(self) -> None:
        target, weight = Watched(), random_weight(OUTPUTS, INPUTS, seed=1)
        site, x = make(weight, target=target), torch.randn(4, INPUTS)
        same(op(site, x), functional.linear(x, weight))
        weight.copy_(random_weight(OUTPUTS, INPUTS, 0.5, seed=2))
        site.refresh(weight)
        assert site.facts.nonzeros == int(weight.count_nonzero())
        same(op(site, x), functional.linear(x, weight))
        assert len(target.packed) == 2
        site.refresh(weight)
        op(site, x)
        assert len(target.packed) == 2

    def test_storage_that_was_swapped(self) -> None:
        weight = torch.nn.Parameter(random_weight(OUTPUTS, INPUTS, seed=1))
        site, x = make(weight), torch.randn(4, INPUTS)
        weight.data = random_weight(OUTPUTS, INPUTS, seed=2)
        site.refresh(weight)
        same(op(site, x), functional.linear(x, weight))

    def test_transposed_ones(self) -> None:
        weight = random_weight(INPUTS, OUTPUTS, seed=1)
        site, x = make(weight, transposed=True), torch.randn(4, INPUTS)
        weight.mul_(random_weight(INPUTS, OUTPUTS, 0.5, seed=3))
        site.refresh(weight)
        same(op(site, x), x @ weight)

    def test_the_choice_is_made_again(self) -> None:
        weight = random_weight(OUTPUTS, INPUTS)
        site = make(weight, choose=lambda facts, tokens: ROWS if facts.density < 0.5 else DENSE)
        x = torch.randn(4, INPUTS)
        op(site, x)
        assert site.source != "dense"
        weight.fill_(1.0)
        site.refresh(weight)
        same(op(site, x), functional.linear(x, weight))
        assert site.source == "dense"

    def test_a_dense_choice_reads_the_weight_itself(self) -> None:
        weight = random_weight(OUTPUTS, INPUTS)
        site, x = make(weight, choose=lambda facts, tokens: DENSE), torch.randn(4, INPUTS)
        weight.add_(1.0)
        same(op(site, x), functional.linear(x, weight))

    def test_sites_of_one_weight_share_its_packed_form(self) -> None:
        target, weight = Watched(), random_weight(OUTPUTS, OUTPUTS)
        sites = [make(weight, target=target, activation=activation) for activation in ("none", "relu")]
        sites.append(make(weight, target=target, transposed=True))
        x = torch.randn(4, OUTPUTS)
        expected = functional.linear(x, weight)
        for site, value in zip(sites, (expected, expected.relu(), x @ weight), strict=True):
            same(op(site, x), value)
        assert len(target.packed) == 2
        weight.mul_(random_weight(OUTPUTS, OUTPUTS, 0.5, seed=3))
        expected = functional.linear(x, weight)
        for site, value in zip(sites, (expected, expected.relu(), x @ weight), strict=True):
            site.refresh(weight)
            same(op(site, x), value)
        assert len(target.packed) == 4

    def test_weights_take_turns(self) -> None:
        target = Watched()
        weights = [random_weight(OUTPUTS, INPUTS, seed=seed) for seed in range(3)]
        site, x = make(weights[0], target=target), torch.randn(4, INPUTS)
        for turn in (0, 1, 2, 0, 2, 1):
            site.refresh(weights[turn])
            same(op(site, x), functional.linear(x, weights[turn]))
        assert len(target.packed) == 3

    def test_packed_forms_die_with_their_weight(self) -> None:
        target = Watched()
        first, second = random_weight(OUTPUTS, INPUTS, seed=1), random_weight(OUTPUTS, INPUTS, seed=2)
        site, x = make(first, target=target), torch.randn(4, INPUTS)
        op(site, x)
        site.refresh(second)
        op(site, x)
        del first
        gc.collect()
        assert [kernel() is None for _, kernel in target.packed] == [True, False]


class TestThreads:
    def run(self, bodies: list[Callable[[], None]]) -> None:
        """Run in Python threads at once; an error in one is an error here."""
        errors: list[BaseException] = []
        barrier = threading.Barrier(len(bodies))

        def guarded(body: Callable[[], None]) -> None:
            try:
                barrier.wait(30)
                with torch.no_grad():
                    body()
            except BaseException as error:  # noqa: BLE001 -- raised in the thread of the test
                errors.append(error)

        threads = [threading.Thread(target=guarded, args=(body,)) for body in bodies]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        if errors:
            raise errors[0]

    def test_two_threads_with_two_weights(self) -> None:
        weights = [random_weight(OUTPUTS, INPUTS, seed=seed) for seed in (1, 2)]
        site = make(weights[0])

        def body(own: int) -> Callable[[], None]:
            def run() -> None:
                generator = torch.Generator().manual_seed(own)
                for tokens in range(1, 40):
                    x = torch.randn(tokens, INPUTS, generator=generator)
                    site.refresh(weights[own])
                    same(op(site, x), functional.linear(x, weights[own]))

            return run

        self.run([body(0), body(1)])

    def test_two_threads_with_one_weight(self) -> None:
        target, weight = Watched(), random_weight(OUTPUTS, INPUTS)
        site = make(weight, target=target)

        def run() -> None:
            for tokens in range(1, 40):
                x = torch.ones(tokens, INPUTS)
                site.refresh(weight)
                same(op(site, x), functional.linear(x, weight))

        self.run([run, run])
        assert len(target.packed) == 1

    def test_torch_threads(self, threads: Any) -> None:
        weight, x = random_weight(OUTPUTS, INPUTS), torch.randn(50, INPUTS)
        site = make(weight)
        given = []
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            given.append(op(site, x))
        same(given[0], functional.linear(x, weight))
        assert torch.equal(given[0], given[1])
        assert torch.equal(given[0], given[2])


def test_a_kernel_that_fails_at_a_new_number_of_tokens_runs_dense(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What a call meets for the first time must not raise where Inductor would not; the reason is logged."""
    weight = torch.randn(16, 24) * (torch.rand(16, 24) < 0.2)
    target = get_target()

    def fail(*_: object) -> Kernel:
        raise BuildError("no C compiler found")

    monkeypatch.setattr(target, "prepare", fail)
    site = RuntimeSite("layer", weight, False, target, lambda facts, tokens: Candidate("rows", "unstructured"), "relu")
    x = torch.randn(5, 24)
    given = site.run(x, None, None)
    assert torch.allclose(given, torch.relu(x @ weight.t()), atol=1e-5)
    assert "layer runs dense at 5 tokens" in caplog.text
    assert failures_of(weight) == (
        "ran dense at 5 tokens, where its kernel failed with BuildError: no C compiler found"
    )
    assert failures_of(torch.randn(2, 2)) == ""
    with pytest.raises(BuildError):
        site.prepare(7, residual=False)
