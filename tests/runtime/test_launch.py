"""Calling compiled kernels: threads, scratch, weights; and a warm start."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import HERE, needs_x86

from sparsecomp.kernels import tir
from sparsecomp.runtime.launch import KernelSource, Launch, Weights, assembly_of, function_of

pytestmark = needs_x86


def items_kernel() -> Any:
    """Adds 1 to y[item]; its scratch must be its own between two writes."""
    builder = tir.KernelBuilder("items", ("float32",))
    with builder.build() as args, tir.loop(args.end - args.begin) as step:
        item = tir.bind(args.begin + step)
        tir.store(args["scratch"], 15, tir.cast("float32", args.begin))
        with tir.loop(args["dims"][0]) as i:
            tir.store(args["scratch"], i, args["scratch"][15])
            tir.store(args["y"], item, args["y"][item] + args["w0"][i] * args["scratch"][i])
        tir.store(args["y"], item, args["y"][item] + 1.0)
    return builder.function


SOURCE = KernelSource("items", "for the launcher, 2", items_kernel, HERE)


def call(items: int, threads: int, scratch: int = 16) -> torch.Tensor:
    weights = Weights([np.zeros(8, np.float32)])
    launch = Launch(function_of(SOURCE), weights, [8], items, threads, scratch)
    y = torch.zeros(max(items, 1))
    launch.run(torch.zeros(1), torch.zeros(1), None, y)
    return y


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("items", [1, 2, 3, 7, 1000])
def test_every_item_runs_once(items: int, threads: int) -> None:
    assert torch.equal(call(items, threads), torch.ones(items))


@pytest.mark.parametrize("threads", [1, 2])
def test_no_items(threads: int) -> None:
    assert torch.equal(call(0, threads), torch.zeros(1))


@pytest.mark.parametrize("threads", [1, 2])
def test_scratch_that_cannot_be_had(threads: int) -> None:
    with pytest.raises(MemoryError, match=f"no memory for {1 << 60} bytes of scratch per thread"):
        call(4, threads, scratch=1 << 58)
    assert torch.equal(call(4, threads), torch.ones(4))


def test_scratch_grows() -> None:
    for scratch in (16, 1 << 16, 16, 1 << 20):
        assert torch.equal(call(3, 2, scratch), torch.ones(3))


def test_a_launch_may_be_called_again_and_again() -> None:
    launch = Launch(function_of(SOURCE), Weights([np.zeros(8, np.float32)]), [8], 5, 2, 16)
    y = torch.zeros(5)
    for _ in range(10):
        launch.run(torch.zeros(1), torch.zeros(1), None, y)
    assert torch.equal(y, torch.full((5,), 10.0))


def test_weights_are_aligned_copies() -> None:
    arrays = [np.arange(7, dtype=np.float32), np.arange(3, dtype=np.uint16), np.empty((0, 5), np.int32)]
    weights = Weights(arrays)
    assert weights.nbytes == 28 + 6
    assert all(pointer % 64 == 0 for pointer in weights.pointers[:2])
    assert weights.pointers[3] is None
    arrays[0][:] = -1
    read = np.ctypeslib.as_array((np.ctypeslib.ctypes.c_float * 7).from_address(weights.pointers[0]))
    assert read.tolist() == list(range(7))


class TestBuilding:
    def test_a_function_is_built_once(self) -> None:
        first = function_of(SOURCE)
        broken = KernelSource(SOURCE.name, SOURCE.identity, lambda: pytest.fail("it was built again"), SOURCE.target)
        assert function_of(broken).value == first.value

    def test_what_shapes_a_kernel_tells_it_apart(self) -> None:
        class Asked(Exception):
            pass

        def build() -> Any:
            raise Asked

        others = [
            KernelSource("items", "another identity", build, HERE),
            KernelSource("items_too", SOURCE.identity, build, HERE),
            KernelSource("items", SOURCE.identity, build, {**HERE, "mcpu": "another"}),
        ]
        for other in others:
            with pytest.raises(Asked):
                function_of(other)

    def test_assembly(self) -> None:
        assert "items:" in assembly_of(SOURCE)


WARM = """
    import sys, torch
    from sparsecomp.targets import get_target
    from sparsecomp.targets.base import Candidate
    weight = torch.eye(24, 40)
    kernel = get_target(None).prepare(Candidate("rows", "unstructured"), weight)
    x, out = torch.arange(200.0).reshape(5, 40), torch.empty(5, 24)
    kernel.run(x, None, None, "none", out)
    assert torch.equal(out, x[:, :24])
    assert kernel.nbytes > 0
    print("tvm" in sys.modules)
"""


def test_a_warm_start_does_without_tvm() -> None:
    exec(textwrap.dedent(WARM), {})  # fills the cache
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(WARM)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["False"]
