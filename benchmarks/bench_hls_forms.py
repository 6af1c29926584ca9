"""Other forms of a layer on an FPGA: queues of hidden units, and shift-and-add for constant weights.

`python benchmarks/bench_hls_forms.py`, with the extra `fpga`, a few minutes. A feed-forward block with ReLU is
simulated in verilator for inputs that leave few or many hidden units: its cycles are those of the units that stay.
Then layers of the digits network become adders of shifted inputs: canonical signed digits, with the pairs of terms
that most outputs share taken out first, the idea of da4ml (Sun et al. 2025, arXiv:2507.04535). They are mapped by
yosys, beside the slices of the loop that does the same.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from timing import Results, Row

from sparsecomp.hls.api import export_hls
from sparsecomp.hls.design import Design, linear_options
from sparsecomp.hls.kernel import Tile, schedule
from sparsecomp.hls.network import Integers, Linear, Network, Requantise, Shape
from sparsecomp.hls.rtl_tools import build_simulation, map_cells, simulate_rtl
from sparsecomp.hls.skipping import with_skips
from sparsecomp.patterns import Pattern
from sparsecomp.targets.hls import part

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import hls_digits

WIDTH, HIDDEN, ZERO = 96, 384, -128
PARTS = ("xc7z020", "xczu7ev", "xcvu9p")


def block(rng: np.random.Generator) -> Network:
    """A block with ReLU; the larger the first input, the fewer hidden units stay."""
    weights = [rng.integers(-32, 33, shape) for shape in ((HIDDEN, WIDTH), (WIDTH, HIDDEN))]
    weights[0][:, 0] = -127
    up, down = (
        Linear(name, weight, np.zeros(len(weight), np.int64), Requantise.of(np.full(len(weight), 2e-3), zero, zero))
        for name, weight, zero in zip(("up", "down"), weights, (ZERO, ZERO), strict=True)
    )
    down = replace(down, requantise=replace(down.requantise, zero=0, low=-128))
    return Network(Shape(1, WIDTH), (up, down), (1.0, 1.0), (0, 0))


def queue(results: Results) -> None:
    """Simulate the block for several shares of units that stay, 16 calls each."""
    rng = np.random.default_rng(0)
    levels = (-127, -60, 0, 40, 80, 127)
    x = rng.integers(-40, 41, (16 * len(levels), 1, WIDTH))
    x[:, 0, 0] = np.repeat(levels, 16)
    network = with_skips(block(rng), "relu", x)
    up, down = (layer for layer in network.layers if isinstance(layer, Linear))
    assert down.skip is not None
    # The first layer takes 384 cycles, the second a trip for every unit that stays in each of 4 groups of rows.
    options = [
        linear_options(up, network.shape, Pattern.parse("dense"), Tile(8, 12))[0],
        linear_options(down, network.shapes()[1], Pattern.parse("dense"), Tile(24, 1))[0],
    ]
    schedules = [schedule(up.weight, Tile(8, 12)), schedule(down.weight, Tile(24, 1), every=True)]
    made = Design(network, options, schedules, part("xczu7ev"))
    with tempfile.TemporaryDirectory() as folder:
        found = simulate_rtl(build_simulation(made, Path(folder)), made, x.astype(np.int8))
    if not np.array_equal(found.outputs, np.stack([network.run(call) for call in x])):
        raise SystemExit("the queue's values differ from the reference")
    groups = schedules[1].row_groups
    for at, _ in enumerate(levels):
        own = slice(16 * at + 2, 16 * at + 16)  # the first calls of a level wait for those before
        stay = down.skip.stays[own].sum(axis=1)
        predicted = float(np.maximum(groups * stay, HIDDEN).mean())
        simulated = float(np.diff(found.ends)[16 * at + 1 : 16 * at + 15].mean())
        details = {"simulated": simulated, "predicted": predicted, "units that stay": float(stay.mean())}
        share = stay.mean() / HIDDEN
        error = 100 * abs(predicted / simulated - 1)
        results.add(Row(f"queue, {share:.0%} of {HIDDEN} units stay, interval", error, "% error", 3, True, details))


def signed_digits(value: int) -> dict[int, int]:
    """Powers of two with their signs, no two of them neighbours."""
    digits, at = {}, 0
    while value:
        if value & 1:
            digits[at] = 2 - (value & 3)
            value -= digits[at]
        value, at = value >> 1, at + 1
    return digits


def adders(weight: Integers) -> tuple[str, int]:
    """A module `sums` that gives all products of a weight `[O, I]` with a vector from registers, and its additions.

    A term is (source, shift, sign). While two terms lie in several outputs at the same distance, they become a source
    of their own.
    """
    rows = [
        [(at, shift, sign) for at, value in enumerate(row) for shift, sign in signed_digits(int(value)).items()]
        for row in weight
    ]
    lines, largest = [], [128] * weight.shape[1]
    while True:
        pairs = Counter(key for row in rows for key in {_pair(a, b)[0] for a, b in combinations(sorted(row), 2)})
        best, count = pairs.most_common(1)[0] if pairs else (None, 0)
        if count < 2 or best is None:
            break
        first, second, distance, sign = best
        rows = [_replaced(row, best, len(largest)) for row in rows]
        largest.append(largest[first] + (largest[second] << distance))
        wire = f"wire signed [{largest[-1].bit_length()}:0] v{len(largest) - 1}"
        lines.append(f"{wire} = v{first} {'+' if sign > 0 else '-'} ({_at(second, distance)});")
    count = len(lines) + sum(max(0, len(row) - 1) for row in rows)
    inputs = weight.shape[1]
    lines = [f"wire signed [7:0] v{at} = $signed(x[{8 * at} +: 8]);" for at in range(inputs)] + lines
    for at, row in enumerate(rows):
        terms = " ".join(f"{'+' if sign > 0 else '-'} ({_at(source, shift)})" for source, shift, sign in row)
        bits = sum(largest[source] << shift for source, shift, _ in row).bit_length() + 1
        lines.append(f"wire signed [{bits - 1}:0] sum{at} = 0 {terms};")
        lines.append(f"reg signed [{bits - 1}:0] held{at}; always @(posedge clk) held{at} <= sum{at};")
        lines.append(f"assign y[{24 * at} +: 24] = held{at};")
    head = f"module sums(input clk, input [{8 * inputs - 1}:0] x, output [{24 * len(rows) - 1}:0] y);"
    return "\n".join([head, *lines, "endmodule"]), count


Term = tuple[int, int, int]


def _at(source: int, shift: int) -> str:
    return f"v{source} <<< {shift}"


def _pair(a: Term, b: Term) -> tuple[tuple[int, int, int, int], Term]:
    """What two terms have in common with others like them, and the term that stands for them."""
    if a[1] > b[1] or (a[1] == b[1] and a[0] > b[0]):
        a, b = b, a
    return (a[0], b[0], b[1] - a[1], a[2] * b[2]), (0, a[1], a[2])


def _replaced(row: list[Term], best: tuple[int, int, int, int], source: int) -> list[Term]:
    row = sorted(row)
    for a, b in combinations(row, 2):
        key, (_, shift, sign) = _pair(a, b)
        if key == best:
            return _replaced([term for term in row if term not in (a, b)] + [(source, shift, sign)], best, source)
    return row


def constants(results: Results) -> None:
    """Map the layers of the digits network as adders."""
    torch.manual_seed(0)
    x, y, _, _ = hls_digits.digits()
    model = hls_digits.network()
    hls_digits.train(model, x, y, 30)
    with tempfile.TemporaryDirectory() as folder:
        made = export_hls(
            hls_digits.exported(model, x),
            output=folder,
            part="xc7z020",
            calibration={"x": x.numpy()},
            max_interval="2560ns",
        )
    devices = [part(key) for key in PARTS]
    ratios = {device.name: round(device.cells.lut / device.cells.dsp) for device in devices}
    for layer, option in zip(made.network.layers, made.options, strict=True):
        if not isinstance(layer, Linear) or layer.weight.size > 400 or option.tile is None:
            continue
        verilog, count = adders(layer.weight)
        (found,) = map_cells(verilog, ["sums"], "xc7")
        slices = option.tile.rows * option.tile.lanes
        details = {"weights": layer.weight.size, "additions": count, "LUT": found["LUT"], "slices of the loop": slices}
        details |= {f"LUT a slice of {name}": value for name, value in ratios.items()}
        results.add(Row(f"shift-and-add, {layer.name}", found["LUT"] / slices, "LUT a slice saved", details=details))


def main() -> None:
    """Run the benchmark and write its results."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    results = Results("hls_forms")
    results.notes += [
        f"queue: {WIDTH} to {HIDDEN} to {WIDTH} with ReLU, simulated by verilator; the second layer takes a trip for "
        f"every unit that stays in each of 4 groups of rows, the first {HIDDEN} cycles",
        "shift-and-add: all products of a vector at once, by synth_xilinx of yosys for the 7 series; beside it the "
        "slices of the loop that does the same in the interval of the network",
    ]
    constants(results)
    queue(results)
    results.finish()


if __name__ == "__main__":
    main()
