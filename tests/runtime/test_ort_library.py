"""The native library in ONNX Runtime: threads, shapes of every kind, and packed weights that are not to be trusted."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_cases as cases
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

import sparsecomp.onnx

KERNELS = ("rows", "panel", "gather", "mask", "conv", "several")
RANDOM = np.random.default_rng(7)


def _model(kernel: str) -> onnx.ModelProto:
    if kernel == "conv":
        nodes = [helper.make_node("Conv", ["x", "weight", "bias"], ["y"], pads=[1, 1, 1, 1])]
        constants = {"weight": cases.sparse_array(12, 5, 3, 3), "bias": np.ones(12, np.float32)}
        return cases.model_of(nodes, {"x": ["n", 5, "h", "w"]}, constants)
    weight = cases.panel_array(70, 40) if kernel == "panel" else cases.sparse_array(70, 41)
    return cases.linear_model(weight, np.ones(weight.shape[1], np.float32))


def _input(kernel: str) -> Any:
    return RANDOM.standard_normal((2, 5, 6, 7) if kernel == "conv" else (3, 70)).astype(np.float32)


@pytest.fixture(scope="module", params=KERNELS)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A kernel and the optimised model that uses it."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "several":
        return request.param, cases.optimized_in_forms(_model(request.param), folder)
    output, report = cases.optimized(
        _model(request.param), folder, kernel=None if request.param == "conv" else request.param
    )
    assert len(report.rewritten) == 1
    return request.param, output


def _library(output: Path) -> Path:
    return sparsecomp.onnx.library_of(output)


# -- what is right --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(threads: int, tmp_path: Path) -> None:
    model = cases.linear_model(cases.sparse_array(300, 517), np.ones(517, np.float32))
    output, _ = cases.optimized(model, tmp_path, kernel="rows")
    run = cases.session(output, _library(output), threads)
    for tokens in (1, 7, 300, 300, 300, 300, 300, 300, 300, 17):  # more calls than threads are counted in
        x = RANDOM.standard_normal((tokens, 300)).astype(np.float32)
        cases.close(run.run(None, {"x": x})[0], cases.session(model).run(None, {"x": x})[0])


def test_sessions_and_calls_at_once(built: tuple[str, Path]) -> None:
    kernel, output = built
    x = _input(kernel)
    expected = cases.session(output).run(None, {"x": x})[0]
    sessions = [cases.session(output, _library(output), threads) for threads in (1, 2)]
    failures: list[BaseException] = []

    def work(index: int) -> None:
        try:
            for _ in range(20):
                cases.close(sessions[index % 2].run(None, {"x": x})[0], expected)
        except BaseException as error:  # noqa: BLE001 -- told to the main thread
            failures.append(error)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def test_inputs_anywhere_in_memory(built: tuple[str, Path]) -> None:
    kernel, output = built
    x = _input(kernel)
    run = cases.session(output, _library(output))
    expected = run.run(None, {"x": x})[0]
    raw = np.empty(x.nbytes + 64, np.uint8)
    for offset in range(0, 64, 4):
        moved = raw[offset : offset + x.nbytes].view(np.float32).reshape(x.shape)
        moved[...] = x
        cases.close(run.run(None, {"x": moved})[0], expected)


def test_a_residual_that_broadcasts_in_one_call(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Add", ["h", "r"], ["y"])]
    model = cases.model_of(nodes, {"x": ["b", "n", 24], "r": ["b", "n", 24]}, {"w": cases.sparse_array(24, 24)})
    output, report = cases.optimized(model, tmp_path, kernel="gather")
    assert report.plan.sites[0].residual
    for x, r in (
        ((2, 3, 24), (2, 3, 24)),
        ((2, 3, 24), (1, 3, 24)),
        ((1, 3, 24), (2, 3, 24)),
        ((2, 1, 24), (1, 3, 24)),
    ):
        feeds = {"x": RANDOM.standard_normal(x).astype(np.float32), "r": RANDOM.standard_normal(r).astype(np.float32)}
        cases.check_everywhere(model, output, feeds)


def test_wrong_inputs_are_errors(built: tuple[str, Path]) -> None:
    kernel, output = built
    run = cases.session(output, _library(output))
    for shape in ((3, 69), (69,), (), (2, 4, 6, 7), (2, 5, 6)):
        with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument):
            run.run(None, {"x": np.zeros(shape, np.float32)})
    if kernel == "conv":
        run.run(None, {"x": np.zeros((1, 5, 1, 1), np.float32)})


@pytest.mark.parametrize("opset", [9, 11, 13, 17])
def test_every_number_of_tokens_in_its_form(opset: int, tmp_path: Path) -> None:
    model = cases.linear_model(cases.sparse_array(70, 41), np.ones(41, np.float32), opset=opset)
    output = cases.optimized_in_forms(model, tmp_path)
    for tokens in (1, 2, 3, 6, 7, 100, 300):
        cases.check_everywhere(model, output, {"x": RANDOM.standard_normal((tokens, 70)).astype(np.float32)})
    # Which form runs shows where its values are made twice as large.
    written = onnx.load(output)
    x = RANDOM.standard_normal((8, 70)).astype(np.float32)
    product = cases.session(model).run(None, {"x": x})[0] - 1
    for number, kernel in enumerate(("gather", "full", "rows")):
        doubled = onnx.ModelProto()
        doubled.CopyFrom(written)
        tensor = next(item for item in doubled.graph.initializer if item.name.endswith(f"{kernel}_values"))
        tensor.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(tensor), tensor.name))
        run = cases.session(doubled, _library(output))
        for tokens, used in ((1, 0), (2, 0), (3, 1), (6, 1), (7, 2), (8, 2)):
            cases.close(run.run(None, {"x": x[:tokens]})[0], (2 if used == number else 1) * product[:tokens] + 1)


# -- what is not to be trusted --------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.integers(-3, 3), st.integers(-(2**31), 2**31 - 1), st.sampled_from([2**16 - 1, 2**31 - 1, -(2**31)])
)


def _damaged(data: st.DataObject, output: Path) -> onnx.ModelProto:
    """An optimised model with some entries of its packed weight, its sizes or its attributes changed."""
    model = onnx.load(output)
    for _ in range(data.draw(st.integers(1, 3))):
        what = data.draw(st.sampled_from(["entry", "entry", "size", "attribute", "type"]))
        if what == "attribute":
            attribute = data.draw(st.sampled_from(list(model.graph.node[0].attribute)))
            attribute.i = data.draw(st.one_of(st.integers(-5, 200), NUMBERS, st.integers(-(2**63), 2**63 - 1)))
            continue
        tensor = data.draw(st.sampled_from(list(model.graph.initializer)))
        array = numpy_helper.to_array(tensor).copy()
        if what == "type":
            array = array.astype(data.draw(st.sampled_from([np.float32, np.int32, np.uint8, np.uint16, np.int64])))
        elif what == "size":
            size = data.draw(st.integers(0, array.size + 4))
            array = np.resize(array.reshape(-1), size)
        elif array.size:
            place = data.draw(st.integers(0, array.size - 1))
            value = data.draw(NUMBERS)
            flat = array.reshape(-1)
            flat[place] = value & int(np.iinfo(array.dtype).max) if array.dtype.kind == "u" else value
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return model


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_damaged_weights_are_errors_or_harmless(built: tuple[str, Path], data: st.DataObject) -> None:
    kernel, output = built
    model = _damaged(data, output)
    del model.functions[:]  # whatever the function would do with it: the library has to look by itself
    try:
        run = cases.session(model, _library(output))
        run.run(None, {"x": _input(kernel)})
    except Exception as error:
        # ONNX Runtime has a class for every code; a damaged process would not come here.
        if not type(error).__module__.startswith("onnxruntime"):
            raise


def test_columns_end_with_those_that_are_loaded_ahead(tmp_path: Path) -> None:
    output, _ = cases.optimized(_model("rows"), tmp_path, kernel="rows")
    model = onnx.load(output)
    tensor = next(item for item in model.graph.initializer if item.name.endswith("columns"))
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[:-8], tensor.name))
    del model.functions[:]
    with pytest.raises(Exception, match="a quad reads behind the columns"):
        cases.session(model, _library(output))


def test_weights_that_are_no_constants_are_refused(built: tuple[str, Path]) -> None:
    _, output = built
    model = onnx.load(output)
    tensor = next(item for item in model.graph.initializer if item.name.endswith("values"))
    model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    del model.functions[:]
    with pytest.raises(Exception, match="must be a constant initializer"):
        cases.session(model, _library(output))


def test_a_bias_that_is_computed(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Add", ["h", "b"], ["y"])]
    model = cases.model_of(nodes, {"x": ["n", 24], "b": [24]}, {"w": cases.sparse_array(24, 24)})
    output, _ = cases.optimized(model, tmp_path, kernel="gather")
    assert [item.op_type for item in onnx.load(output).graph.node] == ["LinearGather16Bias"]
    for offset in (0, 1, 2):
        bias = np.arange(24 + offset, dtype=np.float32)[offset:]
        cases.check_everywhere(model, output, {"x": RANDOM.standard_normal((4, 24)).astype(np.float32), "b": bias})
