"""The convolution kernel: NCHW in and out, output positions in the vector lanes, no im2col of the whole map.

A tile is a run of output positions, counted over a map row by row with `pitch` positions to a row. For one block of the
weight's columns (a column is an input channel and a tap of the kernel window) the tile's input is packed into scratch,
one aligned row for each column, small enough for the L1 cache; all output channels then use it, so that packing costs
little. With the stride taken out beforehand (`sparsecomp.kernels.conv_open`) the input of a tap is the map moved by a
constant, whatever the tap: packing is one unaligned load and one `and` with a mask that clears what lies outside of
the map.
A window of 1 x 1 can use the map where it lies, if its planes are whole vectors.

Rows of the weight come in quads, see `sparsecomp.patterns.quads`. The sums of a quad go to scratch between blocks and,
with the epilogue, to y after the last one: in NCHW the lanes are what lies next to each other in y.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from sparsecomp.kernels import tir
from sparsecomp.kernels.conv_geometry import Geometry, check_addressable
from sparsecomp.kernels.epilogue import Epilogue
from sparsecomp.kernels.quads import Quad, QuadShape, weight_types
from sparsecomp.patterns.quads import QUAD, QuadWeight
from sparsecomp.window import Window

DIMS = (
    "planes",
    "plane",
    "rows",
    "pitch",
    "length",
    "run",
    "run_pitch",
    "runs",
    "images",
    "outputs",
    "total",
    "columns",
    "block",
    "block_floats",
    "blocks",
    "chunk",
    "group_chunks",
    "group_rows",
    "group_planes",
    "taps",
    "splits",
    "parts",
    "image_tiles",
    "skip",
)
TABLE_FIELDS = 4
_SPARE = 16  # floats behind a row that a whole vector may write to
_LINE = 16  # floats of a cache line


@dataclass(frozen=True)
class ConvSchedule(QuadShape):
    """Register shape and form of the kernel.

    Attributes:
        masked: whether taps reach outside of the map; false for windows of 1 x 1 without padding.
        whole: whether a tile lies within one image whose positions all count; else tiles run on over the images and
            the sums are stored run by run, which small maps and maps with unused columns need.
        direct: whether the input is used where it lies, for windows of 1 x 1 and whole tiles; else it is packed.
    """

    masked: bool
    whole: bool
    direct: bool

    @property
    def label(self) -> str:
        """What tells the variants of the kernel apart, as a part of a name in C."""
        return f"{self.vectors}{'_direct' * self.direct or '_whole' * self.whole}{'_masked' * self.masked}"

    @property
    def mask_row(self) -> int:
        """Floats of a row of masks: a vector may begin at every lane of the tile."""
        return self.tile + _SPARE


class HalfConvSchedule(ConvSchedule):
    """The same with weights, packed input and the sums over a block of columns in float16; it packs whatever it reads.

    As of `HalfShape`, sums over several blocks are float32, and so is what follows them.
    """

    half: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.direct:
            raise ValueError("maps are float32: the float16 kernel cannot use them where they lie")


def weights(packed: QuadWeight, table: npt.NDArray[np.int32]) -> list[npt.NDArray[np.generic]]:
    """The arrays that the kernel takes as `w0`..`w3`.

    Args:
        packed: the weight, its columns channel by channel, in each tap by tap.
        table: from `sparsecomp.kernels.conv_geometry.table`.
    """
    return [packed.values, packed.words, packed.quads, np.concatenate([table.reshape(-1), packed.starts])]


def weight_sizes(packed: QuadWeight, window: Window) -> dict[str, int]:
    """What of `DIMS` the packed weight decides."""
    return {
        "outputs": packed.shape[0],
        "columns": packed.shape[1],
        "block": packed.block,
        "blocks": packed.blocks,
        "chunk": packed.chunk,
        "group_chunks": packed.group_chunks,
        "group_rows": packed.group_rows,
        "taps": window.taps,
    }


def dims(
    schedule: ConvSchedule, sizes: Mapping[str, int], geometry: Geometry, images: int, cut: tuple[int, int, int, int]
) -> list[int]:
    """The sizes of a call in the order of `DIMS`.

    Args:
        schedule: of the kernel.
        sizes: from `weight_sizes`.
        geometry: of the maps.
        images: in the batch.
        cut: groups of the convolution and splits of the rows of each; if tiles are whole, those of an image, and the
            positions of it before the first of them.

    Raises:
        ValueError: the maps hold more values than the kernel can address.
    """
    groups, splits, image_tiles, skip = cut
    group_planes = sizes["columns"] // sizes["taps"] * len(geometry.phases)
    planes, plane = group_planes * groups, geometry.rows * geometry.pitch
    area, dense = geometry.height * geometry.width, geometry.pitch == geometry.width
    of_call = {
        "planes": planes,
        "plane": plane,
        "rows": geometry.rows,
        "pitch": geometry.pitch,
        "length": geometry.length,
        "run": area if dense else geometry.width,
        "run_pitch": area if dense else geometry.pitch,
        "runs": 1 if dense else geometry.height,
        "images": images,
        "total": images * planes * plane,
        "block_floats": sizes["block"] * schedule.tile,
        "group_planes": group_planes,
        "splits": splits,
        "parts": splits * groups,
        "image_tiles": image_tiles,
        "skip": skip,
    }
    check_addressable(max(of_call["total"], images * sizes["outputs"] * area))
    return [({**sizes, **of_call})[name] for name in DIMS]


def scratch_floats(schedule: ConvSchedule, sizes: Mapping[str, int], splits: int) -> int:
    """Scratch of one thread: the packed block, the sums of its chunks each with a spare row, coordinates, masks."""
    tile, chunks = schedule.tile, -(-sizes["group_chunks"] // splits)
    sums = chunks * (sizes["chunk"] + 1) * tile
    return sizes["block"] * tile + _SPARE + sums + (2 + sizes["taps"]) * schedule.mask_row


@dataclass(frozen=True)
class _Tile:
    """Where a work item is: its first position (within the image if whole), its image, its group, its scratch."""

    first: tir.Expr
    image: tir.Expr
    group: tir.Expr
    sums: tir.Expr
    masks: tir.Expr


def item_of(d: Mapping[str, tir.Expr], number: tir.Expr) -> tuple[tir.Expr, tir.Expr, tir.Expr, tir.Expr]:
    """The tile, the group, the first chunk and the number of chunks of a work item.

    Item i is tile `i // parts`; `i % parts` counts groups, and in each splits of its chunks.
    """
    item = tir.bind(number)
    index, part = tir.bind(tir.floor_div(item, d["parts"])), tir.bind(tir.floor_mod(item, d["parts"]))
    group, split = tir.bind(tir.floor_div(part, d["splits"])), tir.bind(tir.floor_mod(part, d["splits"]))
    first_chunk = tir.bind(tir.floor_div(split * d["group_chunks"], d["splits"]))
    return (
        index,
        group,
        first_chunk,
        tir.bind(tir.floor_div((split + 1) * d["group_chunks"], d["splits"]) - first_chunk),
    )


def build(schedule: ConvSchedule, epilogue: Epilogue) -> tir.Expr:
    """The kernel in TIR; its items are those of `item_of`."""
    builder = tir.KernelBuilder("conv", weight_types(schedule))
    tile = schedule.tile
    with builder.build() as args:
        d = dict(zip(DIMS, args.sizes(*DIMS), strict=True))
        with tir.loop(args.end - args.begin) as step:
            index, group, first_chunk, chunks = item_of(d, args.begin + step)
            if schedule.whole:
                image = tir.bind(tir.floor_div(index, d["image_tiles"]))
                # The last tile of an image ends with it and computes some positions again.
                number = tir.floor_mod(index, d["image_tiles"])
                first = tir.bind(tir.minimum(d["skip"] + number * tile, d["length"] - tile))
            else:
                first = tir.bind(index * tile)
                image = tir.bind(tir.floor_div(first, d["length"]))
            sums = tir.bind(d["block_floats"] + _SPARE)
            masks = tir.bind(sums + tir.ceil_div(d["group_chunks"], d["splits"]) * (d["chunk"] + 1) * tile)
            place = _Tile(first, image, group, sums, masks)
            if schedule.masked:
                _make_masks(args, schedule, d, place)
            with tir.loop(d["blocks"]) as block:
                if not schedule.direct:
                    _pack_block(args, schedule, d, place, block)
                with tir.loop(chunks) as c:
                    chunk = tir.bind(group * d["group_chunks"] + first_chunk + c)
                    start = tir.bind(TABLE_FIELDS * d["columns"] + chunk * d["blocks"] + block)
                    begin, end = tir.bind(args["w3"][start]), tir.bind(args["w3"][start + 1])
                    row = tir.bind(group * d["group_rows"] + (first_chunk + c) * d["chunk"])
                    waiting = tir.bind(sums + c * (d["chunk"] + 1) * tile)
                    with tir.loop(end - begin) as q:
                        _quad(args, schedule, epilogue, d, place, tir.bind(begin + q), block, (row, waiting))
            if not schedule.whole:
                with tir.loop(chunks) as c:
                    row = tir.bind((first_chunk + c) * d["chunk"])
                    rows = tir.bind(tir.minimum(d["chunk"], d["group_rows"] - row))
                    waiting = tir.bind(sums + c * (d["chunk"] + 1) * tile)
                    with tir.loop(rows) as r:
                        output = tir.bind(group * d["group_rows"] + row + r)
                        _store_runs(args, schedule, epilogue, d, place, output, tir.bind(waiting + r * tile))
    return builder.function


def _make_masks(args: tir.Arguments, schedule: ConvSchedule, d: dict[str, tir.Expr], place: _Tile) -> None:
    """For every tap and lane all bits set where the tap lies within the map, none where it does not."""
    lanes, row, scratch = schedule.lanes, schedule.mask_row, args["scratch"]
    ys, xs = place.masks, tir.bind(place.masks + row)
    inside = tir.bind(place.first if schedule.whole else place.first - place.image * d["length"])
    at = tir.registers(2, "int32")
    tir.store(at, 0, tir.floor_div(inside, d["pitch"]))
    tir.store(at, 1, tir.floor_mod(inside, d["pitch"]))
    with tir.loop(row) as lane:
        tir.store(scratch, ys + lane, tir.reinterpret("float32", at[0]))
        tir.store(scratch, xs + lane, tir.reinterpret("float32", at[1]))
        tir.store(at, 1, at[1] + 1)
        with tir.when(at[1] == d["pitch"]):
            tir.store(at, 1, tir.const(0, "int32"))
            tir.store(at, 0, at[0] + 1)
            if not schedule.whole:
                with tir.when(at[0] * d["pitch"] == d["length"]):
                    tir.store(at, 0, tir.const(0, "int32"))
    kind = f"int32x{lanes}"
    zero, ones = tir.const(0, "int32", lanes), tir.const(-1, "int32", lanes)
    with tir.loop(d["taps"]) as tap:
        dy, dx = (tir.bind(tir.splat(args["w3"][tap * TABLE_FIELDS + i], lanes)) for i in (1, 2))
        target = tir.bind(xs + (tap + 1) * row)
        rows, pitch = tir.splat(d["rows"], lanes), tir.splat(d["pitch"], lanes)
        with tir.loop(row // lanes) as v:
            y = tir.bind(tir.reinterpret(kind, tir.load(scratch, ys + v * lanes, lanes)) + dy)
            x = tir.bind(tir.reinterpret(kind, tir.load(scratch, xs + v * lanes, lanes)) + dx)
            mask = tir.select(y < zero, zero, tir.select(y < rows, ones, zero))
            mask = tir.select(x < zero, zero, tir.select(x < pitch, mask, zero))
            tir.store(scratch, target + v * lanes, tir.reinterpret(f"float32x{lanes}", mask), lanes)


def _pack_block(
    args: tir.Arguments, schedule: ConvSchedule, d: dict[str, tir.Expr], place: _Tile, block: tir.Expr
) -> None:
    """Pack the input of a tile for the columns of a block: `block` rows of `tile` floats."""
    tile = schedule.tile
    first_column = tir.bind(block * d["block"])
    with tir.loop(tir.minimum(d["block"], d["columns"] - first_column)) as r:
        entry = tir.bind((first_column + r) * TABLE_FIELDS)
        plane = tir.bind(place.group * d["group_planes"] + args["w3"][entry])
        moved, mask = tir.const(0, "int32"), place.masks
        if schedule.masked:
            moved = tir.bind(args["w3"][entry + 1] * d["pitch"] + args["w3"][entry + 2])
            mask = tir.bind(place.masks + (args["w3"][entry + 3] + 2) * schedule.mask_row)
        target = tir.bind(r * tile)
        if schedule.whole:
            source = tir.bind((place.image * d["planes"] + plane) * d["plane"] + place.first + moved)
            _pack_row(args, schedule, d, (source, target, mask), schedule.vectors)
        else:
            last = tir.bind(tir.minimum(tir.floor_div(place.first + tile - 1, d["length"]), d["images"] - 1))
            with tir.loop(last + 1 - place.image) as i:
                image = tir.bind(place.image + i)
                # A run's last vector may write past its end: the next run, or the next row, comes after and is right.
                lane = tir.bind(tir.maximum(image * d["length"] - place.first, 0))
                stop = tir.bind(tir.minimum((image + 1) * d["length"] - place.first, tile))
                position = tir.bind(place.first + lane - image * d["length"] + moved)
                source = tir.bind((image * d["planes"] + plane) * d["plane"] + position)
                vectors = tir.ceil_div(stop - lane, schedule.lanes)
                _pack_row(args, schedule, d, (source, tir.bind(target + lane), tir.bind(mask + lane)), vectors)


def _pack_row(
    args: tir.Arguments,
    schedule: ConvSchedule,
    d: dict[str, tir.Expr],
    places: tuple[tir.Expr, tir.Expr, tir.Expr],
    vectors: tir.Expr | int,
) -> None:
    """Copy so many vectors from x to the tile, both given by their first float, through the mask."""
    lanes, x, scratch = schedule.lanes, args["x"], args["scratch"]
    packed = args.view("scratch", schedule.dtype) if schedule.half else scratch
    source, target, mask = places

    def put(at: tir.Expr | int, value: tir.Expr, width: int) -> None:
        if schedule.half:
            value = tir.cast(f"float16x{width}" if width > 1 else "float16", value)
        tir.store(packed, target + at, value, width)

    def masked(value: tir.Expr, at: tir.Expr, width: int) -> tir.Expr:
        if not schedule.masked:
            return value
        bits, kind = (f"{name}x{width}" if width > 1 else name for name in ("int32", "float32"))
        kept = tir.reinterpret(bits, tir.load(scratch, mask + at, width))
        return tir.reinterpret(kind, tir.reinterpret(bits, value) & kept)

    def copy_vectors() -> None:
        if isinstance(vectors, int):
            for line in range(0, schedule.tile, _LINE):
                # Of the next tile, as for y: of large maps only a few lines of each plane are read in turn.
                tir.prefetch(x, source + schedule.tile + line)
            for v in range(vectors):
                at = v * lanes
                put(at, masked(tir.load(x, source + at, lanes), at, lanes), lanes)
        else:
            with tir.loop(vectors) as v:
                at = tir.bind(v * lanes)
                put(at, masked(tir.load(x, source + at, lanes), at, lanes), lanes)

    if schedule.whole and not schedule.masked:
        copy_vectors()
        return
    stop = tir.bind(source + vectors * lanes)
    with tir.when(tir.both(source >= 0, stop <= d["total"])):
        copy_vectors()
    # Near both ends of x a vector would read outside of it.
    with tir.when(tir.either(source < 0, stop > d["total"])), tir.loop(stop - source) as lane:
        inside = tir.bind(tir.maximum(tir.minimum(source + lane, d["total"] - 1), 0))
        put(lane, masked(tir.load(x, inside), lane, 1), 1)


def _quad(
    args: tir.Arguments,
    schedule: ConvSchedule,
    epilogue: Epilogue,
    d: dict[str, tir.Expr],
    place: _Tile,
    quad: tir.Expr,
    block: tir.Expr,
    target: tuple[tir.Expr, tir.Expr],
) -> None:
    """Add one block of columns to the sums of four rows; after the last block finish them."""
    first_row, sums = target
    work = Quad(args, schedule, quad, sums)
    work.begin(block)
    if schedule.direct:
        plane = tir.bind(place.image * d["planes"] + place.group * d["group_planes"] + block * d["block"])
        pitch = tir.bind(tir.cast("int64", d["plane"]))
        work.add(tir.bind(tir.cast("int64", plane) * pitch + tir.cast("int64", place.first)), (args["x"], pitch))
    elif schedule.half:
        work.add(tir.const(0, "int64"), (args.view("scratch", "float16"), tir.const(schedule.tile, "int64")))
    else:
        work.add(tir.const(0, "int64"))
    if not schedule.whole:
        work.keep()
        return
    if schedule.half:
        work.keep()  # which adds the block to the sums in float32, also after the last one
    else:
        with tir.when(block < d["blocks"] - 1):
            work.keep()
    with tir.when(block == d["blocks"] - 1):
        for member in range(QUAD):
            output = tir.bind(first_row + work.rows[member])
            with tir.when(work.rows[member] < d["chunk"]):
                at = tir.bind((place.image * d["outputs"] + output) * d["length"] + place.first)
                for line in range(0, schedule.tile, _LINE):
                    # Of the next tile: processors do not fetch ahead of so many rows, and those of large maps are far.
                    tir.prefetch(args["y"], at + schedule.tile + line)
                    if epilogue.residual:
                        tir.prefetch(args["residual"], at + schedule.tile + line)
                for v in range(schedule.vectors):
                    lane = v * schedule.lanes
                    total = work.total(member, v)
                    if schedule.half:
                        kept = sums + work.rows[member] * schedule.tile + lane
                        total = tir.load(args["scratch"], kept, schedule.lanes)
                    _finish(args, epilogue, d, total, output, at + lane, schedule.lanes)


def _finish(
    args: tir.Arguments,
    epilogue: Epilogue,
    d: dict[str, tir.Expr],
    value: tir.Expr,
    output: tir.Expr,
    at: tir.Expr,
    lanes: int,
) -> None:
    """Scale, shift and the epilogue; store to y."""
    scale = tir.splat(args["bias"][d["outputs"] + output], lanes)
    shift = tir.splat(args["bias"][output], lanes)
    tir.store(args["y"], at, epilogue.apply(args, value * scale, shift, at, lanes), lanes)


def _store_runs(
    args: tir.Arguments,
    schedule: ConvSchedule,
    epilogue: Epilogue,
    d: dict[str, tir.Expr],
    place: _Tile,
    output: tir.Expr,
    sums: tir.Expr,
) -> None:
    """Finish the sums of one row of the weight: of each run in the tile, the positions that count."""
    lanes, tile, scratch = schedule.lanes, schedule.tile, args["scratch"]
    first_run = tir.bind(tir.floor_div(place.first, d["run_pitch"]))
    last_run = tir.floor_div(place.first + tile - 1, d["run_pitch"])
    last_run = tir.bind(tir.minimum(last_run, d["images"] * d["runs"] - 1))
    with tir.loop(last_run + 1 - first_run) as i:
        run = tir.bind(first_run + i)
        lane = tir.bind(tir.maximum(run * d["run_pitch"] - place.first, 0))
        within = tir.bind(place.first + lane - run * d["run_pitch"])
        count = tir.bind(tir.maximum(tir.minimum(d["run"] - within, tile - lane), 0))
        image, number = tir.floor_div(run, d["runs"]), tir.floor_mod(run, d["runs"])
        at = tir.bind(((image * d["outputs"] + output) * d["runs"] + number) * d["run"] + within)
        full = tir.bind(tir.floor_div(count, lanes))
        with tir.loop(full) as v:
            value = tir.load(scratch, sums + lane + v * lanes, lanes)
            _finish(args, epilogue, d, value, output, tir.bind(at + v * lanes), lanes)
        with tir.loop(count - full * lanes) as rest:
            done = tir.bind(full * lanes + rest)
            _finish(args, epilogue, d, scratch[sums + lane + done], output, tir.bind(at + done), 1)


def reference(
    x: npt.NDArray[np.float32],
    packed: QuadWeight,
    window: Window,
    terms: npt.NDArray[np.float32],
    residual: npt.NDArray[np.float32] | None,
    epilogue: Epilogue,
) -> npt.NDArray[np.float32]:
    """What the kernel computes, from its packed arrays: x `[N, I, H, W]` gives `[N, O, OH, OW]`.

    Args:
        x: the input.
        packed: the weight `[O, I / groups * taps]`.
        window: of the convolution.
        terms: `[2 * O]`, what is added to the scaled sums, then the scales.
        residual: of the output's shape, or None.
        epilogue: what follows.
    """
    outputs, groups = packed.shape[0], window.groups
    channels = x.shape[1] // groups
    weight = packed.unpack().numpy().reshape(groups, outputs // groups, channels, *window.kernel)
    height, width = window.output(*x.shape[2:])
    (py, px), (sy, sx), (dy, dx) = window.padding, window.stride, window.dilation
    (ey, ex) = window.extra
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (py, py + ey), (px, px + ex)))
    grouped = padded.reshape(len(x), groups, channels, *padded.shape[2:])
    total = np.zeros((len(x), groups, outputs // groups, height, width))
    for ky in range(window.kernel[0]):
        for kx in range(window.kernel[1]):
            y, z = ky * dy, kx * dx
            part = grouped[..., y : y + sy * (height - 1) + 1 : sy, z : z + sx * (width - 1) + 1 : sx]
            total += np.einsum("goc,ngchw->ngohw", weight[..., ky, kx], part)
    shift, scale = terms.reshape(2, outputs, 1, 1).astype(np.float64)
    scaled = total.reshape(len(x), outputs, height, width) * scale
    return epilogue.reference(scaled.astype(np.float32), shift.astype(np.float32), residual)
