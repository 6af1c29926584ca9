"""The x86 target: what it offers for a weight, and that every kernel it makes computes the linear."""

from __future__ import annotations

import functools

import pytest
import torch
from kernel_cases import EPILOGUES, Inputs, close, dense, epilogue_name, needs_x86, panel_weight, random_weight

from sparsecomp.kernels.epilogue import Epilogue
from sparsecomp.patterns import Pattern
from sparsecomp.targets import get_target
from sparsecomp.targets.base import DENSE, Candidate, WeightFacts
from sparsecomp.targets.x86 import cpu, kernels
from sparsecomp.targets.x86.target import X86Target

RUNNABLE = [
    pytest.param(
        level,
        marks=[needs_x86, pytest.mark.skipif(not cpu.supported(level), reason=f"this CPU does not run x86:{level}")],
    )
    for level in cpu.LEVELS
]
FAMILIES = ["rows", "gather", "mask", "panel8", "panel16", "panel32"]


@functools.cache
def weight_of(pattern: str, outputs: int = 64, inputs: int = 96) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return Pattern.parse(pattern).project(torch.randn(outputs, inputs, generator=generator))


def offered(pattern: str, allowed: list[str] | None = None, level: str = "avx2") -> list[str]:
    """Names of the candidates for a weight of a pattern."""
    return [label(c) for c in X86Target(level).candidates(WeightFacts.of(weight_of(pattern)), allowed)]


def label(candidate: Candidate) -> str:
    size = dict(candidate.params).get("v")
    return f"{candidate}/{size}" if size else str(candidate)


def candidate(family: str, pattern: str = "unstructured") -> Candidate:
    if family.startswith("panel"):
        return Candidate("panel", pattern, (("v", int(family[5:])),))
    return Candidate(family, pattern)


def all_of(single: str, *panels: str) -> list[str]:
    return ["dense", f"rows[{single}]", f"gather[{single}]", f"mask[{single}]", *panels]


PLAIN_PANELS = [f"panel[unstructured]/{v}" for v in (8, 16, 32)]


class TestCandidates:
    def test_of_an_unstructured_weight(self) -> None:
        assert offered("unstructured@0.8") == all_of("unstructured", *PLAIN_PANELS)

    def test_of_two_of_four(self) -> None:
        assert offered("2:4") == all_of("2:4", *PLAIN_PANELS)

    def test_of_shared_two_of_four(self) -> None:
        panels = [f"panel[32:2:4]/{v}" for v in (8, 16, 32)]
        assert offered("32:2:4") == all_of("unstructured", *panels)
        assert offered("32:2:4", ["32:2:4"]) == ["dense", *panels]

    def test_of_blocks(self) -> None:
        expected = ["panel[16x1]/8", "panel[16x1]/16", "panel[unstructured]/32"]
        assert offered("16x1@0.5") == all_of("unstructured", *expected)

    @pytest.mark.parametrize("level", cpu.LEVELS)
    def test_of_a_weight_without_zeros_are_dense_alone(self, level: str) -> None:
        facts = WeightFacts.of(torch.ones(16, 16))
        assert X86Target(level).candidates(facts) == [DENSE]
        assert X86Target(level).candidates(facts, ["unstructured"]) == [DENSE]

    def test_of_a_weight_of_zeros(self) -> None:
        assert len(X86Target("avx2").candidates(WeightFacts.of(torch.zeros(16, 16)))) == 7

    @pytest.mark.parametrize("shape", [(0, 16), (16, 0)])
    def test_of_an_empty_weight(self, shape: tuple[int, int]) -> None:
        assert X86Target("avx2").candidates(WeightFacts.of(torch.zeros(shape))) == [DENSE]

    def test_only_what_is_allowed(self) -> None:
        assert offered("unstructured@0.8", []) == ["dense"]
        assert offered("unstructured@0.8", ["dense"]) == ["dense"]
        assert offered("unstructured@0.8", ["2:4"]) == ["dense"]
        assert offered("unstructured@0.8", ["2:4", "unstructured"]) == all_of("unstructured", *PLAIN_PANELS)
        assert offered("2:4", ["32:2:4"]) == ["dense"]
        assert offered("2:4", ["2:4"]) == all_of("2:4")

    def test_a_tighter_weight_runs_under_the_allowed_pattern(self) -> None:
        assert offered("1:4", ["2:4"]) == all_of("2:4")
        assert offered("2:4", ["1:4"]) == ["dense"]

    def test_masks_need_a_fast_shuffle(self) -> None:
        assert "mask[unstructured]" not in offered("unstructured@0.8", level="generic")
        assert "mask[unstructured]" in offered("unstructured@0.8", level="avx512")

    def test_indices_of_sixteen_bits_have_an_end(self) -> None:
        facts = WeightFacts.of(torch.eye(2, 65537))
        assert "gather" not in [c.kernel for c in X86Target("avx2").candidates(facts)]

    @pytest.mark.parametrize("pattern", ["unstructured@0.8", "2:4", "1:4", "32:2:4", "8:1:8", "16x1@0.5"])
    @pytest.mark.parametrize("allowed", [None, ["2:4"], ["32:2:4", "unstructured"]], ids=str)
    def test_can_all_be_prepared(self, pattern: str, allowed: list[str] | None) -> None:
        target, weight = X86Target("avx2"), weight_of(pattern)
        for found in target.candidates(WeightFacts.of(weight), allowed)[1:]:
            assert target.prepare(found, weight).nbytes > 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("level", RUNNABLE)
class TestKernels:
    """Every family on every level that runs here, made by the target as the run time makes it."""

    def target(self, level: str, family: str) -> X86Target:
        target = get_target(f"x86:{level}")
        assert isinstance(target, X86Target)
        if family == "mask" and not cpu.level(level).spread:
            pytest.skip(f"x86:{level} has no mask kernel")
        return target

    def weight(self, family: str, outputs: int, inputs: int) -> torch.Tensor:
        if family.startswith("panel"):
            return panel_weight(outputs, inputs, int(family[5:]))
        return random_weight(outputs, inputs)

    def test_agree_with_dense(self, level: str, family: str, threads: None) -> None:
        target = self.target(level, family)
        for outputs, inputs in ((37, 53), (300, 40)):
            weight = self.weight(family, outputs, inputs)
            kernel = target.prepare(candidate(family), weight)
            for tokens in (1, 5, 130):
                call = Inputs.random(tokens, outputs, inputs)
                for count in (1, 2):
                    torch.set_num_threads(count)
                    out = torch.full((tokens, outputs), float("nan"))
                    kernel.run(call.x, call.bias, call.residual, "gelu", out)
                    close(out, dense(weight, call, Epilogue("gelu", True)))

    def test_bytes_are_foretold(self, level: str, family: str) -> None:
        target, weight = self.target(level, family), self.weight(family, 200, 300)
        found = candidate(family)
        foretold = target.packed_bytes(found, WeightFacts.of(weight))
        taken = target.prepare(found, weight).nbytes
        if family.startswith("panel"):
            assert foretold == taken
        elif family == "rows":
            assert taken <= foretold <= 1.25 * taken
        else:
            assert foretold == pytest.approx(taken, rel=0.05)


@needs_x86
class TestCalls:
    """What all kernels have in common."""

    @pytest.mark.parametrize("epilogue", EPILOGUES, ids=epilogue_name)
    def test_every_epilogue_without_a_bias(self, epilogue: Epilogue) -> None:
        weight, call = random_weight(24, 32), Inputs.random(3, 24, 32)
        kernel = get_target(None).prepare(candidate("gather"), weight)
        out = torch.empty(3, 24)
        kernel.run(call.x, None, call.residual if epilogue.residual else None, epilogue.activation, out)
        expected = dense(weight, Inputs(call.x, torch.zeros(24), call.residual), epilogue)
        close(out, expected)

    def test_remembered_calls_are_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kernels, "_MAX_CALLS", 2)
        weight = random_weight(24, 32)
        kernel = get_target(None).prepare(candidate("gather"), weight)
        for tokens in (1, 2, 3, 4, 1, 2):
            call, out = Inputs.random(tokens, 24, 32), torch.empty(tokens, 24)
            kernel.run(call.x, call.bias, None, "none", out)
            close(out, dense(weight, call, Epilogue()))
            assert len(kernel._calls) <= 2

    def test_build_makes_ready(self, monkeypatch: pytest.MonkeyPatch) -> None:
        kernel = get_target(None).prepare(candidate("rows"), random_weight(24, 32))
        assert kernel.source == ""
        kernel.build(7, "relu", False)
        assert "rows:" in kernel.source
        monkeypatch.setattr(kernels, "function_of", lambda source: pytest.fail("it was built again"))
        kernel.run(torch.randn(7, 32), None, None, "relu", torch.empty(7, 24))
        kernel.build(0, "relu", False)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("family", ["rows", "gather", "panel8"])
    def test_weights_stored_in_narrow_types(self, family: str, dtype: torch.dtype) -> None:
        weight = panel_weight(24, 32, 8).to(dtype)
        kernel = get_target(None).prepare(candidate(family), weight)
        call, out = Inputs.random(4, 24, 32), torch.empty(4, 24)
        kernel.run(call.x, call.bias, None, "none", out)
        close(out, dense(weight.float(), call, Epilogue()))

    def test_negative_zeros_are_not_packed(self) -> None:
        weight = panel_weight(64, 96, 32)
        signed = torch.where(weight == 0, -torch.zeros(()), weight)
        for family in ("rows", "gather", "panel32"):
            target = get_target(None)
            assert target.prepare(candidate(family), signed).nbytes == target.prepare(candidate(family), weight).nbytes

    @pytest.mark.parametrize("family", ["rows", "gather", "panel8", "panel32"])
    def test_a_weight_that_is_a_view(self, family: str) -> None:
        weight = random_weight(32, 24).t()
        kernel = get_target(None).prepare(candidate(family), weight)
        call, out = Inputs.random(4, 24, 32), torch.empty(4, 24)
        kernel.run(call.x, call.bias, None, "none", out)
        close(out, dense(weight, call, Epilogue()))


class TestErrors:
    @pytest.mark.parametrize("found", [candidate("rows", "2:4"), candidate("panel32", "32:2:4")], ids=str)
    def test_a_weight_that_violates_the_pattern(self, found: Candidate) -> None:
        with pytest.raises(ValueError, match=r"the weight \(64, 96\) does not satisfy the pattern of (rows|panel)\["):
            X86Target("avx2").prepare(found, weight_of("unstructured@0.4"))

    def test_a_kernel_that_it_does_not_have(self) -> None:
        with pytest.raises(ValueError, match="target x86:avx2 has no kernel 'magic'"):
            X86Target("avx2").prepare(Candidate("magic", "unstructured"), weight_of("2:4"))
        with pytest.raises(ValueError, match="target x86:generic has no kernel 'mask'"):
            X86Target("generic").prepare(candidate("mask"), weight_of("2:4"))


class TestNames:
    def test_this_machine(self) -> None:
        target = get_target(None)
        assert target is get_target("x86")
        assert target.name == f"x86:{cpu.best_level()}"
        assert cpu.cpu_name() in target.description

    @pytest.mark.parametrize("level", cpu.LEVELS)
    def test_a_forced_level(self, level: str) -> None:
        if cpu.supported(level):
            assert get_target(f"x86:{level}").name == f"x86:{level}"
        else:
            with pytest.raises(ValueError, match=rf"target 'x86:{level}' needs a CPU with .*; this one runs 'x86:"):
                get_target(f"x86:{level}")

    @pytest.mark.parametrize(
        ("name", "near"), [("x86:avx-512", "x86:avx512"), ("X86", "x86"), ("x86:genric", "x86:generic")]
    )
    def test_an_unknown_name_gets_the_nearest(self, name: str, near: str) -> None:
        with pytest.raises(ValueError, match=rf"unknown target '{name}': did you mean '{near}'\?"):
            get_target(name)
