"""Writes a design at the level of registers: processes in DSLX, their Verilog by XLS, memories, and what connects them.

A layer is one or a few modules in a row, connected by streams with valid and ready: a memory that gives what is
computed on, then the processes of `sparsecomp.hls.dslx`. The tile loop is that of the C++, with as many multipliers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from string import Template

import numpy as np

from sparsecomp.hls import dslx
from sparsecomp.hls.cpp import resource
from sparsecomp.hls.design import Design
from sparsecomp.hls.kernel import Schedule
from sparsecomp.hls.network import Integers, Linear, Lookup, Patches, Pool, Shape
from sparsecomp.hls.units import stream_units, vectors_unit, windows_unit

STAGES = {"multiply": 4, "requantise": 4, "pool": 4, "look_up": 1}
"""Pipeline stages that XLS schedules a process into."""
MODULE = "p"
"""The name of every DSLX module, which prefixes the ports of its Verilog."""


@dataclass(frozen=True)
class Module:
    """One module of the chain.

    Attributes:
        name: of the instance; of a process also of its module.
        kind: a module of memories.v, or a process of `STAGES`.
        bits: of the stream that it gives.
        source: of a process, in DSLX.
        parameters: of a memory.
        side: a memory whose rows a process reads besides its stream, with the name of that port.
    """

    name: str
    kind: str
    bits: int
    source: str = ""
    parameters: dict[str, int | str] = field(default_factory=dict)
    side: Module | None = None


def rtl_project(design: Design) -> dict[str, bytes]:
    """The files of a design by name: `*.x` in DSLX, `*.v`, `*.hex` for memories, and `simulate.cpp` for verilator.

    Raises:
        ValueError: `xls-python` is not installed.
    """
    files: dict[str, str] = {"memories.v": resource("memories.v")}
    chain = modules(design, files)
    sources = {module.name: module for module in chain if module.source}
    files |= {f"{name}.x": module.source for name, module in sources.items()}
    files |= {f"{name}.v": to_verilog(module) for name, module in sources.items()}
    files["top.v"] = _top(chain)
    shapes = design.network.shapes()
    values = {"inputs": shapes[0].values, "outputs": shapes[-1].values, "patience": 10 * design.cycles[0] + 10_000}
    files["simulate.cpp"] = Template(resource("simulate.cpp.in")).substitute(values)
    return {name: text.encode() for name, text in files.items()}


def modules(design: Design, files: dict[str, str]) -> list[Module]:
    """The chain of modules of a design; the contents of its memories are added to files."""
    chain: list[Module] = []
    shapes = design.network.shapes()
    for at, (layer, made) in enumerate(zip(design.network.layers, design.schedules, strict=True)):
        name = f"layer{at}"
        if isinstance(layer, Lookup):
            chain.append(Module(f"{name}_look_up", "look_up", 8, dslx.look_up(layer)))
        elif isinstance(layer, Pool):
            chain.append(_windows(name, layer.patches, shapes[at]))
            chain.append(Module(f"{name}_pool", "pool", 8, dslx.pool(layer)))
        elif made is not None:
            if layer.patches is not None:
                before, after = stream_units(layer.patches, shapes[at])
                chain.append(Module(f"{name}_before", before[0], 8, parameters={**before[1]}))
                chain.append(_windows(name, layer.patches, shapes[at]))
                chain.append(Module(f"{name}_after", after[0], after[1]["BITS"], parameters={**after[1]}))
            chain += _linear(name, layer, made, design.options[at].serial, files)
    return chain


def _linear(name: str, layer: Linear, made: Schedule, serial: bool, files: dict[str, str]) -> list[Module]:
    tile, (outputs, inputs), sums = made.tile, layer.weight.shape, layer.sum_bits
    bits = dslx.row_bits(tile)
    files[f"{name}_rows.hex"] = _hex(
        [(made.last[:, None], 1), (made.weights, 8), (made.select, dslx.select_bits(tile))], made.trips
    )
    kind, sizes = vectors_unit(layer, tile, made.trips)
    parameters: dict[str, int | str] = {**sizes, "ROWS_FILE": f"{name}_rows.hex"}
    if layer.skip is None:
        files[f"{name}_places.hex"] = _hex([(made.words[:, None], 16)], made.trips)
        parameters["PLACES_FILE"] = f"{name}_places.hex"
    if layer.order is not None:
        word, lane = np.divmod(layer.order, tile.word)
        files[f"{name}_order.hex"] = _hex([(lane[:, None], 16), (word[:, None], 16)], inputs)
        parameters["ORDER_FILE"] = f"{name}_order.hex"
    rule, every = layer.requantise, np.zeros(outputs, np.int64)
    first = (np.arange(outputs) % tile.rows == 0)[:, None]
    fields = [(first, 1), ((every + rule.shifts)[:, None], 6), ((every + rule.factors)[:, None], 16)]
    files[f"{name}_rules.hex"] = _hex([*fields, (layer.added[:, None], 32)], outputs)
    rules = Module(
        f"{name}_rules",
        "cyclic_memory",
        dslx.RULE_BITS,
        parameters={"DEPTH": outputs, "BITS": dslx.RULE_BITS, "FILE": f"{name}_rules.hex"},
    )
    values = 8 if layer.skip is None else 9
    return [
        Module(f"{name}_vectors", kind, bits + values * tile.word, parameters=parameters),
        Module(f"{name}_multiply", "multiply", sums * tile.rows, dslx.multiply(tile, sums, values)),
        Module(f"{name}_requantise", "requantise", 8, dslx.requantise(tile.rows, rule, sums, serial), side=rules),
    ]


def _windows(name: str, patches: Patches, shape: Shape) -> Module:
    kind, sizes = windows_unit(patches, shape)
    return Module(f"{name}_windows", kind, 8 * patches.taps, parameters={**sizes})


def _hex(fields: Sequence[tuple[Integers | np.ndarray, int]], depth: int) -> str:
    """Rows of a memory for $readmemh, the first field in the lowest bits, its first value lowest."""
    columns = [
        (np.asarray(values).astype(np.int64).reshape(depth, -1, 1) >> np.arange(bits)) & 1
        for values, bits in fields
        if bits
    ]
    binary = np.concatenate([column.reshape(depth, -1) for column in columns], axis=1).astype(np.uint8)
    packed = np.packbits(binary, axis=1, bitorder="little")[:, ::-1]
    return "\n".join(row.tobytes().hex() for row in packed) + "\n"


def _top(chain: Sequence[Module]) -> str:
    """What connects the modules."""
    lines = [
        "// The modules of all layers in a row.",
        "module top(",
        "    input wire clk, input wire rst,",
        "    input wire [7:0] in_data, input wire in_vld, output wire in_rdy,",
        "    output wire [7:0] out_data, output wire out_vld, input wire out_rdy",
        ");",
    ]
    source = "in"
    for module in chain:
        last = module is chain[-1]
        target = "out" if last else module.name
        lines += [] if last else _wires(target, module.bits)
        if not module.source:
            streams = _ports("in", source, "_data") + _ports("out", target, "_data")
            lines.append(_instance(module, streams))
        else:
            main, ports = "step", []
            if module.side is not None:
                lines += _wires(module.side.name, module.side.bits)
                lines.append(_instance(module.side, _ports("out", module.side.name, "_data")))
                ports, main = _ports(f"{MODULE}__rule", module.side.name, ""), "sums"
            ports += _ports(f"{MODULE}__{main}", source, "") + _ports(f"{MODULE}__give", target, "")
            lines.append(f"    {module.name} {module.name}_process(.clk(clk), .rst(rst), {', '.join(ports)});")
        source = target
    return "\n".join([*lines, "endmodule", ""])


def _wires(name: str, bits: int) -> list[str]:
    return [f"    wire [{bits - 1}:0] {name}_data;", f"    wire {name}_vld, {name}_rdy;"]


def _ports(port: str, wire: str, data: str) -> list[str]:
    return [f".{port}{data}({wire}_data)", f".{port}_vld({wire}_vld)", f".{port}_rdy({wire}_rdy)"]


def _instance(module: Module, ports: Sequence[str]) -> str:
    given = ", ".join(
        f'.{key}("{value}")' if isinstance(value, str) else f".{key}({value})"
        for key, value in module.parameters.items()
    )
    return f"    {module.kind} #({given}) {module.name}_memory(.clk(clk), .rst(rst), {', '.join(ports)});"


def to_verilog(module: Module) -> str:
    """A process as pipelined Verilog, one result in every cycle, scheduled by XLS.

    Raises:
        ValueError: `xls-python` is not installed.
    """
    try:
        from xls import c_api
    except ImportError as error:
        raise ValueError("Verilog is made by XLS: pip install 'sparsecomp[fpga]'") from error
    text = c_api.convert_dslx_to_ir(module.source, f"{MODULE}.x", MODULE)
    found = re.search(r"^(?:top )?proc (\w+)", text, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"XLS gave no process for {module.name}")
    package = c_api.Package.parse_ir(c_api.optimize_ir(text, found[1]))
    package.set_top(found[1])
    result = package.schedule_and_codegen(
        with_delay_model=True,
        delay_model="unit",  # stages are balanced by the count of operations: no model of an FPGA's delays is in XLS
        generator="pipeline",
        pipeline_stages=STAGES[module.kind],
        worst_case_throughput=1,
        module_name=module.name,
        use_system_verilog=False,
        flop_inputs=True,
        flop_outputs=True,
        reset="rst",
        streaming_channel_valid_suffix="_vld",
        streaming_channel_ready_suffix="_rdy",
    )
    return str(result.get_verilog_text())
