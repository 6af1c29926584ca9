"""Weights for the tensor cores: a panel of rows chooses columns, a row keeps all or 2 of each 4 of them (VENOM)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

HALF = (torch.float16, torch.bfloat16)
TENSOR = (*HALF, torch.int8)
"""Types that the tensor cores multiply here."""
STEP = {torch.float16: 32, torch.bfloat16: 32, torch.int8: 64}
"""Columns of a sparse product; a dense one takes half of them."""


def pack_panels(weight: Tensor, rows: int, run: int = 1) -> dict[str, Tensor]:
    """Pack a weight ``[outputs, inputs]`` whose panels of rows keep the same columns, all of a kept column.

    Args:
        weight: float16 or bfloat16 for ``kernels/panel_tensor.cu`` (SPARSE 0), int8 for ``kernels/panel_int8.cu``,
            float32 for ``kernels/panel_fma.cu``.
        rows: Of a panel: 16, 32 or 64.
        run: Columns are kept in runs of so many neighbours that begin at its multiples: 1, or ``rows`` for blocks.

    Returns:
        ``weights``: int32 ``[steps, ...]``, the registers of the lanes, 32 columns a step (64 where ``run`` is); or
        float32 ``[steps, 16, rows]``. ``columns``: int32 ``[steps, columns of a step / run]``, first of each run, -1
        where a step is padded. ``starts``: int32 ``[panels + 1]``, the first step of each panel.

    Raises:
        ValueError: The weight is empty, or no matrix of these types.
    """
    _check(weight, (*TENSOR, torch.float32), rows)
    step = 16 if weight.dtype == torch.float32 else max(32, run)
    tiles, columns, starts = [], [], [0]
    for tile in _panels(weight, rows, run):
        kept = (tile != 0).reshape(rows, -1, run).any(dim=2).any(dim=0).nonzero().flatten() * run
        runs = functional.pad(kept, (0, -len(kept) % (step // run)), value=-1).reshape(-1, step // run)
        # The column after the last is zero: padding reads it.
        places = torch.where(runs[..., None] < 0, tile.shape[1], runs[..., None] + torch.arange(run))
        values = functional.pad(tile, (0, 1))[:, places.reshape(len(runs), step)]
        tiles.append(values.transpose(0, 1))
        columns.append(runs)
        starts.append(starts[-1] + len(runs))
    values = torch.cat(tiles)
    if weight.dtype == torch.float32:
        weights = values.transpose(1, 2).contiguous()
    else:
        depth = STEP[weight.dtype] // 2
        parts = values.reshape(len(values), rows // 16, 16, step // 32, 32 // depth, depth).permute(0, 3, 1, 4, 2, 5)
        weights = _registers(parts).flatten(1)
    return _with_starts(weights, torch.cat(columns), starts)


def pack_sparse_panels(weight: Tensor, rows: int) -> dict[str, Tensor]:
    """Pack any weight ``[outputs, inputs]`` for ``kernels/panel_tensor.cu`` or ``kernels/panel_int8.cu`` (SPARSE 1).

    Columns of a panel are put in order into groups of four, and a group is closed before a row has three. The form is
    that of VENOM (Castro et al., SC 2023, section 4): columns selected per panel, 2:4 among them.

    Args:
        weight: float16, bfloat16 or int8.
        rows: Of a panel: 16, 32 or 64.

    Returns:
        ``weights``: int32 ``[steps, rows / 16, 144]``: the registers of the 32 lanes, then the metadata of the lanes
        4 g and 4 g + 1 (selector 0); in int8 160, with that of all lanes. ``columns``: int32 ``[steps, 32]``, in int8
        ``[steps, 64]``, -1 where a step is padded. ``starts``: int32 ``[panels + 1]``, the first step of each panel.

    Raises:
        ValueError: The weight is empty, or no matrix of these types.
    """
    _check(weight, TENSOR, rows)
    step = STEP[weight.dtype]
    tiles, columns, starts = [], [], [0]
    for tile in _panels(weight, rows, 1):
        slots = _slots(tile != 0, step)
        steps = len(slots) // step
        chosen = torch.tensor(slots, dtype=torch.int64).reshape(steps, step)
        fours = functional.pad(tile, (0, 1))[:, chosen].transpose(0, 1).reshape(steps, rows, step // 4, 4)
        order = (fours == 0).to(torch.int8).argsort(dim=3, stable=True)[..., :2].sort(dim=3).values
        values = fours.gather(3, order).reshape(steps, rows // 16, 1, 16, step // 2)
        metadata = _metadata(order.reshape(steps, rows // 16, 2, 8, 2, step // 4))
        tiles.append(torch.cat([_registers(values).reshape(steps, rows // 16, 128), metadata], dim=2))
        columns.append(chosen)
        starts.append(starts[-1] + steps)
    return _with_starts(torch.cat(tiles), torch.cat(columns), starts)


def _check(weight: Tensor, dtypes: tuple[torch.dtype, ...], rows: int) -> None:
    if weight.ndim != 2 or not weight.numel() or weight.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"got {weight.dtype} of shape {tuple(weight.shape)}; pass a non-empty {names} matrix")
    if rows not in (16, 32, 64):
        raise ValueError(f"got panels of {rows} rows; the kernels have 16, 32 and 64")


def _panels(weight: Tensor, rows: int, run: int) -> tuple[Tensor, ...]:
    outputs, inputs = weight.shape
    return functional.pad(weight, (0, -inputs % run, 0, -outputs % rows)).split(rows)


def _registers(matrices: Tensor) -> Tensor:
    """int32 ``[..., 32, 4]`` of ``[..., 16, 16]`` in 16 bits, or of ``[..., 16, 32]`` in int8.

    That is how mma.m16n8k16 and mma.sp.m16n8k32 take them, and mma.m16n8k32 and mma.sp.m16n8k64 in int8: register i of
    lane 4 g + t has row g + 8 (i % 2), and of n values in a word the columns n t + 4 n (i // 2) and the next (PTX ISA,
    the fragments of matrix A).
    """
    values = 4 // matrices.itemsize
    lane, register = torch.arange(32)[:, None, None], torch.arange(4)[:, None]
    row = lane // 4 + 8 * (register % 2)
    column = values * (lane % 4 + 4 * (register // 2)) + torch.arange(values)
    return matrices[..., row, column].contiguous().view(torch.int32).squeeze(-1)


def _metadata(order: Tensor) -> Tensor:
    """int32 ``[steps, tiles, words]`` of the places ``[steps, tiles, 2, 8, 2, n]``, those of row 8 h + g as [h, g].

    Two bits for each place. In 16 bits (n of 8), a word has row g in its low half and row g + 8 in the high one; lane
    4 g has it of 16 columns, lane 4 g + 1 of the others. In int8 (n of 16), lane 4 g + t has row g + 8 (t % 2) of 32
    columns, the first where t < 2. These are the words of CUTLASS's `reorder_meta` as ldmatrix hands them to the lanes;
    LLVM's test of nvgpu.mma.sp.sync on a card says the same of 16 bits.
    """
    bits = (order << (2 * torch.arange(order.shape[-1]))).sum(dim=5)
    if order.shape[-1] == 16:
        return bits.permute(0, 1, 3, 4, 2).flatten(2).to(torch.int32)
    return (bits[:, :, 0] | bits[:, :, 1] << 16).flatten(2).to(torch.int32)


def _with_starts(weights: Tensor, columns: Tensor, starts: list[int]) -> dict[str, Tensor]:
    return {
        "weights": weights,
        "columns": columns.to(torch.int32),
        "starts": torch.tensor(starts, dtype=torch.int32),
    }


def _slots(kept: Tensor, step: int) -> list[int]:
    """Columns in groups of four that hold at most two kept entries of a row, -1 where a group or step is padded."""
    chosen = kept.any(dim=0).nonzero().flatten()
    columns, count = chosen.tolist(), len(chosen)
    sums = functional.pad(kept[:, chosen].to(torch.int32), (1, 3)).cumsum(dim=1)
    # Two columns always fit; whether the next three or four do is known for all places at once.
    three, four = ((sums[:, n : n + count] - sums[:, :count]).amax(dim=0).le(2).tolist() for n in (3, 4))
    slots: list[int] = []
    place = 0
    while place < count:
        taken = columns[place : place + (4 if four[place] else 3 if three[place] else 2)]
        slots += taken + [-1] * (4 - len(taken))
        place += len(taken)
    return slots + [-1] * (-len(slots) % step)
