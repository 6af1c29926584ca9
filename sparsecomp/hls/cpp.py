"""Writes a design as a project of HLS C++: sources, testbench, and scripts for the vendor's tool and for g++."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from importlib import resources
from string import Template
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsecomp.hls.design import Design, Option
from sparsecomp.hls.kernel import Schedule
from sparsecomp.hls.network import Integers, Layer, Linear, Lookup, Patches, Pool, Requantise, Shape
from sparsecomp.hls.units import stream_units

_LINE = 110


def project(design: Design, inputs: npt.NDArray[np.int8], *, clock_ns: float, name: str = "top") -> dict[str, bytes]:
    """The files of a project by name.

    Args:
        design: to write.
        inputs: recorded inputs `[calls, vectors, width]`; what the reference makes of them goes beside.
        clock_ns: that the vendor's tool is asked for.
        name: of the top function, an identifier of C.
    """
    network = design.network
    calls, shape, out = len(inputs), network.shape, network.shapes()[-1]
    outputs = np.stack([network.run(call) for call in inputs])
    texts = {
        "layers.h": resource("layers.h"),
        "shim/hls_stream.h": resource("hls_stream.h"),
        f"{name}.h": _top_header(design, name),
        f"{name}.cpp": _top(design, name),
        "weights.h": _weights(design, name),
        "testdata.h": _test_data(inputs, outputs),
        "design.json": json.dumps(summary(design, clock_ns), indent=2) + "\n",
    }
    values = {
        "top": name,
        "calls": calls,
        "inputs": shape.values,
        "outputs": out.values,
        "part": design.part.vendor_part,
        "clock": f"{clock_ns:g}",
        "table": design.table(),
        "cycles": design.cycles[0],
        "interval": design.cycles[1],
        "dsp": design.dsp,
        "bram": design.bram,
        "lut": round(design.cells.lut),
        "ff": round(design.cells.ff),
        "device": design.part.name,
    }
    for file in ("testbench.cpp", "run_hls.tcl", "Makefile", "README.md"):
        texts[file] = Template(resource(f"{file}.in")).substitute(values)
    return {file: text.encode() for file, text in texts.items()}


def summary(design: Design, clock_ns: float) -> dict[str, Any]:
    """What was chosen, and what the model says of it."""
    cycles, interval = design.cycles
    return {
        "part": design.part.key,
        "clock_ns": clock_ns,
        "predicted": {
            "cycles": cycles,
            "interval": interval,
            "latency_us": cycles * clock_ns / 1e3,
            "dsp": design.dsp,
            "lut": round(design.cells.lut),
            "ff": round(design.cells.ff),
            "bram": design.bram,
        },
        "input": {"scale": design.network.scales[0], "zero": design.network.zeros[0]},
        "output": {"scale": design.network.scales[1], "zero": design.network.zeros[1]},
        "layers": [
            _row(layer, option, made)
            for layer, option, made in zip(design.network.layers, design.options, design.schedules, strict=True)
        ],
    }


def _row(layer: Layer, option: Option, made: Schedule | None) -> dict[str, Any]:
    row: dict[str, Any] = {"name": layer.name, "kind": type(layer).__name__.lower()}
    if isinstance(layer, Linear) and made is not None:
        tile = made.tile
        row |= {"outputs": layer.weight.shape[0], "inputs": layer.weight.shape[1], "pattern": option.pattern}
        row |= {"rows": tile.rows, "groups": tile.groups, "n": tile.n, "m": tile.m, "shared": tile.shared}
        row |= {"trips": made.trips, "multipliers": tile.rows * tile.lanes, "multiplexers": tile.multiplexers}
        row |= {"requantised": "bit by bit" if option.serial else "with a multiplier"}
        row |= {"kept_per_multiplier_and_trip": round(made.nonzeros / (tile.rows * tile.lanes * made.trips), 4)}
        if layer.skip is not None:
            row |= {
                "skips_units_within_steps": layer.skip.most,
                "units_that_stay": round(float(layer.skip.stays.mean()), 4),
            }
    cells = {"dsp": option.cells.dsp, "lut": round(option.cells.lut), "ff": round(option.cells.ff)}
    return row | {"interval": option.cost.interval, **cells, "bram": option.cells.ramb18 / 2}


def _top_header(design: Design, name: str) -> str:
    network = design.network
    shape, out = network.shape, network.shapes()[-1]
    return (
        f"// One call: {shape.vectors} x {shape.width} int8 values in, {out.vectors} x {out.width} out, one in a "
        f"cycle.\n"
        f"// real = {network.scales[0]!r} * (value - {network.zeros[0]}) going in, "
        f"{network.scales[1]!r} * (value - {network.zeros[1]}) coming out.\n"
        f'#pragma once\n\n#include "layers.h"\n\nvoid {name}(sparse::Stream& in, sparse::Stream& out);\n'
    )


def _top(design: Design, name: str) -> str:
    count = len(design.network.layers)
    lines = [
        f'#include "{name}.h"',
        '#include "weights.h"',
        "",
        f"void {name}(sparse::Stream& in, sparse::Stream& out) {{",
    ]
    lines += [
        "#pragma HLS interface axis port=in",
        "#pragma HLS interface axis port=out",
        "#pragma HLS interface ap_ctrl_hs port=return",
        "#pragma HLS dataflow",
    ]
    layers = list(zip(design.network.layers, design.network.shapes(), strict=False))
    for at, (layer, shape) in list(enumerate(layers))[1:]:
        depth = 2
        if isinstance(layer, Linear) and layer.patches is not None:
            depth = stream_units(layer.patches, shape)[0][1]["DEPTH"]
        lines += [f"    sparse::Stream s{at};", f"#pragma HLS stream variable=s{at} depth={depth}"]
    for at, (layer, shape) in enumerate(layers):
        source, target = "in" if at == 0 else f"s{at}", "out" if at == count - 1 else f"s{at + 1}"
        space = f"{name}_layers::"
        if isinstance(layer, Lookup):
            call = f"look_up<{shape.values}>({source}, {target}, {space}table{at})"
        elif isinstance(layer, Pool):
            call = f"pool<{space}Layer{at}, {space}Patches{at}>({source}, {target})"
        elif layer.patches is not None:
            call = f"convolution<{space}Layer{at}, {space}Patches{at}>({source}, {target})"
        elif layer.skip is not None:
            call = f"queued<{space}Layer{at}>({source}, {target})"
        else:
            call = f"linear<{space}Layer{at}>({source}, {target})"
        lines.append(f"    sparse::{call};")
    return "\n".join([*lines, "}", ""])


def _weights(design: Design, name: str) -> str:
    parts = ['#pragma once\n\n#include <cstdint>\n\n#include "layers.h"\n', f"namespace {name}_layers {{\n"]
    shapes = design.network.shapes()
    for at, (layer, made) in enumerate(zip(design.network.layers, design.schedules, strict=True)):
        parts.append("// " + layer.name.replace("\n", " ").replace("\\", "/"))
        if isinstance(layer, Lookup):
            parts.append(f"static const int8_t table{at}[256] = {{{_numbers(layer.table)}}};")
        elif isinstance(layer, Pool):
            parts += [_pool(layer, at, shapes[at + 1]), _patches(layer.patches, shapes[at], at)]
        elif made is not None:
            parts.append(_linear(layer, made, design.options[at].serial, at, shapes[at + 1]))
            if layer.patches is not None:
                parts.append(_patches(layer.patches, shapes[at], at))
    return "\n".join([*parts, "}", ""])


def _constants(values: dict[str, int]) -> str:
    return "    enum { " + ", ".join(f"{key} = {value}" for key, value in values.items()) + " };"


def _patches(patches: Patches, shape: Shape, at: int) -> str:
    values = {"HEIGHT": shape.height, "WIDTH": shape.columns, "CHANNELS": shape.width}
    values |= {"KERNEL_ROWS": patches.kernel[0], "KERNEL_COLUMNS": patches.kernel[1]}
    values |= {"STRIDE_ROWS": patches.strides[0], "STRIDE_COLUMNS": patches.strides[1]}
    values |= {"DILATION_ROWS": patches.dilations[0], "DILATION_COLUMNS": patches.dilations[1]}
    values |= dict(zip(("TOP", "LEFT", "BOTTOM", "RIGHT"), patches.pads, strict=True)) | {"FILL": patches.fill}
    values |= {"ROW": stream_units(patches, shape)[1][1]["DEPTH"]}
    return f"struct Patches{at} {{\n{_constants(values)}\n}};"


def _pool(layer: Pool, at: int, out: Shape) -> str:
    rule = layer.requantise
    values = {"MEAN": int(rule is not None), "BIAS": layer.bias, "VALUES": out.values, "SUM_BITS": layer.sum_bits}
    values |= {"FACTOR": int(rule.factors[0]) if rule else 0, "SHIFT": int(rule.shifts[0]) if rule else 1}
    return f"struct Layer{at} {{\n{_constants(values | _range(rule))}\n}};"


def _range(rule: Requantise | None) -> dict[str, int]:
    return {"ZERO": rule.zero, "LOW": rule.low, "HIGH": rule.high} if rule else {"ZERO": 0, "LOW": -128, "HIGH": 127}


def _linear(layer: Linear, made: Schedule, serial: bool, at: int, out: Shape) -> str:
    tile, width = made.tile, layer.weight.shape[1]
    values = {"INPUTS": width, "OUTPUTS": len(layer.weight), "VECTORS": out.vectors}
    values |= {"ROWS": tile.rows, "LANES": tile.lanes, "N": tile.n, "M": tile.m, "SHARED": tile.shared}
    values |= {"WORD": tile.word, "WORDS": -(-width // tile.word), "TRIPS": made.trips}
    values |= {"SUM_BITS": layer.sum_bits, "SERIAL": int(serial)}
    if layer.skip is not None:
        values |= {"ZERO_IN": layer.skip.zero, "MOST": layer.skip.most}
    lines = [f"struct Layer{at} {{", _constants(values | _range(layer.requantise))]
    flat = made.weights.reshape(made.trips, -1)
    rom = _rom("int8_t", f"[TRIPS][{flat.shape[1]}]", flat, reshape=True)
    lines.append(
        f"    static int weight(int trip, int r, int l) {{\n{rom}        return rom[trip][r * LANES + l];\n    }}"
    )
    if tile.m == 1:
        lines.append("    static int select(int, int, int) { return 0; }")
    else:
        choice = made.select.reshape(made.trips, -1)
        rom = _rom("uint8_t", f"[TRIPS][{choice.shape[1]}]", choice, reshape=True)
        lines.append(
            f"    static int select(int trip, int s, int l) {{\n{rom}        return rom[trip][s * LANES + l];\n    }}"
        )
    lines += [] if layer.skip is not None else [_words(made), _lasts(made)]
    rule = layer.requantise
    for key, kind, values_of in (
        ("bias", "int32_t", layer.added),
        ("factor", "uint16_t", rule.factors),
        ("shift", "uint8_t", rule.shifts),
    ):
        lines.append(_accessor(key, kind, "OUTPUTS", values_of))
    if layer.order is None:
        lines.append("    typedef sparse::InOrder Order;")
    else:
        lines += ["    struct Order {", _accessor("at", "int32_t", "INPUTS", layer.order), "    };"]
    return "\n".join([*lines, "};"])


def _accessor(name: str, kind: str, count: str, values: Integers) -> str:
    """A function of a place in a memory, or of nothing where all values are the same."""
    if np.all(values == values[0]):
        return f"    static int {name}(int) {{ return {_literal(int(values[0]))}; }}"
    return f"    static int {name}(int at) {{\n{_rom(kind, f'[{count}]', values)}        return rom[at];\n    }}"


def _words(made: Schedule) -> str:
    """Which word a trip reads: counted where all are read in turn."""
    words = int(made.words.max()) + 1
    if made.trips == made.row_groups * words and np.array_equal(made.words, np.arange(made.trips) % words):
        return f"    static int word(int trip) {{ return trip % {words}; }}"
    return _accessor("word", "uint16_t", "TRIPS", made.words)


def _lasts(made: Schedule) -> str:
    each, rest = divmod(made.trips, made.row_groups)
    if not rest and np.array_equal(made.last, np.arange(made.trips) % each == each - 1):
        return f"    static bool last(int trip) {{ return trip % {each} == {each - 1}; }}"
    return _accessor("last", "bool", "TRIPS", made.last.astype(np.int64)).replace("static int", "static bool")


def _rom(kind: str, sizes: str, values: Integers, reshape: bool = False) -> str:
    if values.ndim == 2:
        body = ",\n            ".join(f"{{{_numbers(row)}}}" for row in values)
    else:
        body = _numbers(values)
    pragma = "#pragma HLS array_reshape variable=rom complete dim=2\n" if reshape else ""
    return f"        static const {kind} rom{sizes} = {{\n            {body}}};\n{pragma}"


def _literal(value: int) -> str:
    return str(value) if value > -(2**31) else "(-2147483647 - 1)"


def _numbers(values: Integers | Iterable[int]) -> str:
    texts = [_literal(int(value)) for value in values]
    return ", ".join(texts) if sum(map(len, texts)) < _LINE else ",\n            ".join(_lines(texts))


def _lines(texts: Sequence[str]) -> list[str]:
    return [", ".join(texts[at : at + 24]) for at in range(0, len(texts), 24)]


def _test_data(inputs: npt.NDArray[np.int8], outputs: Integers) -> str:
    parts = ["#pragma once\n\n#include <cstdint>\n"]
    for name, values in (("test_inputs", inputs), ("test_outputs", outputs)):
        rows = values.reshape(len(values), -1).astype(np.int64)
        body = ",\n".join(f"{{{_numbers(row)}}}" for row in rows)
        parts.append(f"static const int8_t {name}[{len(rows)}][{rows.shape[1]}] = {{\n{body}}};")
    return "\n".join([*parts, ""])


def resource(name: str) -> str:
    """The text of a file of this package."""
    return (resources.files("sparsecomp.hls") / name).read_text(encoding="utf-8")
