"""Packages whose batch or length each run gives: every size of the range, and what is refused."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import arm_tools
import numpy as np
import onnx
import onnx_cases as cases
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper
from torch import nn

import sparsecomp
from sparsecomp.exporting.program import Count, Size
from sparsecomp.exporting.ranges import parse_shapes
from sparsecomp.exporting.sites import range_ends
from sparsecomp.exporting.symbols import Symbols

needs_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="builds packages for x86-64")
SANITIZERS = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
WIDTH = 24


def attention() -> onnx.ModelProto:
    """Self-attention of one head with a residual, for `batch` texts of `length` tokens."""
    weights = {name: cases.sparse_array(WIDTH, WIDTH, density=0.2, seed=seed) for seed, name in enumerate("qkvo")}
    nodes = [helper.make_node("MatMul", ["x", name], [f"x{name}"]) for name in "qkv"]
    nodes += [
        helper.make_node("Transpose", ["xk"], ["t"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["xq", "t"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["p"], axis=-1),
        helper.make_node("MatMul", ["p", "xv"], ["mixed"]),
        helper.make_node("MatMul", ["mixed", "o"], ["out"]),
        helper.make_node("Add", ["out", "x"], ["y"]),
    ]
    return cases.model_of(nodes, {"x": ["batch", "length", WIDTH]}, weights)


@needs_x86
def test_every_size_of_a_range_is_computed_and_clean_under_sanitizers(tmp_path: Path) -> None:
    model = attention()
    sparsecomp.export(model, output=tmp_path, target="host", shapes={"x": ("1..2", "1..37", WIDTH)}, threads=2)
    program = arm_tools.build(tmp_path, [arm_tools.host_compiler()], *SANITIZERS)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    for sizes in ((1, 1), (2, 3), (1, 16), (2, 37)):
        x = np.random.default_rng(0).standard_normal((*sizes, WIDTH), np.float32)
        expected = session.run(None, {"x": x})
        cases.close(arm_tools.run(program, [x], expected, sizes=sizes)[0], expected[0])


@needs_x86
def test_numbers_up_to_a_size_have_its_length(tmp_path: Path) -> None:
    """Positions of tokens, as PyTorch exports them."""
    nodes = [
        helper.make_node("Shape", ["x"], ["length"], start=0, end=1),
        helper.make_node("Squeeze", ["length"], ["scalar"]),
        helper.make_node("Range", ["zero", "scalar", "one"], ["numbers"]),
        helper.make_node("Cast", ["numbers"], ["positions"], to=1),
        helper.make_node("Unsqueeze", ["positions", "axis"], ["column"]),
        helper.make_node("Add", ["x", "column"], ["y"]),
    ]
    constants = {"zero": np.int64(0), "one": np.int64(1), "axis": np.array([1])}
    model = cases.model_of(nodes, {"x": ["length", 6]}, constants)
    sparsecomp.export(model, output=tmp_path, target="host", shapes={"x": ("1..9", 6)})
    program = arm_tools.build(tmp_path, [arm_tools.host_compiler()])
    x = np.ones((5, 6), np.float32)
    expected = x + np.arange(5, dtype=np.float32)[:, None]
    cases.close(arm_tools.run(program, [x], [expected], sizes=[5])[0], expected)


@pytest.mark.arm
def test_a_package_without_kernels_builds_without_a_warning_in_clang(tmp_path: Path) -> None:
    model = cases.model_of([helper.make_node("Relu", ["x"], ["y"])], {"x": ["length", 6]}, {})
    sparsecomp.export(model, output=tmp_path, shapes={"x": ("1..9", 6)})
    arm_tools.build(tmp_path, arm_tools.cross_compiler())


class Convolutions(nn.Module):
    """A strided convolution, a depthwise one, and a linear over what is left."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.depthwise = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, groups=8, padding=1)
        self.last = nn.Linear(8, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.depthwise(torch.relu(self.first(image)))
        return self.last(x.mean((2, 3)))  # type: ignore[no-any-return]


@needs_x86
def test_a_module_takes_batches_of_images(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Convolutions().eval()
    sparsecomp.sparsify_(model, "unstructured@0.7")
    shapes = {"image": ("1..3", 3, 11, 14)}
    sparsecomp.export(model, (torch.randn(2, 3, 11, 14),), output=tmp_path, target="host", shapes=shapes)
    program = arm_tools.build(tmp_path, [arm_tools.host_compiler()], *SANITIZERS)
    assert "int32_t size_image_0" in (tmp_path / "model.h").read_text()
    for batch in (1, 2, 3):
        x = torch.randn(batch, 3, 11, 14)
        with torch.no_grad():
            expected = model(x).numpy()
        cases.close(arm_tools.run(program, [x.numpy()], [expected], sizes=[batch])[0], expected)


@needs_x86
def test_sizes_outside_of_the_range_are_refused(tmp_path: Path) -> None:
    sparsecomp.export(attention(), output=tmp_path, target="host", shapes={"x": (1, "2..9", WIDTH)})
    program = arm_tools.build(tmp_path, [arm_tools.host_compiler()])
    path = arm_tools.write_inputs(tmp_path, [np.zeros((1, 9, WIDTH), np.float32)])

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [program, tmp_path / "weights.bin", path, *options]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    assert run().returncode == 0  # the largest
    for text in ("1", "10", "3,3", "x", ""):
        result = run("--sizes", text)
        assert result.returncode == 1
        assert "expected length, from 2 to 9" in result.stderr
    assert "for the largest sizes" in run("--sizes", "4", "--results", str(tmp_path / "r.json")).stderr
    # The function says the same to a program of somebody's own.
    caller = tmp_path / "caller.c"
    caller.write_text(
        '#include "model.h"\nint main(void) { struct model m = {0}; float x[1];\n'
        "return model_run(&m, 1, x, x) == MODEL_WRONG_SIZE && model_run(&m, 10, x, x) == MODEL_WRONG_SIZE ? 0 : 1; }\n"
    )
    kernels = map(str, (tmp_path / "kernels").glob("*.o"))
    command = [arm_tools.host_compiler(), "-o", str(tmp_path / "caller"), str(caller), str(tmp_path / "model.c")]
    subprocess.run([*command, *kernels, "-lm"], check=True, timeout=60)
    subprocess.run([str(tmp_path / "caller")], check=True, timeout=60)


@needs_x86
def test_few_tokens_run_dense_where_sparse_would_be_slower(tmp_path: Path) -> None:
    model = cases.linear_model(cases.sparse_array(96, 64, density=0.3))
    report = sparsecomp.export(model, output=tmp_path, target="host", shapes={"x": ("1..64", 96)})
    assert next(iter(report.plan)).chosen.kernel == "rows"
    assert any("dense where it gets at most" in note for note in report.notes)
    few = sparsecomp.export(model, output=tmp_path, target="host", shapes={"x": ("16..64", 96)})
    assert not any("dense where" in note for note in few.notes)


def test_sizes_of_one_name_are_one_size() -> None:
    nodes = [helper.make_node("Add", ["x", "z"], ["y"])]
    model = ir.from_proto(cases.model_of(nodes, {"x": ["s1", 4], "z": ["s2", 4]}, {}))
    largest, ranges = parse_shapes(model, {"x": ("batch:1..8", 4), "z": ("batch:1..8", 4)})
    assert largest == {"x": [8, 4], "z": [8, 4]}
    assert ranges == {("x", 0): Size("batch", 1, 8), ("z", 0): Size("batch", 1, 8)}
    assert parse_shapes(model, {"x": ("1..8", 4)})[1] == {("x", 0): Size("x_0", 1, 8)}
    with pytest.raises(ValueError, match=r"size 'batch' was given as 1\.\.8 and as batch:1\.\.9"):
        parse_shapes(model, {"x": ("batch:1..8", 4), "z": ("batch:1..9", 4)})


@given(st.integers(1, 500), st.integers(0, 5000))
def test_ends_of_ranges_cover_every_number_of_tokens(least: int, more: int) -> None:
    ends = range_ends(Count("sizes[0]", least, least + more))
    assert ends == sorted(set(ends))
    assert ends[0] >= least
    assert ends[-1] == least + more


def test_counts_in_c_are_what_tvm_computes_and_within_their_bounds(tmp_path: Path) -> None:
    from tvm import tirx

    symbols = Symbols([Size("a", 1, 9), Size("b", 2, 50)])
    a, b = (symbols.dimension(size) for size in symbols.sizes)
    halves = tirx.floordiv(a * b + 1, 2)
    expressions = [a, a * b + 3, halves, tirx.floormod(halves, 3), tirx.max(halves, b - 1), tirx.min(a, b) * 2]
    counts = [symbols.count(expression) for expression in expressions]

    def expected(x: int, y: int) -> list[int]:
        half = (x * y + 1) // 2
        return [x, x * y + 3, half, half % 3, max(half, y - 1), min(x, y) * 2]

    values = [(1, 2), (9, 50), (5, 3), (2, 7)]
    lines = [f'{{ int sizes[] = {{{x}, {y}}}; printf("%d\\n", {count.text}); }}' for x, y in values for count in counts]
    source = tmp_path / "counts.c"
    source.write_text(f"#include <stdio.h>\nint main(void) {{ {' '.join(lines)} return 0; }}\n")
    subprocess.run([arm_tools.host_compiler(), "-o", str(tmp_path / "counts"), str(source)], check=True, timeout=60)
    printed = subprocess.run([str(tmp_path / "counts")], check=True, capture_output=True, text=True, timeout=60).stdout
    found = iter(map(int, printed.split()))
    for x, y in values:
        for wanted, count in zip(expected(x, y), counts, strict=True):
            assert next(found) == wanted
            assert count.least <= wanted <= count.most


def test_a_size_that_depends_on_values_is_refused() -> None:
    from tvm import tirx

    with pytest.raises(ValueError, match="depends on values"):
        Symbols([Size("a", 1, 9)]).count(tirx.Var("elsewhere", "int64"))


class TestBadInput:
    def test_a_size_that_the_model_fixes(self) -> None:
        model = ir.from_proto(attention())
        with pytest.raises(ValueError, match=r"size 2 of input 'x' cannot be the range 1\.\.24.*only a size that it"):
            parse_shapes(model, {"x": (1, 8, "1..24")})

    @pytest.mark.parametrize("size", ["8..1", "0..4", "1-8", "1..99999999", "many"])
    def test_a_text_that_is_no_range(self, size: str) -> None:
        with pytest.raises(ValueError, match=r"expected a number, or a range such as 1\.\.128"):
            parse_shapes(ir.from_proto(attention()), {"x": (1, size, WIDTH)})

    def test_one_size_with_two_ranges(self) -> None:
        model = cases.model_of([helper.make_node("Add", ["x", "z"], ["y"])], {"x": ["n", 4], "z": ["n", 4]}, {})
        with pytest.raises(ValueError, match=r"size 'n' was given as 1\.\.8 and as 1\.\.9"):
            parse_shapes(ir.from_proto(model), {"x": ("1..8", 4), "z": ("1..9", 4)})

    def test_maps_of_changing_height(self, tmp_path: Path) -> None:
        nodes = [helper.make_node("Conv", ["x", "w"], ["y"])]
        model = cases.model_of(nodes, {"x": [1, 3, "height", 9]}, {"w": cases.sparse_array(4, 3, 3, 3)})
        with pytest.raises(ValueError, match="must have a fixed height and width"):
            sparsecomp.export(model, output=tmp_path / "out", target="host", shapes={"x": (1, 3, "3..9", 9)})
        assert not (tmp_path / "out").exists()

    def test_a_parameter_that_the_module_does_not_have(self, tmp_path: Path) -> None:
        x = torch.randn(2, 3, 11, 14)
        with pytest.raises(ValueError, match="the module has no input 'images'; its inputs are 'image'"):
            sparsecomp.export(Convolutions(), (x,), output=tmp_path, shapes={"images": ("1..3", 3, 11, 14)})
