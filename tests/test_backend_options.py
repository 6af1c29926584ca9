from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fakes import Block, FakeTarget, compile_model, pruned, same
from torch import nn

from sparsecomp import Plan, backend
from sparsecomp.backend import Compilation, compilations
from sparsecomp.options import Options


def last() -> Compilation:
    return compilations()[-1]


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.usefixtures("no_grad")
class TestOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"verifi": True}, "did you mean 'verify'"),
            ({"target": "x68"}, "did you mean 'x86'"),
            ({"plan": "/nowhere/plan.json"}, "does not exist"),
        ],
    )
    def test_bad_options_are_value_errors(self, options: dict[str, Any], message: str) -> None:
        compiled = torch.compile(pruned(Block()), backend="sparse", options=options)
        with pytest.raises(ValueError, match=message):
            compiled(torch.randn(4, 32))

    def test_an_unknown_mode_is_a_value_error(self) -> None:
        compiled = torch.compile(pruned(Block()), backend="sparse", mode="max-autotun")
        with pytest.raises(ValueError, match="did you mean 'max-autotune'"):
            compiled(torch.randn(4, 32))

    def test_autotune_measures_once_for_layers_alike(self) -> None:
        model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(3)))
        pruned(model, "unstructured@0.75")
        target = FakeTarget()
        x = torch.randn(4, 32)
        same(compile_model(model, target, autotune=True)(x), model(x))
        choices = last().plan.sites
        assert all(item.measured_us is not None for choice in choices for item in choice.predictions)
        assert len({choice.dense_us for choice in choices}) == 1

    def test_verify_accepts_what_is_right(self) -> None:
        model = pruned(Block())
        x = torch.randn(4, 32)
        same(compile_model(model, verify=True)(x), model(x))
        assert last().rewritten == ["up", "down"]

    def test_verify_refuses_what_is_wrong(self, caplog: pytest.LogCaptureFixture) -> None:
        model = pruned(Block())
        x = torch.randn(4, 32)
        with caplog.at_level(logging.ERROR, logger="sparsecomp"):
            same(compile_model(model, FakeTarget(error=0.01), verify=True)(x), model(x))
        assert last().rewritten == []
        assert "verify: rows[unstructured] differs from dense" in last().plan.sites[0].reason
        assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]

    def test_verify_with_infinities_in_a_weight(self) -> None:
        model = pruned(Block())
        model.up.weight[0, 0] = float("inf")
        compile_model(model, verify=True)(torch.randn(4, 32))


@pytest.mark.usefixtures("no_grad")
class TestFailures:
    """A mistake of ours must not break a model that Inductor compiles."""

    def check(self, caplog: pytest.LogCaptureFixture, reason: str, target: FakeTarget | None = None) -> None:
        model = pruned(Block())
        x = torch.randn(4, 32)
        with caplog.at_level(logging.WARNING, logger="sparsecomp"):
            same(compile_model(model, target)(x), model(x))
        assert last().rewritten == []
        texts = [*last().reasons, *(choice.reason for choice in last().plan)]
        assert any(reason in text for text in texts), texts
        assert any(record.exc_info for record in caplog.records)

    def test_of_the_front_end(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        def fail(*_: Any) -> None:
            raise KeyError("surprise")

        monkeypatch.setattr("sparsecomp.analysis.build", fail)
        self.check(caplog, "the analysis failed with KeyError: 'surprise'")

    def test_of_a_weight(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        def fail(*_: Any) -> None:
            raise RuntimeError("surprise")

        monkeypatch.setattr("sparsecomp.analysis.choose", fail)
        monkeypatch.setattr("sparsecomp.analysis.SiteChooser.choice", fail)
        self.check(caplog, "its analysis failed with RuntimeError: surprise")

    def test_of_a_kernel(self, caplog: pytest.LogCaptureFixture) -> None:
        target = FakeTarget()
        target.fail = True
        self.check(caplog, "failed with RuntimeError: no such kernel today", target)

    def test_halfway_through_the_rewrite(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        apply = backend.apply

        def fail(gm: torch.fx.GraphModule, replacements: Any) -> None:
            apply(gm, replacements[:1])
            raise RuntimeError("surprise")

        monkeypatch.setattr(backend, "apply", fail)
        self.check(caplog, "the analysis failed with RuntimeError: surprise")

    def test_of_inductor_on_the_rewritten_graph(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        inductor, calls = backend._inductor, []

        def fail_once(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
            calls.append(gm)
            if len(calls) == 1:
                for node in list(gm.graph.nodes):
                    if node.op == "output":
                        gm.graph.erase_node(node)
                raise RuntimeError("surprise")
            return inductor(gm, example_inputs)

        monkeypatch.setattr(backend, "_inductor", fail_once)
        self.check(caplog, "Inductor did not compile the rewritten graph: RuntimeError: surprise")
        assert len(calls) == 2


@pytest.mark.usefixtures("no_grad")
class TestDebugging:
    @pytest.mark.parametrize(
        ("level", "files"),
        [
            ("0", set()),
            ("1", {"plan.json", "plan.txt"}),
            ("2", {"plan.json", "fx_before.py", "fx_after.py", "00_before_detect_linear.txt"}),
            ("3", {"plan.json", "fx_before.py", "code_up.txt", "code_down.txt"}),
        ],
    )
    def test_files(self, level: str, files: set[str], tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SPARSECOMP_DEBUG", level)
        monkeypatch.setenv("SPARSECOMP_DEBUG_DIR", str(tmp_path / "debug"))
        compile_model(pruned(Block()))(torch.randn(4, 32))
        written = {path.name for path in tmp_path.rglob("*.*")}
        assert files <= written
        assert ("fx_after.py" in written) is (level in "23")
        if level == "2":
            (after,) = tmp_path.rglob("fx_after.py")
            assert "sparsecomp.linear" in after.read_text()
        for path in tmp_path.rglob("plan.json"):
            assert Plan.load(path) == last().plan

    def test_a_folder_that_cannot_be_written(
        self, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("SPARSECOMP_DEBUG", "2")
        monkeypatch.setenv("SPARSECOMP_DEBUG_DIR", str(tmp_path / "file"))
        model = pruned(Block())
        x = torch.randn(4, 32)
        with caplog.at_level(logging.WARNING, logger="sparsecomp"):
            same(compile_model(model)(x), model(x))
        assert sum("cannot write" in record.message for record in caplog.records) == 1

    def test_a_level_that_is_none(
        self, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setenv("SPARSECOMP_DEBUG", "yes")
        monkeypatch.chdir(tmp_path)
        with caplog.at_level(logging.WARNING, logger="sparsecomp"):
            compile_model(pruned(Block()))(torch.randn(4, 32))
        assert "expected 0, 1 (plan)" in caplog.text
        assert list(tmp_path.iterdir()) == []


def test_hardware_without_a_target_runs_as_under_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Options, tensors: object = ()) -> None:
        raise ValueError("an old card has no sparse tensor cores")

    monkeypatch.setattr(Options, "resolve_target", refuse)
    model, x = torch.nn.Linear(8, 8), torch.randn(2, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="sparse")(x), model(x))
    assert compilations()[-1].reasons == ["no target for this hardware: an old card has no sparse tensor cores"]
    # Who names a target wants it.
    with pytest.raises(ValueError, match="an old card"), torch.no_grad():
        torch.compile(torch.nn.Linear(8, 8), backend="sparse", options={"target": "x86:generic"})(x)
