"""Map small units of FPGA designs with `synth_xilinx` of yosys: the points that `sparsecomp.targets.hls.cells` fits.

`python tools/sweep_hls_cells.py [KIND ...]`, with the extra `fpga`: writes `targets/hls/cells.json`, where points of
kinds that are not named stay as they are. Sizes and contents of memories are drawn with a fixed seed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

import numpy as np

from sparsecomp.hls import dslx
from sparsecomp.hls.cpp import resource
from sparsecomp.hls.kernel import Tile
from sparsecomp.hls.network import Lookup, Patches, Pool, Requantise
from sparsecomp.hls.rtl import Module, to_verilog
from sparsecomp.hls.rtl_tools import map_cells

DATA = Path(__file__).resolve().parent.parent / "targets" / "hls" / "cells.json"
FAMILY = "xcup"
TOGETHER = 12
"""Units of one run of yosys."""
Sizes = dict[str, int]
Generator = np.random.Generator


def multiply_sizes(rng: Generator) -> Iterator[Sizes]:
    """Tiles of every pattern with up to 64 multipliers."""
    groups_of = [(1, 1), (1, 1), (2, 4), (1, 4), (4, 8), (2, 8), (1, 16), (2, 16), (4, 16)]
    for at in range(54):
        n, m = groups_of[at % len(groups_of)]
        while True:
            rows, groups = int(rng.choice([1, 2, 3, 4, 8, 16])), int(rng.integers(1, 25))
            if rows * groups * n <= 64 and groups * m <= 64:
                break
        shared = rows if m > 1 and rng.random() < 0.4 else 1
        yield {"rows": rows, "groups": groups, "n": n, "m": m, "shared": shared, "sums": int(rng.integers(20, 31))}


def multiply(name: str, sizes: Sizes) -> Module:
    """The tile loop."""
    tile = Tile(*(sizes[size] for size in ("rows", "groups", "n", "m", "shared")))
    return Module(name, "multiply", 0, dslx.multiply(tile, sizes["sums"]))


def requantise_sizes(rng: Generator) -> Iterator[Sizes]:
    """Up to 16 sums, with a multiplier and without."""
    for at in range(16):
        sums = int(rng.integers(18, 31))
        wide = max(sums + 16, int(rng.integers(30, 46))) + 2
        yield {"rows": int(rng.choice([1, 2, 3, 4, 8, 12, 16])), "sums": sums, "wide": wide, "serial": at % 2}


def requantise(name: str, sizes: Sizes) -> Module:
    """What follows the loop."""
    rule = Requantise(np.array([40000]), np.array([sizes["wide"] - 2]), -3, -128, 127)
    source = dslx.requantise(sizes["rows"], rule, sizes["sums"], bool(sizes["serial"]))
    return Module(name, "requantise", 0, source)


def pool_sizes(rng: Generator) -> Iterator[Sizes]:
    """The largest of windows, and their mean."""
    for taps in (2, 3, 4, 6, 9, 16, 25, 49):
        yield from ({"taps": taps, "mean": mean} for mean in (0, 1))


def pool(name: str, sizes: Sizes) -> Module:
    """A pooling."""
    rule = Requantise.of(np.array([0.9 / sizes["taps"]]), 4) if sizes["mean"] else None
    layer = Pool("pool", Patches((1, sizes["taps"]), (1, 1), (0, 0, 0, 0), (1, 1), 0), 100, rule)
    return Module(name, "pool", 0, dslx.pool(layer))


def look_up_sizes(rng: Generator) -> Iterator[Sizes]:
    """Tables differ by their seed."""
    yield from ({"seed": seed} for seed in range(8))


def look_up(name: str, sizes: Sizes) -> Module:
    """GELU or a sigmoid at several scales: what tables hold is a smooth function."""
    x = np.arange(-128, 128) * [0.01, 0.02, 0.04, 0.06][sizes["seed"] // 2]
    smooth = 127 / (1 + np.exp(-1.7 * x))
    table = np.rint(smooth * x / np.abs(x).max() if sizes["seed"] % 2 else smooth).astype(np.int64)
    return Module(name, "look_up", 0, dslx.look_up(Lookup("table", table)))


def vector_memory_sizes(rng: Generator) -> Iterator[Sizes]:
    """Memories of few rows, which become logic, and of many."""
    for at in range(31):
        word, chunk = int(rng.choice([1, 2, 4, 8, 12, 16, 24, 32])), 1 if at % 3 else int(rng.choice([4, 9, 25]))
        deep = bool(at % 2)
        inputs = word * int(rng.integers(1, 40)) if chunk == 1 else chunk * int(rng.integers(1, 10))
        words = -(-inputs // word)
        sizes = {"INPUTS": inputs, "CHUNK": chunk, "WORD": word, "WORDS": words}
        sizes |= {"BITS": int(rng.integers(9, 300 if deep else 100)), "ORDERED": 0}
        yield sizes | {"TRIPS": int(rng.integers(256, 3000) if deep else rng.integers(2, 220))}
    for _ in range(5):
        word, words = int(rng.choice([4, 8, 16])), int(rng.integers(4, 30))
        sizes = {"INPUTS": word * words, "CHUNK": 1, "WORD": word, "WORDS": words}
        yield sizes | {"TRIPS": int(rng.integers(256, 1000)), "BITS": 40, "ORDERED": 1}


def queue_memory_sizes(rng: Generator) -> Iterator[Sizes]:
    """Queues of up to 40 words."""
    for _ in range(18):
        word, words, groups = int(rng.choice([1, 2, 4, 8, 16])), int(rng.integers(2, 40)), int(rng.choice([1, 8, 32]))
        sizes = {"INPUTS": word * words, "WORD": word, "WORDS": words, "GROUPS": groups}
        yield sizes | {"BITS": int(rng.integers(9, 200)), "ZERO": -100, "MOST": 2}


def cyclic_memory_sizes(rng: Generator) -> Iterator[Sizes]:
    """Rules of requantisation."""
    for at in range(18):
        yield {"DEPTH": int(rng.integers(4, 200) if at % 3 else rng.integers(256, 2000)), "BITS": dslx.RULE_BITS}


def line_windows_sizes(rng: Generator) -> Iterator[Sizes]:
    """Windows of convolutions and poolings."""
    for _ in range(18):
        kernel = [int(size) for size in rng.choice([1, 2, 3, 5], 2)]
        height, width = (int(size) for size in rng.integers(6, 29, 2))
        pads = int(rng.integers(0, 2))
        sizes = {"HEIGHT": height, "WIDTH": width, "CHANNELS": int(rng.choice([1, 2, 3, 8, 16, 32]))}
        sizes |= {"KERNEL_ROWS": kernel[0], "KERNEL_COLUMNS": kernel[1]}
        sizes |= dict.fromkeys(("STRIDE_ROWS", "STRIDE_COLUMNS", "DILATION_ROWS", "DILATION_COLUMNS"), 1)
        yield sizes | dict.fromkeys(("TOP", "LEFT", "BOTTOM", "RIGHT"), pads) | {"FILL": -7}


def stream_memory_sizes(rng: Generator) -> Iterator[Sizes]:
    """Values, and windows of up to 25."""
    for depth in (4, 16, 48, 96, 300, 500):
        yield from ({"DEPTH": depth, "BITS": 8 * taps} for taps in (1, 4, 9, 25))


def memory(kind: str) -> Callable[[str, Sizes], tuple[str, dict[str, str]]]:
    """How a module of memories.v is built: its instance, and random contents."""

    def build(name: str, sizes: Sizes) -> tuple[str, dict[str, str]]:
        rng = np.random.default_rng(0)
        files: dict[str, str] = {}
        parameters = [f".{key}({value})" for key, value in sizes.items()]

        def rom(parameter: str, depth: int, bits: int, most: int | None = None) -> None:
            rows = [rng.integers(0, 2, bits) for _ in range(depth)]
            text = [f"{int(''.join(map(str, row)), 2):x}" for row in rows]
            if most is not None:
                text = [f"{int(rng.integers(0, most)):x}" for _ in rows]
            files[f"{name}_{parameter}"] = "\n".join(text)
            parameters.append(f'.{parameter}("{name}_{parameter}")')

        given, taken = 8, 8
        if kind == "vector_memory":
            given, taken = sizes["BITS"] + 8 * sizes["WORD"], 8 * sizes["CHUNK"]
            rom("ROWS_FILE", sizes["TRIPS"], sizes["BITS"])
            rom("PLACES_FILE", sizes["TRIPS"], 16, sizes["WORDS"])
            if sizes["ORDERED"]:
                places = rng.permutation(sizes["INPUTS"])
                order = [f"{at // sizes['WORD'] << 16 | at % sizes['WORD']:x}" for at in places.tolist()]
                files[f"{name}_ORDER"] = "\n".join(order)
                parameters.append(f'.ORDER_FILE("{name}_ORDER")')
        elif kind == "queue_memory":
            given = sizes["BITS"] + 9 * sizes["WORD"]
            rom("ROWS_FILE", sizes["GROUPS"] * sizes["WORDS"], sizes["BITS"])
        elif kind == "stream_memory":
            given = taken = sizes["BITS"]
        elif kind == "cyclic_memory":
            given, taken = sizes["BITS"], 0
            rom("FILE", sizes["DEPTH"], sizes["BITS"])
        else:
            given = 8 * sizes["KERNEL_ROWS"] * sizes["KERNEL_COLUMNS"]
        ports = [("input", 1, "clk"), ("input", 1, "rst")]
        ports += [("output", given, "out_data"), ("output", 1, "out_vld"), ("input", 1, "out_rdy")]
        ports += [("input", taken, "in_data"), ("input", 1, "in_vld"), ("output", 1, "in_rdy")] if taken else []
        declared = ", ".join(f"{way} wire [{bits - 1}:0] {port}" for way, bits, port in ports)
        connected = ", ".join(f".{port}({port})" for *_, port in ports)
        verilog = f"module {name}({declared});\n{kind} #({', '.join(parameters)}) held({connected});\nendmodule\n"
        return verilog, files

    return build


Built = Module | tuple[str, dict[str, str]]
"""A process, or Verilog and the contents of memories by file name."""
KINDS: Mapping[str, tuple[Callable[[Generator], Iterator[Sizes]], Callable[[str, Sizes], Built]]] = {
    "multiply": (multiply_sizes, multiply),
    "requantise": (requantise_sizes, requantise),
    "pool": (pool_sizes, pool),
    "look_up": (look_up_sizes, look_up),
    "vector_memory": (vector_memory_sizes, memory("vector_memory")),
    "queue_memory": (queue_memory_sizes, memory("queue_memory")),
    "cyclic_memory": (cyclic_memory_sizes, memory("cyclic_memory")),
    "line_windows": (line_windows_sizes, memory("line_windows")),
    "stream_memory": (stream_memory_sizes, memory("stream_memory")),
}


def main() -> None:
    """Sweep and write."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("kinds", nargs="*", metavar="KIND", help=f"all if none is named: {', '.join(KINDS)}")
    kinds = arguments.parse_args().kinds or list(KINDS)
    points = json.loads(DATA.read_text())["points"] if DATA.exists() else {}
    for kind in kinds:
        sizes_of, build = KINDS[kind]
        points[kind] = []
        start = time.perf_counter()
        every = list(sizes_of(np.random.default_rng(0)))
        for at in range(0, len(every), TOGETHER):
            batch = every[at : at + TOGETHER]
            verilog, files = resource("memories.v"), dict[str, str]()
            names = [f"unit{number}" for number in range(len(batch))]
            for name, sizes in zip(names, batch, strict=True):
                built = build(name, sizes)
                if isinstance(built, Module):
                    verilog += to_verilog(built)
                else:
                    verilog += built[0]
                    files |= built[1]
            for sizes, cells in zip(batch, map_cells(verilog, names, FAMILY, files), strict=True):
                points[kind].append({"sizes": sizes, "cells": cells})
                print(kind, sizes, cells, flush=True)
        print(f"{kind}: {len(points[kind])} points in {time.perf_counter() - start:.0f} s", flush=True)
    tools = {name: version(name) for name in ("pyosys", "xls-python")}
    comment = (
        f"Cells of units of FPGA designs, mapped by synth_xilinx of yosys for the family {FAMILY}, made by "
        "tools/sweep_hls_cells.py: a block RAM of 36 Kbit is two RAMB18, LUTRAM are the LUTs that hold memories"
    )
    lines = ",\n".join(
        f'"{kind}": [\n' + ",\n".join(json.dumps(point) for point in points[kind]) + "\n]" for kind in points
    )
    head = json.dumps({"comment": comment, "tools": tools, "date": time.strftime("%Y-%m-%d")})
    DATA.write_text(f'{head[:-1]}, "points": {{\n{lines}\n}}}}\n')


if __name__ == "__main__":
    main()
