"""Dense ONNX models are pruned under a budget, or to a plan, and then optimised."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_cases as cases
import pytest
import torch
from onnx import helper, numpy_helper
from typer.testing import CliRunner

import sparsecomp
import sparsecomp.onnx
from sparsecomp.cli import app
from sparsecomp.frontends.onnx import build
from sparsecomp.frontends.onnx_load import load
from sparsecomp.frontends.onnx_module import OnnxModule, why_not
from sparsecomp.frontends.onnx_shapes import infer
from sparsecomp.onnx_planning import read_calibration
from sparsecomp.passes import DetectConv, DetectLinear, FuseEpilogue, run_passes
from sparsecomp.pruning.sites import choose_sites
from sparsecomp.pruning.statistics import balanced, collect

RANDOM = np.random.default_rng(3)
WIDTH, TOKENS = 256, 64


def _array(*shape: int) -> Any:
    return (RANDOM.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)


def _mlp() -> onnx.ModelProto:
    nodes = [
        helper.make_node("MatMul", ["x", "up.weight"], ["a"]),
        helper.make_node("Add", ["a", "up.bias"], ["b"]),
        helper.make_node("Relu", ["b"], ["h"]),
        helper.make_node("Gemm", ["h", "down.weight"], ["c"], transB=1),
        helper.make_node("Add", ["c", "x"], ["y"]),
    ]
    constants = {
        "up.weight": _array(WIDTH, 2 * WIDTH),
        "up.bias": _array(2 * WIDTH),
        "down.weight": _array(WIDTH, 2 * WIDTH),
    }
    return cases.model_of(nodes, {"x": ["n", WIDTH]}, constants)


def _conv() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Conv", ["x", "first.weight", "bias"], ["a"], pads=[0, 0, 1, 1], group=2),
        helper.make_node("Relu", ["a"], ["h"]),
        helper.make_node("Conv", ["h", "second.weight"], ["y"]),
    ]
    constants = {"first.weight": _array(16, 4, 2, 2), "bias": _array(16), "second.weight": _array(8, 16, 1, 1)}
    return cases.model_of(nodes, {"x": ["n", 8, 9, 7]}, constants)


def _module(model: onnx.ModelProto) -> OnnxModule:
    loaded = load(model)
    found = []
    for overlay in build(loaded, infer(loaded)):
        run_passes(overlay.graph, [DetectLinear(), DetectConv(), FuseEpilogue()])
        found += [(overlay, site) for site in overlay.graph.sites]
    return OnnxModule(loaded, found)


def _zeros(path: Path) -> dict[str, float]:
    """Share of zeros of the dense weights as the file without the library computes them: those of its plan."""
    plan = {item.key: item.value for item in onnx.load(path).metadata_props}[sparsecomp.onnx.PLAN_KEY]
    return {choice.name: 1 - choice.density for choice in sparsecomp.Plan.from_json(plan)}


def _loss(model: onnx.ModelProto, output: Path, x: Any) -> float:
    a, b = cases.session(model).run(None, {"x": x})[0], cases.session(output).run(None, {"x": x})[0]
    cosines = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    return float(1 - cosines.mean())


# -- the model as a module ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [_mlp, _conv])
def test_a_module_computes_what_the_model_does(make: Any) -> None:
    model = make()
    module = _module(model)
    sites = choose_sites(module, None)
    assert len(sites) == 2
    x = RANDOM.standard_normal((5, WIDTH) if make is _mlp else (2, 8, 9, 7)).astype(np.float32)
    expected = cases.session(model).run(None, {"x": x})[0]
    cases.close(module(x=torch.from_numpy(x))["y"].numpy(), expected)
    # A copy has weights of its own; a change in place is seen at the next call.
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for site in choose_sites(twin, None):
            site.weight.zero_()
    bias = numpy_helper.to_array(model.graph.initializer[-2 if make is _mlp else 1])
    gone = twin(x=torch.from_numpy(x))["y"].numpy()
    cases.close(gone, x if make is _mlp else np.zeros_like(expected) + 0 * bias.sum())
    cases.close(module(x=torch.from_numpy(x))["y"].numpy(), expected)


def test_layers_show_what_goes_into_them() -> None:
    model = _mlp()
    module = _module(model)
    sites = choose_sites(module, None)
    x = RANDOM.standard_normal((7, WIDTH)).astype(np.float32)
    calls = sparsecomp.pruning.calibration.as_calls([{"x": torch.from_numpy(x)}])
    found = collect(module, calls, sites, gram=True)
    weights = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    h = np.maximum(x @ weights["up.weight"] + weights["up.bias"], 0)
    for site, rows in zip(sites, (x, h), strict=True):
        gram = found[id(site.weight)].gram
        assert gram is not None
        seen = balanced(torch.from_numpy(rows)).numpy()
        cases.close(gram.numpy(), seen.T @ seen, 1e-4)


def test_weights_that_cannot_be_pruned_say_why() -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "w"], ["y"])]
    model = load(cases.model_of(nodes, {"x": ["n", 8]}, {"w": _array(8, 8)}))
    (overlay,) = build(model, infer(model))
    run_passes(overlay.graph, [DetectLinear()])
    assert [why_not(model, overlay, site) for site in overlay.graph.sites] == ["its weight is used elsewhere too"] * 2


# -- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["sparsegpt", "wanda", "magnitude"])
def test_a_quality_budget_is_kept(criterion: str, tmp_path: Path) -> None:
    model, samples = _mlp(), RANDOM.standard_normal((16 * TOKENS, WIDTH)).astype(np.float32)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = TOKENS
    output = tmp_path / "m.onnx"
    report = sparsecomp.onnx.optimize(
        model, output, max_quality_loss=0.1, calibration={"x": samples}, criterion=criterion
    )
    plan = report.plan
    assert plan.budget is not None
    assert plan.summary is not None
    assert plan.summary.measured_loss is not None
    assert 0 < plan.summary.measured_loss <= 0.1
    assert any(choice.prune for choice in plan)
    assert {choice.name for choice in report.rewritten} == {choice.name for choice in plan if choice.prune}
    assert 0 < _loss(model, output, samples[:TOKENS]) <= 0.15
    x = samples[-TOKENS:]
    library = sparsecomp.onnx.library_of(output)
    cases.close(
        cases.session(output, library).run(None, {"x": x})[0], cases.session(output).run(None, {"x": x})[0], 1e-4
    )


def test_a_plan_is_followed(tmp_path: Path) -> None:
    model = _mlp()
    plan = sparsecomp.onnx.inspect(model, shapes={"x": [TOKENS, WIDTH]}).plan
    document = plan.to_dict()
    for site, prune in zip(document["sites"], ("unstructured@0.8", ""), strict=True):
        site["prune"] = prune
        site["tokens"] = 1
    (tmp_path / "plan.json").write_text(sparsecomp.Plan.from_json(json.dumps(document)).to_json())
    sparsecomp.onnx.optimize(
        model, tmp_path / "m.onnx", options={"plan": tmp_path / "plan.json"}, shapes={"x": [TOKENS, WIDTH]}
    )
    shares = _zeros(tmp_path / "m.onnx")
    assert shares["up"] == pytest.approx(0.8, abs=1e-4)
    assert shares["down"] == 0
    # By magnitude, since there is no calibration: what is left is as it was.
    weight = numpy_helper.to_array(model.graph.initializer[0])
    mask = sparsecomp.Pattern.parse("unstructured@0.8").mask(torch.from_numpy(np.abs(weight.T)))
    kept = np.where(mask.numpy().T, weight, np.float32(0))
    pruned = onnx.ModelProto()
    pruned.CopyFrom(model)
    pruned.graph.initializer[0].CopyFrom(numpy_helper.from_array(kept, "up.weight"))
    x = RANDOM.standard_normal((TOKENS, WIDTH)).astype(np.float32)
    cases.close(
        cases.session(tmp_path / "m.onnx").run(None, {"x": x})[0], cases.session(pruned).run(None, {"x": x})[0], 1e-3
    )


def test_the_command(tmp_path: Path) -> None:
    model = _mlp()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = TOKENS
    onnx.save(model, tmp_path / "m.onnx")
    np.savez(tmp_path / "data.npz", x=RANDOM.standard_normal((4 * TOKENS, WIDTH)).astype(np.float32))
    arguments = ["optimize", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "o.onnx"), "--max-quality-loss", "0.3"]
    runner = CliRunner()
    result = runner.invoke(app, arguments)
    assert result.exit_code == 1
    assert "needs calibration" in result.stderr
    result = runner.invoke(app, [*arguments, "--calibration", str(tmp_path / "data.npz")])
    assert result.exit_code == 0, result.output
    assert "loss of at most 0.3" in result.stdout
    assert max(_zeros(tmp_path / "o.onnx").values()) > 0.4
    result = runner.invoke(app, [*arguments[:-2], "--speedup", "50", "--calibration", str(tmp_path / "data.npz")])
    assert result.exit_code == 1
    assert "cannot be reached" in result.stderr


def _weights(path: Path) -> dict[str, torch.Tensor]:
    model = onnx.load(path)
    return {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in model.graph.initializer}


def test_a_pattern_is_pruned_to_and_the_operations_stay(tmp_path: Path) -> None:
    model, samples = _mlp(), RANDOM.standard_normal((4 * TOKENS, WIDTH)).astype(np.float32)
    names = sparsecomp.onnx.prune(model, tmp_path / "m.onnx", "2:4", calibration={"x": samples}, exclude=["^down"])
    assert names == ["up"]
    weights = _weights(tmp_path / "m.onnx")
    assert sparsecomp.Pattern.parse("2:4").check(weights["up.weight"].t())
    dense = numpy_helper.to_array(model.graph.initializer[2])
    np.testing.assert_array_equal(weights["down.weight"].numpy(), dense)
    assert [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node] == [n.op_type for n in model.graph.node]
    assert 0 < _loss(model, tmp_path / "m.onnx", samples[:TOKENS]) < 0.1


@pytest.mark.parametrize(
    ("pattern", "options", "message"),
    [
        ("2:4", {"criterion": "wanda"}, "criterion='wanda' needs calibration"),
        ("2:4", {"exclude": ["up", "down"]}, "filter_fn rejected every module"),
        ("16:taps:4:9", {}, "for convolutions whose kernels have 9 taps; module 'up'"),
        ("unstructured", {}, "does not say how much"),
        ("2:4", {"criterion": "wanda", "calibration": {"x": np.full((2, WIDTH), np.nan, np.float32)}}, "NaN"),
    ],
)
def test_what_cannot_be_pruned_is_told_and_nothing_is_written(
    pattern: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        sparsecomp.onnx.prune(_mlp(), tmp_path / "m.onnx", pattern, **options)
    assert not [*tmp_path.iterdir()]


def test_a_model_without_layers_to_prune_says_why(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["a"]), helper.make_node("MatMul", ["a", "w"], ["y"])]
    shared = cases.model_of(nodes, {"x": [2, 8]}, {"w": _array(8, 8)})
    with pytest.raises(ValueError, match=r"no layer that can be pruned.* its weight is used elsewhere too"):
        sparsecomp.onnx.prune(shared, tmp_path / "m.onnx", "2:4")
    empty = cases.model_of([helper.make_node("Relu", ["x"], ["y"])], {"x": [2, 8]}, {})
    with pytest.raises(ValueError, match=r"no layer that can be pruned$"):
        sparsecomp.onnx.prune(empty, tmp_path / "m.onnx", "2:4")


def test_the_commands_plan_and_prune(tmp_path: Path) -> None:
    model = _mlp()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = TOKENS
    onnx.save(model, tmp_path / "m.onnx")
    np.savez(tmp_path / "data.npz", x=RANDOM.standard_normal((4 * TOKENS, WIDTH)).astype(np.float32))
    given, plan, runner = [str(tmp_path / "m.onnx")], str(tmp_path / "plan.json"), CliRunner()
    shared = ["--calibration", str(tmp_path / "data.npz"), "--criterion", "wanda"]
    budget = ["--max-quality-loss", "0.3", "--pattern", "unstructured@0.7"]
    result = runner.invoke(app, ["plan", *given, *shared, *budget, "-o", plan])
    assert result.exit_code == 0, result.output
    wanted = {choice.name: choice.prune for choice in sparsecomp.Plan.load(plan)}
    assert "unstructured@0.7" in wanted.values()
    result = runner.invoke(app, ["prune", *given, "--plan", plan, *shared, "-o", str(tmp_path / "p.onnx")])
    assert result.exit_code == 0, result.output
    weights = _weights(tmp_path / "p.onnx")
    for name, prune in wanted.items():
        zeros = float((weights[f"{name}.weight"] == 0).float().mean())
        assert zeros == pytest.approx(0.7 if prune else 0, abs=0.01)
    again = runner.invoke(app, ["prune", *given, "2:4", "-o", str(tmp_path / "p.onnx")])
    assert again.exit_code == 1
    assert "exists already" in again.stderr
    for extra, message in ((["--reconstruct"], "for model folders"), (["--criterion", "ria"], "needs calibration")):
        result = runner.invoke(app, ["prune", *given, "2:4", *extra, "-o", str(tmp_path / "q.onnx")])
        assert result.exit_code == 1
        assert message in result.stderr
    assert not (tmp_path / "q.onnx").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"y": np.ones((2, 3))}, "holds 'y', but the model's inputs are 'x'"),
        ({"x": np.ones((2, 3, 1))}, r"shape \[2, 3, 1\], expected \['samples', 3\]"),
        ({"x": np.ones((2, 4))}, r"shape \[2, 4\]"),
        ({"x": np.ones(())}, r"shape \[\]"),
        ({"x": np.ones((1, 3))}, "takes .2. samples at once, and the calibration holds 1"),
    ],
)
def test_calibration_that_does_not_fit_is_told(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_calibration(given, {"x": [2, 3]})


def test_calibration_files_are_not_trusted(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not a file"):
        read_calibration(tmp_path / "none.npz", {"x": [None, 3]})
    np.savez(tmp_path / "object.npz", x=np.array([{}], dtype=object))
    (tmp_path / "text.npz").write_text("no arrays")
    for name in ("object", "text"):
        with pytest.raises(ValueError, match=r"is no \.npz file"):
            read_calibration(tmp_path / f"{name}.npz", {"x": [None, 3]})
    batches = read_calibration({"x": np.arange(15).reshape(5, 3)}, {"x": [2, 3]})
    assert [batch["x"].tolist() for batch in batches] == [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]]]
