from __future__ import annotations

import importlib
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from fakes import FakeTarget
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import sparsecomp
from sparsecomp import Plan, explain
from sparsecomp.backend import compilations
from sparsecomp.runtime.failures import record_failure


class Block(nn.Module):
    def __init__(self, width: int = 32, hidden: int = 48) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + scale * self.down(nn.functional.gelu(self.up(x)))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layer:
            x = block(x)
        return x


class Broken(Encoder):
    def forward(self, x: Tensor) -> Tensor:
        x = self.layer[0](x)
        torch._dynamo.graph_break()
        return self.layer[1](x)


class BrokenLoop(Encoder):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.layer:
            x = block(x)
            torch._dynamo.graph_break()
        return x


NAMES = ["layer.0.up", "layer.0.down", "layer.1.up", "layer.1.down"]


def pruned(model: nn.Module, pattern: str = "unstructured@0.9") -> nn.Module:
    sparsecomp.sparsify_(model, pattern)
    return model.eval()


def test_a_line_for_every_layer() -> None:
    target = FakeTarget()
    with torch.no_grad():
        report = explain(pruned(Encoder()), torch.randn(2, 5, 32), options={"target": target})
    assert [choice.name for choice in report] == NAMES
    assert {choice.tokens for choice in report} == {10}
    assert {choice.shape for choice in report} == {(48, 32), (32, 48)}
    assert all(choice.reason.startswith("rows[unstructured]: predicted") for choice in report)
    assert report.graphs == 1
    assert report.notes == []
    assert target.prepared == []
    assert "fake target for tests" in str(report)


def test_layers_across_graph_breaks() -> None:
    report = explain(pruned(Broken()), torch.randn(2, 32), options={"target": FakeTarget()})
    assert [choice.name for choice in report] == NAMES
    assert report.graphs == 2
    # Dynamo leaves a loop that it cannot trace to Python and compiles the blocks alone, once for both.
    model = pruned(BrokenLoop())
    with torch.no_grad():
        model.layer[1].up.weight[:] = 1.0
    report = explain(model, torch.randn(2, 32), options={"target": FakeTarget()})
    assert [choice.name for choice in report] == ["up", "down"] * 2
    assert [choice.chosen.is_dense for choice in report] == [False, False, True, False]
    assert any("names of layers are relative" in note for note in report.notes)


def test_keyword_inputs_and_functions() -> None:
    model = pruned(Block())
    report = explain(lambda x, scale: model(x, scale), torch.randn(3, 32), scale=2.0, options={"target": FakeTarget()})
    assert [choice.name for choice in report] == ["up", "down"]
    report = explain(model, x=torch.randn(3, 32), scale=2.0, options={"target": FakeTarget()})
    assert [choice.name for choice in report] == ["up", "down"]


@pytest.mark.parametrize("model", [nn.Linear(32, 48), nn.Sequential(nn.Linear(32, 48), nn.ReLU())])
def test_modules_of_torch_itself(model: nn.Module) -> None:
    report = explain(pruned(model), torch.randn(3, 32), options={"target": FakeTarget()})
    assert len(report.rewritten) == 1


def test_gradients_are_noted() -> None:
    model, x = pruned(Block()), torch.randn(3, 32)
    report = explain(model, x, options={"target": FakeTarget()})
    assert len(report.rewritten) == 2
    assert "such a call runs dense, under Inductor" in report.notes[0]
    assert report.notes[0] in " ".join(str(report).split())
    assert torch.is_grad_enabled()
    model.requires_grad_(False)
    assert explain(model, x, options={"target": FakeTarget()}).notes == []
    with torch.inference_mode():
        assert explain(pruned(Block()), x, options={"target": FakeTarget()}).notes == []


def test_a_compiled_model_uses_its_options() -> None:
    model, x = pruned(Block()), torch.randn(3, 32)
    options: Any = {"target": FakeTarget(), "exclude": ["up"]}
    compiled = torch.compile(model, backend="sparse", options=options)
    with torch.no_grad():
        compiled(x)
        report = explain(compiled, x)
        assert [choice.name for choice in report.rewritten] == ["down"]
        assert [choice.chosen.is_dense for choice in explain(compiled, x, options={"target": FakeTarget()})] == [
            False,
            False,
        ]


def test_a_model_compiled_in_place_and_a_compiled_function() -> None:
    model, x = pruned(Block()), torch.randn(3, 32)
    options: Any = {"target": FakeTarget(), "exclude": ["up"]}
    function = torch.compile(lambda x: model(x), backend="sparse", options=options)
    assert [choice.name for choice in explain(function, x).rewritten] == ["down"]
    model.compile(backend="sparse", options=options)
    assert [choice.name for choice in explain(model, x).rewritten] == ["down"]


def test_a_model_compiled_by_another_backend() -> None:
    model, x = pruned(Block()), torch.randn(3, 32)
    report = explain(torch.compile(model, backend="eager"), x, options={"target": FakeTarget()})
    assert len(report.rewritten) == 2


def test_nothing_is_compiled_or_recompiled() -> None:
    model, x = pruned(Block()), torch.randn(3, 32)
    options: Any = {"target": FakeTarget()}
    compiled = torch.compile(model, backend="sparse", options=options)
    with torch.no_grad():
        compiled(x)
        before = len(compilations())
        for tokens in range(1, 20):
            report = explain(model, torch.randn(tokens, 32), options=options)
            assert [choice.tokens for choice in report] == [tokens, tokens]
            assert not any(choice.dynamic for choice in report)
        compiled(x)
    assert len(compilations()) == before


def test_random_numbers_and_results_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.5)).train()
    before = torch.random.get_rng_state()
    explain(model, torch.randn(3, 32, generator=torch.Generator().manual_seed(1)), options={"target": FakeTarget()})
    assert torch.equal(before, torch.random.get_rng_state())


def test_autotune_measures() -> None:
    target = FakeTarget()
    report = explain(pruned(Block()), torch.randn(3, 32), options={"target": target, "autotune": True})
    assert target.runs > 0
    assert all(choice.reason.count("measured") == 1 for choice in report)


def test_the_plan_can_be_given_back(tmp_path: Any) -> None:
    model, x = pruned(Block()), torch.randn(3, 32)
    report = explain(model, x, options={"target": FakeTarget()})
    path = tmp_path / "plan.json"
    report.plan.save(path)
    again = explain(model, x, options={"target": FakeTarget(us=1e9), "plan": path})
    assert len(again.rewritten) == 2
    assert "the plan says so" in again.plan.sites[0].reason
    assert Plan.load(path) == report.plan


def test_declined_sites_and_densities_are_shown() -> None:
    model = pruned(Block()).double()
    report = explain(model, torch.randn(3, 32).double(), options={"target": FakeTarget()})
    assert [choice.density < 0.2 for choice in report] == [True, True]
    assert all("float64" in choice.reason for choice in report)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = explain(pruned(Block()), torch.randn(3, 32), options={"target": FakeTarget()})
    assert any("autocast" in note for note in report.notes)


def test_a_model_without_sites() -> None:
    report = explain(nn.ReLU(), torch.randn(3), options={"target": FakeTarget()})
    assert len(report) == 0
    assert "no site was found" in str(report)


def test_where_dynamo_does_nothing() -> None:
    report = explain(torch.compiler.disable(pruned(Block())), torch.randn(3, 32), options={"target": FakeTarget()})
    assert len(report) == 0
    assert "Dynamo found no graph" in " ".join(report.notes)


def test_errors_are_the_users() -> None:
    with pytest.raises(ValueError, match="did you mean 'verify'"):
        explain(Block(), torch.randn(3, 32), options={"verifi": True})
    with pytest.raises(TypeError, match="expected a module or a function"):
        explain(3, torch.randn(3, 32))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="must have same reduction dim"):
        explain(Block().requires_grad_(False), torch.randn(3, 31), options={"target": FakeTarget()})


def test_a_kernel_that_failed_at_run_time_is_in_the_reason_of_its_layer() -> None:
    model = pruned(Encoder())
    record_failure(model.layer[0].up.weight, "7 tokens", RuntimeError("no memory"))
    reasons = {choice.name: choice.reason for choice in explain(model, torch.randn(64, 32))}
    assert reasons["layer.0.up"].endswith("ran dense at 7 tokens, where its kernel failed with RuntimeError: no memory")
    assert "ran dense" not in reasons["layer.0.down"]


def test_an_analysis_that_fails_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr("sparsecomp.analysis.build", fail)
    report = explain(pruned(Block()), torch.randn(3, 32), options={"target": FakeTarget()})
    assert any("failed with KeyError: 'surprise'" in note for note in report.notes)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_importing_the_package_is_light() -> None:
    code = "import sys, sparsecomp; assert 'torch' not in sys.modules and 'tvm' not in sys.modules; dir(sparsecomp)"
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_public_names() -> None:
    for name in sparsecomp.__all__:
        assert getattr(sparsecomp, name) is not None
    importlib.import_module("sparsecomp.dryrun")
    assert callable(sparsecomp.explain)
    with pytest.raises(AttributeError, match="no attribute 'expalin'"):
        sparsecomp.expalin  # type: ignore[attr-defined]  # noqa: B018


LOGGING = """
import torch
from torch import nn
from sparsecomp import log
log.log.debug("a debug line"); log.log.info("an info line"); log.log.error("an error line")
import sparsecomp
sparsecomp.sparsify_(nn.Linear(4, 4), "2:4")
print("backend" in dir(sparsecomp), len(sparsecomp.patterns.detect(torch.eye(8))) > 0)
import sparsecomp.backend
"""


@pytest.mark.parametrize(
    ("setting", "lines"),
    [
        ("+sparsecomp", {"debug", "info", "error"}),
        ("sparsecomp", {"info", "error"}),
        ("-sparsecomp", {"error"}),
        ("sparsecomp,dynamo", {"info", "error"}),
        ("dynamo", {"error"}),
    ],
)
def test_torch_logs(setting: str, lines: set[str]) -> None:
    result = run(LOGGING, TORCH_LOGS=setting)
    assert result.returncode == 0, result.stderr
    for line in ("debug", "info", "error"):
        assert (f"{line} line" in result.stderr) is (line in lines), result.stderr


def test_set_logs() -> None:
    code = """
import logging, torch, sparsecomp.log
torch._logging.set_logs(modules={"sparsecomp": logging.DEBUG})
sparsecomp.log.log.debug("a debug line")
"""
    environment = {key: value for key, value in os.environ.items() if key != "TORCH_LOGS"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "a debug line" in result.stderr, result.stderr


class TestElsewhere:
    """Targets that are not here, and models without values."""

    def test_another_machine_prices_the_same_zeros(self) -> None:
        model = pruned(Encoder())
        with torch.no_grad():
            here, there = (
                explain(model, torch.randn(64, 32)),
                explain(model, torch.randn(64, 32), target="arm:apple-m1"),
            )
        assert there.plan.target == "arm:apple-m1"
        assert [c.name for c in there] == NAMES
        assert [c.density for c in there] == [c.density for c in here]
        assert [c.dense_us for c in there] != [c.dense_us for c in here]

    def test_the_target_goes_before_that_of_the_options(self) -> None:
        with torch.no_grad():
            report = explain(Encoder(), torch.randn(4, 32), options={"target": "x86"}, target="arm:cortex-a53")
        assert report.plan.target == "arm:cortex-a53"

    @pytest.mark.parametrize("target", [None, "arm:cortex-a76"])
    @pytest.mark.parametrize("fake", [False, True])
    def test_weights_without_values_have_unknown_zeros(self, target: str | None, fake: bool) -> None:
        with FakeTensorMode() if fake else torch.device("meta"):
            model, x = Encoder(), torch.empty(64, 32)
        with torch.no_grad():
            report = explain(model, x, target=target)
        assert [c.name for c in report] == NAMES
        for choice in report:
            assert choice.chosen.is_dense
            assert "its zeros are not known" in choice.reason
            assert choice.dense_us
        assert " ? " in str(report)

    def test_a_pattern_may_be_assumed(self) -> None:
        with torch.device("meta"):
            model, x = Encoder(), torch.empty(64, 32)
        with torch.no_grad():
            report = explain(model, x, target="arm:cortex-a76", assume="unstructured@0.9")
        assert all(c.chosen.kernel == "rows" and c.density == pytest.approx(0.1, abs=0.01) for c in report)
        assert all(c.reason.endswith("assuming unstructured@0.9") for c in report)

    def test_types_that_a_target_does_not_price_stay_dense(self) -> None:
        with torch.device("meta"), torch.no_grad():
            report = explain(Encoder().half(), torch.empty(4, 32).half(), target="arm:cortex-a76")
        assert all("computes in float16" in c.reason and c.declined for c in report)

    def test_what_is_not_here_is_neither_run_nor_measured(self) -> None:
        with pytest.raises(ValueError, match="arm:apple-m1 cannot run here"), torch.no_grad():
            torch.compile(Encoder(), backend="sparse", options={"target": "arm:apple-m1"})(torch.randn(4, 32))
        with pytest.raises(ValueError, match="cannot be measured here"):
            explain(Encoder(), torch.randn(4, 32), target="arm:apple-m1", options={"autotune": True})

    def test_compiling_on_the_meta_device_stays_dense(self) -> None:
        with torch.device("meta"):
            model, x = Encoder(), torch.empty(4, 32)
        with torch.no_grad():
            torch.compile(model, backend="sparse")(x)
        assert all("is on meta" in choice.reason for choice in compilations()[-1].plan)
