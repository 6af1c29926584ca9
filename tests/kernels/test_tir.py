"""The words that kernels are written with: what each computes once compiled, and that the object needs nothing else."""

from __future__ import annotations

import inspect
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import HERE, Array, Guarded, needs_x86, tvm_target

from sparsecomp.kernels import rows, tir
from sparsecomp.kernels.epilogue import Epilogue
from sparsecomp.kernels.quads import QuadShape
from sparsecomp.runtime.launch import KernelSource, Launch, Weights, function_of

Body = Callable[[tir.Arguments], None]


def kernel(name: str, body: Body, weights: tuple[str, ...] = ()) -> Any:
    builder = tir.KernelBuilder(name, weights)
    with builder.build() as args:
        body(args)
    return builder.function


def run(
    name: str,
    body: Body,
    x: Array,
    outputs: int,
    arrays: dict[str, Array] | None = None,
    dims: tuple[int, ...] = (0,),
    items: int = 1,
) -> Array:
    """Compile a body into a kernel and give what it writes to y; arrays are `w0` to `w3` by element type."""
    arrays = arrays or {}
    # The body decides the code, and the name tells apart what the body takes from outside.
    identity = inspect.getsource(body)
    source = KernelSource(name, identity, lambda: kernel(name, body, tuple(arrays)), HERE)
    out = Guarded((outputs,))
    call = Launch(function_of(source), Weights(list(arrays.values())), dims, items, 1, 64)
    call.run(torch.from_numpy(x.astype(np.float32)), torch.zeros(1), None, out.tensor)
    out.check()
    return out.tensor.numpy()


@needs_x86
@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_transpose(lanes: int) -> None:
    def body(args: tir.Arguments) -> None:
        square = [tir.bind(tir.load(args["x"], row * lanes, lanes)) for row in range(lanes)]
        for row, vector in enumerate(tir.transpose(square)):
            tir.store(args["y"], row * lanes, vector, lanes)

    x = np.arange(lanes * lanes, dtype=np.float32)
    given = run(f"transpose{lanes}", body, x, lanes * lanes)
    assert np.array_equal(given.reshape(lanes, lanes), x.reshape(lanes, lanes).T)


@needs_x86
def test_sizes_come_in_the_order_of_their_names() -> None:
    def body(args: tir.Arguments) -> None:
        for position, size in enumerate(args.sizes("a", "b", "c")):
            tir.store(args["y"], position, tir.cast("float32", size))

    assert run("sizes", body, np.zeros(1), 3, dims=(7, 5, 9)).tolist() == [7, 5, 9]


@needs_x86
def test_items_are_the_range_from_begin_to_end() -> None:
    def body(args: tir.Arguments) -> None:
        with tir.loop(args.end - args.begin) as step:
            item = tir.bind(args.begin + step)
            tir.store(args["y"], item, tir.cast("float32", item))

    assert run("items", body, np.zeros(1), 5, items=5).tolist() == [0, 1, 2, 3, 4]


@needs_x86
def test_integer_words() -> None:
    def body(args: tir.Arguments) -> None:
        a, b = args.sizes("a", "b")
        words = [tir.ceil_div(a, b), tir.floor_div(a, b), tir.floor_mod(a, b), tir.ceil_div(a, 4)]
        words += [tir.minimum(a, b), tir.maximum(a, b), tir.const(-3, "int32")]
        words += [tir.cast("int32", tir.popcount(tir.bind(args["w0"][i]))) for i in range(3)]
        words += [tir.cast("int32", tir.bind(args["w1"][0]) >> tir.const(48, "uint64"))]
        words += [tir.cast("int32", tir.bind(args["w2"][i])) for i in range(2)]
        for position, word in enumerate(words):
            tir.store(args["y"], position, tir.cast("float32", word))

    arrays: dict[str, Array] = {
        "int64": np.array([0, 0xFFFF, 0x8001], np.int64),
        "uint64": np.array([0xFFFE << 48 | 123], np.uint64),
        "uint16": np.array([65535, 1], np.uint16),
    }
    given = run("integers", body, np.zeros(1), 13, arrays, dims=(17, 5))
    assert given.tolist() == [4, 3, 2, 5, 5, 17, -3, 0, 16, 2, 65534, 65535, 1]


@needs_x86
def test_vector_words() -> None:
    def body(args: tir.Arguments) -> None:
        a, b = (tir.bind(tir.load(args["x"], 4 * i, 4)) for i in range(2))
        zero = tir.const(0.0, lanes=4)
        built = tir.vector_of([tir.lane(a, 3), tir.lane(a, 0), tir.lane(b, 1), tir.lane(b, 1)])
        vectors = [
            built,
            tir.shuffle(a, b, [7, 0, 4, 3]),
            tir.splat(args["x"][1], 4),
            tir.select(a < zero, zero, a),
            tir.minimum(a, b),
            tir.maximum(a, b),
            tir.cast("float32x4", tir.cast("int32x4", a)),
            tir.reinterpret("float32x4", tir.reinterpret("int32x4", a) + tir.const(1 << 23, "int32", 4)),
        ]
        for position, vector in enumerate(vectors):
            tir.store(args["y"], 4 * position, vector, 4)

    a, b = np.array([1.5, -2.75, 3.0, -4.0], np.float32), np.array([10.0, -20.0, 0.5, -0.5], np.float32)
    given = run("vectors", body, np.concatenate([a, b]), 32).reshape(-1, 4)
    assert given[0].tolist() == [-4.0, 1.5, -20.0, -20.0]
    assert given[1].tolist() == [-0.5, 1.5, 10.0, -4.0]
    assert given[2].tolist() == [-2.75] * 4
    assert given[3].tolist() == [1.5, 0.0, 3.0, 0.0]
    assert np.array_equal(given[4], np.minimum(a, b))
    assert np.array_equal(given[5], np.maximum(a, b))
    assert given[6].tolist() == [1.0, -2.0, 3.0, -4.0]
    assert np.array_equal(given[7], 2 * a)


@needs_x86
def test_statements() -> None:
    def body(args: tir.Arguments) -> None:
        (count,) = args.sizes("count")
        total = tir.registers(4)
        tir.store(total, 0, tir.const(0.0, lanes=4), 4)
        with tir.loop(count) as i:
            tir.prefetch(args["x"], i * 4 + 1000)
            tir.store(total, 0, tir.load(total, 0, 4) + tir.load(args["x"], i * 4, 4), 4)
            with tir.when(i == 1):
                tir.store(args["y"], 4, args["x"][i])
        with tir.when(count > 5):
            tir.store(args["y"], 4, tir.const(-1.0))
        tir.store(args["y"], 0, tir.load(total, 0, 4), 4)

    x = np.arange(12, dtype=np.float32)
    assert run("statements", body, x, 5, dims=(3,)).tolist() == [12, 15, 18, 21, 1]


def test_weights_without_a_type_are_never_read() -> None:
    builder = tir.KernelBuilder("types", ("float32", "uint8"))
    with builder.build() as args:
        assert str(args["w0"].dtype) == "float32"
        assert str(args["w1"].dtype) == "uint8"
        tir.store(args["y"], 0, args["x"][0])
    assert builder.function is not None


@pytest.mark.parametrize("level", ["avx512", "avx2", "generic"])
def test_an_object_depends_on_nothing(level: str, tmp_path: Path) -> None:
    function = rows.build(QuadShape(4, 1, "load"), Epilogue("gelu_tanh", True))
    code, text = tir.compile_object(function, "my_kernel", tvm_target(level))
    assert code[:4] == b"\x7fELF"
    assert "my_kernel:" in text
    (tmp_path / "kernel.o").write_bytes(code)
    listed = subprocess.run(["nm", "kernel.o"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    symbols = [line.split()[-2:] for line in listed.splitlines()]
    assert ["T", "my_kernel"] in symbols
    assert not [name for kind, name in symbols if kind == "U" and name != "_GLOBAL_OFFSET_TABLE_"]
