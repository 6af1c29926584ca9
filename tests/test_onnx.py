"""Optimising ONNX models: real ones, options, files, and what is no model at all."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_cases as cases
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from typer.testing import CliRunner

import sparsecomp
import sparsecomp.onnx
from sparsecomp.cli import app

W = cases.sparse_array(384, 384, density=0.1)
LARGE = cases.sparse_array(384, 1536, density=0.05)  # worth it at one token too, on every target and number of threads
X = np.random.default_rng(5).standard_normal((128, 384)).astype(np.float32)
runner = CliRunner()


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(cases.linear_model(LARGE, np.ones(1536, np.float32)), path)
    return path


# -- real models --------------------------------------------------------------------------------------------------


def _largest_error(given: list[Any], expected: list[Any]) -> float:
    return max(
        float(np.abs(a - b).max() / np.abs(b).max())
        for a, b in zip(given, expected, strict=True)
        if b.dtype == np.float32
    )


def test_paraphrase_model(tmp_path: Path) -> None:
    model = cases.pruned(cases.paraphrase(), 0.85)
    output = tmp_path / "paraphrase.onnx"
    report = sparsecomp.onnx.optimize(model, output, shapes={"input_ids": [1, 128], "attention_mask": [1, 128]})
    onnx.checker.check_model(str(output), full_check=True)
    assert len(report) == 18
    # Bias, activation and residual are part of the operations.
    assert {choice.activation for choice in report} == {"none", "gelu"}
    assert sum(choice.residual for choice in report) == 6
    assert len(report.rewritten) == 18
    for batch, tokens in ((1, 128), (3, 17), (1, 5), (1, 1)):
        feeds = cases.token_feeds(batch, tokens)
        expected = cases.session(model).run(None, feeds)
        assert _largest_error(cases.session(output).run(None, feeds), expected) <= 1e-6
        library = sparsecomp.onnx.library_of(output)
        assert _largest_error(cases.session(output, library).run(None, feeds), expected) <= 1e-4
    plan = {item.key: item.value for item in onnx.load(output).metadata_props}[sparsecomp.onnx.PLAN_KEY]
    assert sparsecomp.Plan.from_json(plan) == report.plan


@pytest.mark.slow
def test_opennsfw(tmp_path: Path) -> None:
    model = cases.pruned(cases.opennsfw(), 0.85)
    # The scores are a softmax that hides differences: compare what goes into it.
    softmax = next(node for node in model.graph.node if node.op_type == "Softmax")
    model.graph.output.append(helper.make_tensor_value_info(softmax.input[0], TensorProto.FLOAT, [None, 2]))
    output = tmp_path / "nsfw.onnx"
    report = sparsecomp.onnx.optimize(model, output)
    assert len(report.rewritten) >= 50
    feeds = {"input:0": (np.random.default_rng(0).random((2, 224, 224, 3)) * 255 - 110).astype(np.float32)}
    expected = cases.session(model).run(None, feeds)
    assert _largest_error(cases.session(output).run(None, feeds), expected) <= 1e-6
    library = sparsecomp.onnx.library_of(output)
    assert _largest_error(cases.session(output, library).run(None, feeds), expected) <= 1e-4


# -- options ------------------------------------------------------------------------------------------------------


def test_a_dense_model_is_left_as_it_is_and_has_no_library(tmp_path: Path) -> None:
    model = cases.linear_model(np.ones((64, 64), np.float32))
    report = sparsecomp.onnx.optimize(model, tmp_path / "m.onnx")
    assert not report.rewritten
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]
    assert onnx.load(tmp_path / "m.onnx").graph.node == model.graph.node


def test_a_fixed_number_of_tokens_needs_one_form(tmp_path: Path) -> None:
    model = cases.linear_model(W)
    dynamic = sparsecomp.onnx.optimize(model, tmp_path / "dynamic.onnx", shapes={"x": [128, 384]})
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 128
    fixed = sparsecomp.onnx.optimize(model, tmp_path / "fixed.onnx")
    assert [choice.chosen for choice in fixed] == [choice.chosen for choice in dynamic]
    assert "tokens, then" in dynamic.plan.sites[0].reason
    assert "tokens, then" not in fixed.plan.sites[0].reason
    (one,), (several,) = (onnx.load(tmp_path / f"{name}.onnx").graph.node for name in ("fixed", "dynamic"))
    assert "choice" not in " ".join(one.input)
    assert "choice" in " ".join(several.input)
    assert (tmp_path / "fixed.onnx").stat().st_size < W.nbytes / 4
    for tokens in (1, 5, 128):
        cases.check_everywhere(cases.linear_model(W), tmp_path / "dynamic.onnx", {"x": X[:tokens]}, tolerance=1e-4)


def test_options(model_file: Path, tmp_path: Path) -> None:
    assert len(sparsecomp.onnx.inspect(model_file).rewritten) == 1
    assert not sparsecomp.onnx.inspect(model_file, options={"exclude": "layer"}).rewritten
    (choice,) = sparsecomp.onnx.inspect(model_file, options={"patterns": "32:2:4"})
    assert choice.chosen.is_dense
    few = sparsecomp.onnx.inspect(model_file, shapes={"x": [1, 384]}).plan.sites[0]
    assert few.tokens == 1
    report = sparsecomp.onnx.inspect(model_file)
    report.plan.save(tmp_path / "plan.json")
    assert sparsecomp.onnx.inspect(model_file, options={"plan": tmp_path / "plan.json"}).plan.sites[0].chosen == (
        report.plan.sites[0].chosen
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"options": {"pattern": "2:4"}}, "patterns"),
        ({"options": {"target": "arm"}}, "target"),
        ({"shapes": {"z": [1]}}, "no input 'z'; its inputs are 'x'"),
        ({"shapes": {"x": [1]}}, "2 dimensions"),
        ({"shapes": {"x": [1, 5]}}, "always 384"),
        ({"shapes": {"x": [0, 384]}}, "given"),
    ],
)
def test_bad_options_are_told_before_anything_is_written(
    arguments: dict[str, Any], message: str, model_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        sparsecomp.onnx.optimize(model_file, tmp_path / "out.onnx", **arguments)
    assert not (tmp_path / "out.onnx").exists()


def test_an_optimised_model_is_not_optimised_again(model_file: Path, tmp_path: Path) -> None:
    sparsecomp.onnx.optimize(model_file, tmp_path / "out.onnx")
    with pytest.raises(ValueError, match="the model that it was made from"):
        sparsecomp.onnx.inspect(tmp_path / "out.onnx")


# -- files --------------------------------------------------------------------------------------------------------


def test_external_data(model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = onnx.load(model_file)
    onnx.save(model, tmp_path / "big.onnx", save_as_external_data=True, location="big.data", size_threshold=0)
    monkeypatch.setattr(sparsecomp.onnx, "_EXTERNAL_ABOVE", 1000)
    (tmp_path / "out").mkdir()
    output = tmp_path / "out" / "m.onnx"
    sparsecomp.onnx.optimize(tmp_path / "big.onnx", output)
    assert sorted(path.name for path in output.parent.iterdir()) == ["m.onnx", "m.onnx.data", "m.so"]
    cases.check_everywhere(onnx.load(model_file), output, {"x": X}, tolerance=1e-4)


def test_constants_beyond_two_gigabytes_are_read_where_they_lie(tmp_path: Path) -> None:
    # A table of 2.4 GB that takes no room on the disk, and a weight behind it in the same file.
    rows, width = 1_600_000, 384
    with (tmp_path / "model.data").open("wb") as file:
        file.truncate(4 * rows * width)
        file.seek(4 * rows * width)
        file.write(W.tobytes())
    nodes = [
        helper.make_node("Gather", ["table", "i"], ["x"]),
        helper.make_node("MatMul", ["x", "layer.weight"], ["y"]),
    ]
    model = cases.model_of(
        nodes, {"i": ["n"]}, {"layer.weight": W, "table": np.zeros((1, width), np.float32)}, outputs={"y": 2}
    )
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
    for tensor, dims, offset in zip(
        model.graph.initializer, ([width, width], [rows, width]), (4 * rows * width, 0), strict=True
    ):
        tensor.ClearField("raw_data")
        tensor.dims[:] = dims
        tensor.data_location = TensorProto.EXTERNAL
        size = 4 * dims[0] * dims[1]
        for key, value in (("location", "model.data"), ("offset", str(offset)), ("length", str(size))):
            tensor.external_data.add(key=key, value=value)
    onnx.save(model, tmp_path / "model.onnx")
    (choice,) = sparsecomp.onnx.inspect(tmp_path / "model.onnx")
    assert choice.density == pytest.approx(np.count_nonzero(W) / W.size)
    assert choice.tokens == 1


@pytest.mark.parametrize("location", ["../secret.data", "/etc/hostname", "missing.data"])
def test_external_data_stays_in_the_folder_of_the_model(location: str, tmp_path: Path) -> None:
    (tmp_path / "secret.data").write_bytes(W.tobytes())
    folder = tmp_path / "model"
    folder.mkdir()
    model = cases.linear_model(W)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    for version in (3, 8):
        model.ir_version = version
        onnx.save(model, folder / "m.onnx")
        with pytest.raises((ValueError, FileNotFoundError)):
            sparsecomp.onnx.optimize(folder / "m.onnx", folder / "out.onnx")
    assert not (folder / "out.onnx").exists()


def test_the_output_may_replace_the_model(model_file: Path) -> None:
    model = onnx.load(model_file)
    sparsecomp.onnx.optimize(model_file, model_file)
    cases.check_everywhere(model, model_file, {"x": X}, tolerance=1e-4)


# -- what is no model ---------------------------------------------------------------------------------------------

SMALL = cases.model_of(
    [
        helper.make_node("Gemm", ["x", "w", "b"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "w"], ["y"]),
    ],
    {"x": ["n", 8]},
    {"w": cases.sparse_array(8, 8), "b": np.ones(8, np.float32)},
).SerializeToString()


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.integers(0, 255)), min_size=1, max_size=6), st.integers(0, 8)
)
def test_damaged_files_are_errors_or_models(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]], cut: int
) -> None:
    content = bytearray(SMALL)
    for place, value in changes:
        content[place] = value
    folder = tmp_path_factory.getbasetemp()
    (folder / "damaged.onnx").write_bytes(bytes(content[: len(content) - cut]))
    # Every other error, and every crash, is a failure.
    with contextlib.suppress(ValueError, FileNotFoundError):
        sparsecomp.onnx.inspect(folder / "damaged.onnx")


def test_weights_that_are_not_there(tmp_path: Path) -> None:
    model = cases.linear_model(W)
    tensor = model.graph.initializer[0]
    tensor.dims[:] = [1 << 20, 1 << 20]
    with pytest.raises(ValueError):
        sparsecomp.onnx.inspect(model)
    tensor.dims[:] = [384, 384]
    tensor.raw_data = tensor.raw_data[:-4]
    with pytest.raises(ValueError):
        sparsecomp.onnx.inspect(model)


def test_graphs_that_run_in_circles() -> None:
    nodes = [helper.make_node("Add", ["x", "b"], ["a"]), helper.make_node("Relu", ["a"], ["b"])]
    model = cases.model_of([*nodes, helper.make_node("Relu", ["b"], ["y"])], {"x": ["n", 4]}, {})
    with pytest.raises(ValueError, match="no valid ONNX model"):
        sparsecomp.onnx.inspect(model)


def test_functions_that_stand_for_too_many_nodes() -> None:
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    model = cases.model_of([helper.make_node("F40", ["x"], ["y"], domain="mine")], {"x": ["n", 4]}, {})
    model.opset_import.append(opsets[1])
    model.functions.append(
        helper.make_function("mine", "F0", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], opsets)
    )
    for level in range(1, 41):
        below = f"F{level - 1}"
        nodes = [
            helper.make_node(below, ["a"], ["h"], domain="mine"),
            helper.make_node(below, ["h"], ["b"], domain="mine"),
        ]
        model.functions.append(helper.make_function("mine", f"F{level}", ["a"], ["b"], nodes, opsets))
    with pytest.raises(ValueError, match="nodes when its functions are inlined"):
        sparsecomp.onnx.inspect(model)


def test_no_file_and_no_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not a file"):
        sparsecomp.onnx.inspect(tmp_path / "nothing.onnx")
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(ValueError, match="no valid ONNX model"):
        sparsecomp.onnx.inspect(tmp_path / "text.onnx")


# -- the command line ---------------------------------------------------------------------------------------------


def test_commands(model_file: Path, tmp_path: Path) -> None:
    output, plan, html = tmp_path / "out.onnx", tmp_path / "plan.json", tmp_path / "report.html"
    result = runner.invoke(
        app, ["inspect", str(model_file), "--shape", "x=128x384", "--save-plan", str(plan), "--html", str(html)]
    )
    assert result.exit_code == 0, result.output
    assert "1 of 1 site would run sparse kernels" in result.stdout
    assert "<table" in html.read_text()
    result = runner.invoke(app, ["optimize", str(model_file), "-o", str(output), "--plan", str(plan)])
    assert result.exit_code == 0, result.output
    assert "register_custom_ops_library" in result.stdout
    cases.check_everywhere(onnx.load(model_file), output, {"x": X}, tolerance=1e-4)
    result = runner.invoke(app, ["optimize", str(model_file), "-o", str(output), "--exclude", "layer"])
    assert "there is no library" in result.stdout


def test_bench_compares_the_three(model_file: Path) -> None:
    result = runner.invoke(app, ["bench", str(model_file), "--shape", "x=64x384", "--rounds", "3"])
    assert result.exit_code == 0, result.output
    for name in ("original", "optimised, without the library", "optimised, with the library"):
        assert name in result.stdout
    first, *others = sparsecomp.onnx.bench(model_file, rounds=2)
    assert first.speedup == 1.0
    assert first.difference == 0.0
    assert all(timing.difference <= 1e-4 for timing in others)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--shape", "x=3"], "2 dimensions"),
        (["--shape", "x"], "NAME=SIZES"),
        (["--target", "x68"], "x86"),
        (["--plan", "nothing.json"], "nothing.json"),
    ],
)
def test_commands_say_what_is_wrong(model_file: Path, arguments: list[str], expected: str) -> None:
    result = runner.invoke(app, ["inspect", str(model_file), *arguments])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert expected in result.stderr


def test_nodes_out_of_order_are_put_in_order(tmp_path: Path) -> None:
    """As ONNX Runtime takes them."""
    model = cases.linear_model(cases.sparse_array(40, 24), np.ones(24, np.float32))
    nodes = [*model.graph.node][::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    before = model.SerializeToString()
    onnx.save(model, tmp_path / "m.onnx")
    for source in (model, tmp_path / "m.onnx"):
        assert len(sparsecomp.onnx.inspect(source)) == 1
    assert model.SerializeToString() == before


def test_nodes_out_of_order_do_not_open_files(tmp_path: Path) -> None:
    """Only the checker knows which files a model may read, and it takes no such model."""
    model = cases.linear_model(cases.sparse_array(40, 24), np.ones(24, np.float32))
    nodes = [*model.graph.node][::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    with pytest.raises(ValueError, match="sorted"):
        sparsecomp.onnx.inspect(tmp_path / "m.onnx")
