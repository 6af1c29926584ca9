"""The modules that a layer becomes, by kind and sizes: parameters of the Verilog, and what cells are predicted from."""

from __future__ import annotations

from sparsecomp.hls import dslx
from sparsecomp.hls.kernel import Tile
from sparsecomp.hls.network import FACTOR_BITS, Linear, Patches, Pool, Requantise, Shape
from sparsecomp.targets.hls import Cells
from sparsecomp.targets.hls.cells import cells

Unit = tuple[str, dict[str, int]]


def cells_of(units: list[Unit]) -> Cells:
    """Predicted cells of modules."""
    return sum((cells(kind, sizes) for kind, sizes in units), Cells())


def pool_units(layer: Pool, shape: Shape) -> list[Unit]:
    """Of a pooling that reads a picture of a shape."""
    sizes = {"taps": layer.patches.taps, "mean": int(layer.requantise is not None)}
    return [windows_unit(layer.patches, shape), ("pool", sizes)]


def linear_units(layer: Linear, shape: Shape, tile: Tile, rows: int, serial: bool) -> list[Unit]:
    """Of a linear or a convolution.

    Args:
        layer: to build.
        shape: of what it reads.
        tile: of its loop.
        rows: of its memory of weights: trips, of a queue those without a skip.
        serial: whether it requantises without a multiplier.
    """
    windows: list[Unit] = []
    if layer.patches is not None:
        before, after = stream_units(layer.patches, shape)
        windows = [before, windows_unit(layer.patches, shape), after]
    loop = {"rows": tile.rows, "groups": tile.groups, "n": tile.n, "m": tile.m, "shared": tile.shared}
    values = 8 if layer.skip is None else 9
    return [
        *windows,
        vectors_unit(layer, tile, rows),
        ("multiply", loop | {"sums": layer.sum_bits, "values": values}),
        ("requantise", _requantise(layer.requantise, layer.sum_bits) | {"rows": tile.rows, "serial": int(serial)}),
        ("cyclic_memory", {"DEPTH": len(layer.weight), "BITS": dslx.RULE_BITS}),
    ]


def _requantise(rule: Requantise, sums: int) -> dict[str, int]:
    return {"sums": sums, "wide": max(sums + FACTOR_BITS, int(rule.shifts.max())) + 2}


def vectors_unit(layer: Linear, tile: Tile, rows: int) -> Unit:
    """The memory of a linear's inputs and weights; see `linear_units`."""
    outputs, inputs = layer.weight.shape
    sizes = {"INPUTS": inputs, "WORD": tile.word, "WORDS": -(-inputs // tile.word), "BITS": dslx.row_bits(tile)}
    if layer.skip is not None:
        sizes |= {"GROUPS": -(-outputs // tile.rows), "ZERO": layer.skip.zero, "MOST": layer.skip.most}
        return "queue_memory", sizes
    chunk = layer.patches.taps if layer.patches is not None else 1
    return "vector_memory", sizes | {"TRIPS": rows, "CHUNK": chunk, "ORDERED": int(layer.order is not None)}


def stream_units(patches: Patches, shape: Shape) -> tuple[Unit, Unit]:
    """What is held before and after the windows of a convolution, a row of each.

    While padding runs through the windows no value is taken, and at the beginning of a picture no window is given;
    without these the layers before and after would wait, and a pipeline of equally slow layers would not keep its pace.
    """
    before = {"DEPTH": shape.columns * shape.width, "BITS": 8}
    after = {"DEPTH": patches.out(shape)[1] * shape.width, "BITS": 8 * patches.taps}
    return ("stream_memory", before), ("stream_memory", after)


def windows_unit(patches: Patches, shape: Shape) -> Unit:
    """What reads the windows of a picture of a shape."""
    sizes = {"HEIGHT": shape.height, "WIDTH": shape.columns, "CHANNELS": shape.width}
    sizes |= {"KERNEL_ROWS": patches.kernel[0], "KERNEL_COLUMNS": patches.kernel[1]}
    sizes |= {"STRIDE_ROWS": patches.strides[0], "STRIDE_COLUMNS": patches.strides[1]}
    sizes |= {"DILATION_ROWS": patches.dilations[0], "DILATION_COLUMNS": patches.dilations[1]}
    sizes |= dict(zip(("TOP", "LEFT", "BOTTOM", "RIGHT"), patches.pads, strict=True))
    return "line_windows", sizes | {"FILL": patches.fill}
