"""The ARM target: its CPUs, candidates, predictions, and what boards measured."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
from pathlib import Path

import arm_tools
import numpy as np
import onnx_cases
import pytest
import torch

import sparsecomp
from sparsecomp.patterns import Pattern
from sparsecomp.targets.arm import calibration, cost, mca
from sparsecomp.targets.arm.cpu import _facts, cpu, cpu_names
from sparsecomp.targets.arm.target import ArmTarget
from sparsecomp.targets.base import DENSE, Candidate, Problem, WeightFacts
from sparsecomp.window import Maps, Window

ROWS = Candidate("rows", "unstructured")


def facts(pattern: str, outputs: int = 384, inputs: int = 256) -> WeightFacts:
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0))
    return WeightFacts.of(Pattern.parse(pattern).project(weight))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPARSECOMP_CACHE_DIR", str(tmp_path))
    return tmp_path


def test_an_unknown_cpu_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"did you mean 'cortex-a7.'.*cortex-a53.*neoverse-v1.*apple-m1"):
        cpu("cortex-a67")


@pytest.mark.parametrize("name", cpu_names())
def test_every_fact_has_a_source_or_says_that_none_was_seen(name: str) -> None:
    facts = _facts()[name]
    assert facts["sources"]
    assert set(facts["unverified"]) <= set(facts)
    text = " ".join(facts["sources"])
    for words, fields in (("cache", ("l1", "l2", "l3")), ("clock", ("ghz",)), ("fmla|pipes", ("fmla", "loads"))):
        assert re.search(words, text) or set(fields) & set(facts["unverified"]), words
    assert 0 < facts["l1"] < facts["l2"] < (facts["l3"] or facts["l2"] + 1)


def test_an_l3_cache_keeps_weights_from_memory() -> None:
    a76 = cpu("cortex-a76")
    slow = dataclasses.replace(a76, bandwidth=a76.bandwidth / 1000)
    within, beyond = facts("unstructured@0.9", 384, 384), facts("unstructured@0.5", 2048, 1024)
    assert cost.predict_us(slow, ROWS, Problem(within, 64, 1)) == cost.predict_us(a76, ROWS, Problem(within, 64, 1))
    assert cost.predict_us(slow, ROWS, Problem(beyond, 64, 1)) > cost.predict_us(a76, ROWS, Problem(beyond, 64, 1))


def test_inner_loops_keep_the_multipliers_of_neoverse_n1_busy() -> None:
    n1 = cpu("neoverse-n1")
    assert cost.fmla_share(n1, "panel_16_4") >= 0.80
    assert cost.fmla_share(n1, "panel_8_8") >= 0.80
    assert cost.fmla_share(n1, "rows_4.shared") >= 0.70
    assert cost.fmla_share(n1, "rows_4.own") >= 0.70


@pytest.mark.arm
def test_the_table_of_cycles_is_what_llvm_mca_says_now() -> None:
    try:
        mca.find_llvm_mca()
    except mca.MissingToolError as error:
        pytest.skip(str(error))
    from sparsecomp.kernels import panel, tir
    from sparsecomp.kernels.epilogue import Epilogue
    from sparsecomp.targets.arm.kernels import panel_schedule

    n1 = cpu("neoverse-n1")
    assembly = tir.compile_object(panel.build(panel_schedule(16, 4), Epilogue()), "panel", n1.level.tvm_target)[1]
    body = next(body for body in mca.inner_loops(assembly) if mca.multiply_adds(body))
    measured = mca.measure(body, n1.mca)
    assert measured.fmla == 16
    assert measured.cycles == pytest.approx(cost.loop_cycles(n1, "panel_16_4"), rel=0.1)


@pytest.mark.parametrize("name", cpu_names())
def test_a_sparse_convolution_has_to_beat_the_dense_one_of_the_same_kernel(name: str) -> None:
    target, window, maps = ArmTarget(cpu(name)), Window((1, 1)), Maps(1, 14, 14)
    nearly, few = facts("unstructured@0.05", 96, 96), facts("unstructured@0.8", 96, 96)
    sparse, dense = (
        [target.predict(c, Problem(f, 196, 1, window=window, maps=maps)) for f in (nearly, few)]
        for c in (Candidate("conv", "unstructured"), DENSE)
    )
    assert dense[0] == dense[1]
    assert sparse[0] > dense[0] > sparse[1]
    assert target.family(DENSE, Problem(few, 196, 1, window=window, maps=maps)) == "dense_conv"


@pytest.mark.parametrize("name", cpu_names())
def test_few_zeros_are_not_worth_a_sparse_kernel(name: str) -> None:
    target, problem = ArmTarget(cpu(name)), Problem(facts("unstructured@0.15", 1536, 384), 64, 1)
    assert target.predict(ROWS, problem) > target.predict(DENSE, problem)


@pytest.mark.parametrize("name", cpu_names())
def test_fewer_entries_never_take_longer(name: str) -> None:
    target = ArmTarget(cpu(name))
    times = [target.predict(ROWS, Problem(facts(f"unstructured@{share}"), 64, 1)) for share in (0.5, 0.7, 0.8, 0.9)]
    assert times == sorted(times, reverse=True)
    assert times[-1] < target.predict(DENSE, Problem(facts("unstructured@0.9"), 64, 1))


def test_candidates_follow_the_patterns_of_a_weight() -> None:
    target = ArmTarget(cpu("cortex-a76"))
    assert target.candidates(WeightFacts.of(torch.ones(8, 8))) == [DENSE]
    found = target.candidates(facts("8:2:4"))
    assert {(c.kernel, dict(c.params).get("v")) for c in found} == {
        ("dense", None),
        ("rows", None),
        ("panel", 4),
        ("panel", 8),
    }
    # Under `unstructured` any kernel may take it: shared columns are a fact of the zeros, not a promise.
    named = target.candidates(facts("8:2:4"), allowed=["unstructured"])
    assert {c.kernel for c in named} == {"dense", "rows", "panel"}
    assert {c.pattern for c in named if not c.is_dense} == {"unstructured"}
    assert target.candidates(facts("unstructured@0.5")) == [DENSE, ROWS]


def test_kernels_of_a_board_do_not_run_here() -> None:
    with pytest.raises(ValueError, match="export the model"):
        ArmTarget(cpu("cortex-a53")).prepare(ROWS, torch.ones(4, 4))


class TestCalibration:
    def step(self, family: str = "rows", us: float = 15.0) -> dict[str, object]:
        return {"name": "a", "kernel": family, "predicted_us": 10.0, "us": us}

    def results(self, folder: Path, **changes: object) -> Path:
        steps = [self.step()]
        document = {"format": calibration.RESULTS, "version": 1, "cpu": "cortex-a76", "threads": 1, "steps": steps}
        path = folder / "results.json"
        path.write_text(json.dumps(document | changes))
        return path

    def test_a_board_scales_the_family_that_it_measured(self, tmp_path: Path) -> None:
        problem = Problem(facts("unstructured@0.7"), 64, 1)
        before = ArmTarget(cpu("cortex-a76"))
        for _ in range(2):  # twice the same results change nothing more
            assert calibration.calibrate_from(self.results(tmp_path)) == {"rows": (1.5, 1)}
        after, other = ArmTarget(cpu("cortex-a76")), ArmTarget(cpu("cortex-a53"))
        counted = before.predict(ROWS, problem) / before.scale("rows")
        assert after.predict(ROWS, problem) == pytest.approx(1.5 * counted)
        assert "measured" in after.description
        assert other.scale("rows") == before.scale("rows") > 1.0

    def test_a_slow_board_is_slow_for_what_it_did_not_measure(self, tmp_path: Path) -> None:
        problem = Problem(facts("8:2:4"), 64, 1)
        before = ArmTarget(cpu("cortex-a76"))
        candidates = before.candidates(problem.facts)
        calibration.calibrate_from(self.results(tmp_path, steps=[self.step(family="rows", us=120.0)]))
        after = ArmTarget(cpu("cortex-a76"))
        ratios = [after.predict(c, problem) / before.predict(c, problem) for c in candidates]
        assert ratios == pytest.approx([12 / 1.25] * len(candidates))
        calibration.calibrate_from(self.results(tmp_path, steps=[self.step(family="dense", us=30.0)]))
        both = ArmTarget(cpu("cortex-a76"))
        assert (both.scale("rows"), both.scale("dense")) == (12.0, 3.0)
        assert both.scale("depthwise") == pytest.approx((12 / 1.25 + 3) / 2)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"format": "other"}, "no file of results"),
            ({"cpu": "z80"}, "unknown ARM CPU 'z80'"),
            ({"steps": 3}, "steps must be a list"),
            ({"steps": []}, "no measured calls"),
            ({"steps": [{"kernel": "rows", "us": "fast", "predicted_us": 1}]}, "us of step 0 must be a number"),
        ],
    )
    def test_results_that_are_none_say_so(self, tmp_path: Path, changes: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            calibration.calibrate_from(self.results(tmp_path, **changes))

    def test_a_damaged_calibration_counts_as_none(self, tmp_path: Path) -> None:
        (tmp_path / "arm-cortex-a76.json").write_text("{")
        assert "cannot be read" in ArmTarget(cpu("cortex-a76")).description

    @pytest.mark.arm
    def test_what_a_package_writes_is_read(self, tmp_path: Path) -> None:
        emulator, compiler = arm_tools.emulator(), arm_tools.cross_compiler()
        dense, scales = torch.randn(96, 64), {}
        for weight in (Pattern.parse("unstructured@0.8").project(dense), dense):
            model = onnx_cases.linear_model(weight.t().contiguous().numpy(), np.zeros(96, np.float32))
            folder = tmp_path / f"package_{len(scales)}"
            sparsecomp.export(model, output=folder, cpu_name="cortex-a53", shapes={"x": [16, 64]})
            program, inputs = arm_tools.build(folder, compiler), folder / "input.bin"
            inputs.write_bytes(bytes(16 * 64 * 4))
            command = [emulator, str(program), str(folder / "weights.bin"), str(inputs), "--results", "results.json"]
            subprocess.run(command, cwd=folder, check=True, timeout=300, stdout=subprocess.DEVNULL)
            scales |= calibration.calibrate_from(folder / "results.json")
        assert set(scales) == {"rows", "dense"}
        after = ArmTarget(cpu("cortex-a53"))
        assert {family: after.scale(family) for family in scales} == {
            name: scale for name, (scale, _) in scales.items()
        }
