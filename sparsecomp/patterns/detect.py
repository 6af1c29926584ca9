"""Which patterns a weight already satisfies: a checkpoint that was pruned elsewhere says so only through its zeros.

The families are fixed: N:M and V:N:M with M of 4, 8 and 16 and V of 4 to 64, VENOM's V:N:4:M with N of 1 and 2 and the
same M and V, kernel patterns of 9 and 25 taps with the same V, the blocks below, and unstructured. Unions of rows and
counts of columns are built from one size to the next, so a 4096 x 4096 weight takes a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsecomp.patterns import groups
from sparsecomp.patterns.pattern import Pattern
from sparsecomp.patterns.taps import slots, used_taps

GROUP_SIZES = (4, 8, 16)
PANEL_ROWS = (4, 8, 16, 32, 64)
VENOM = (2, 4)
"""N and K of VENOM's patterns, as sparse tensor cores have them."""
TAPS = (9, 25)
BLOCKS = (
    *((64, 1), (32, 1), (16, 1), (8, 1), (4, 1)),
    *((64, 64), (32, 32), (16, 16), (8, 8), (4, 4)),
    *((1, 16), (1, 8), (1, 4)),
)

# Any weight is a weight of blocks, if every block counts as kept. It is reported as one where at least this share of a
# block kernel's products is needed: XNNPACK asks the same, 3.6 of 4 and 1.8 of 2, before it takes blocks.
BLOCK_FILL = 0.9


@dataclass(frozen=True)
class Detection:
    """A pattern that a weight satisfies.

    Attributes:
        pattern: the tightest of its family: the least N, the largest share of zeros.
        density: nonzeros / entries of the weight.
        fill: nonzeros / slots of the pattern, in [0, 1], as `Pattern.measure` gives it.
    """

    pattern: Pattern
    density: float
    fill: float


def detect(weight: Tensor) -> list[Detection]:
    """Find every pattern of the families that a weight satisfies.

    Fullest first (in hundredths), then the one with the largest panels, unstructured last among equals.

    Of each family (an N:M, V:N:M or V:N:4:M of one V and M, blocks of one size) the tightest is reported: the least N,
    the share of empty blocks; `Pattern.covers` tells which others follow. Blocks are reported from a fill of 0.9 on, if
    at least one is empty, unstructured with its share of zeros (fill 1). A weight with no zeros is reported as dense
    alone.

    Args:
        weight: `[O, I]`, any type that compares with zero. NaN is not zero; a negative zero is.

    Raises:
        ValueError: the weight is not a matrix.
    """
    mask = groups.nonzero_mask(groups.as_matrix(weight))
    nonzeros, entries = int(torch.count_nonzero(mask)), mask.numel()
    if nonzeros == entries:
        return [Detection(Pattern("dense"), 1.0, 1.0)]

    found: list[tuple[Pattern, float]] = []
    singles: dict[int, int] = {}
    union, previous = mask, 1
    for v in (1, *PANEL_ROWS):
        union, previous = groups.union_rows(union, v // previous), v
        counts = _group_counts(union)
        # What the union of few rows does not satisfy, a union of more rows, which contains it, does not either.
        least = {m: _least_n(count, m, mask.shape) for m, count in counts.items()}
        singles = singles or least
        here = _taps_of(union, v, mask.shape, nonzeros) + _groups_of(least, singles, v, mask.shape, nonzeros)
        here += _blocks_of(union, counts, v, mask.shape, nonzeros)
        found += here
        if v > 1 and not here:
            break
    found.append((Pattern("unstructured", sparsity=groups.shortest_share(nonzeros, entries)), 1.0))
    # Rounded, so that a few zeros among the kept entries do not put unstructured before the pattern they lie in.
    found.sort(key=lambda item: (-round(item[1], 2), item[0].kind == "unstructured", -max(item[0].v, item[0].rows)))
    return [Detection(pattern, nonzeros / entries, fill) for pattern, fill in found]


def kept_columns(weight: Tensor, sizes: Iterable[int]) -> dict[int, int]:
    """Count the columns that panels of `v` consecutive rows keep, summed over the panels.

    That is the length of `PanelWeight.pack(weight, v, signed_zeros=False).cols`, at a fraction of the cost.

    Args:
        weight: `[O, I]`. A negative zero counts as a zero.
        sizes: the v's, in any order.

    Returns:
        `{v: columns}` in ascending order of v.

    Raises:
        ValueError: the weight is not a matrix or a size is below 1.
    """
    union, previous = groups.nonzero_mask(groups.as_matrix(weight)), 1
    mask = union
    result = {}
    for v in sorted(set(sizes)):
        if v < 1:
            raise ValueError(f"a panel has at least one row, given {v}")
        union = groups.union_rows(union, v // previous) if v % previous == 0 else groups.union_rows(mask, v)
        previous = v
        result[v] = int(torch.count_nonzero(union))
    return result


def _group_counts(union: Tensor) -> dict[int, Tensor]:
    """Kept columns of every group: uint8 `[P, ceil(I / m)]` for each of the group sizes."""
    counts, previous = union.view(torch.uint8), 1
    result = {}
    for m in GROUP_SIZES:
        counts, previous = groups.fold_columns(counts, m // previous), m
        result[m] = counts
    return result


def _least_n(count: Tensor, m: int, shape: torch.Size) -> int:
    """The least N under which no group keeps more than it may, of counts `[P, ceil(I / m)]`."""
    whole, tail = divmod(shape[1], m)
    n = groups.least_n(int(count[:, :whole].max()), m, m) if whole else 1
    return max(n, groups.least_n(int(count[:, whole].max()), m, tail)) if tail else n


def _groups_of(
    least: dict[int, int], singles: dict[int, int], v: int, shape: torch.Size, nonzeros: int
) -> list[tuple[Pattern, float]]:
    """N:M (v of 1), V:N:M or VENOM's V:N:4:M, from the least N of panels and of single rows for every group size."""

    def fill(n: int, m: int) -> float:
        whole, tail = divmod(shape[1], m)
        return nonzeros / (shape[0] * (whole * n + (groups.group_limit(n, m, tail) if tail else 0)))

    found = []
    for m, n in least.items():
        if n < m:
            found.append((Pattern("nm", n=n, m=m) if v == 1 else Pattern("vnm", n=n, m=m, v=v), fill(n, m)))
        if singles[m] <= VENOM[0] < n <= VENOM[1] < m:
            found.append((Pattern("venom", n=singles[m], m=m, v=v, k=VENOM[1]), fill(singles[m], m)))
    return found


def _taps_of(union: Tensor, v: int, shape: torch.Size, nonzeros: int) -> list[tuple[Pattern, float]]:
    """Kernel patterns of several channels, with the least number of taps."""
    found = []
    for taps in TAPS:
        if shape[1] % taps or shape[1] == taps or not shape[0]:
            continue
        n = max(1, int(used_taps(union, 1, taps).max()))
        if n < taps:
            found.append((Pattern("taps", n=n, m=taps, v=v), nonzeros / slots((shape[0], shape[1]), n, taps)))
    return found


def _blocks_of(
    union: Tensor, counts: dict[int, Tensor], rows: int, shape: torch.Size, nonzeros: int
) -> list[tuple[Pattern, float]]:
    """Blocks of that many rows that are nearly full where they are not empty."""
    found = []
    for cols in (cols for block_rows, cols in BLOCKS if block_rows == rows):
        occupied = _occupied(union, counts, cols)
        kept = int(torch.count_nonzero(occupied))
        slots = groups.occupied_slots(occupied, rows, cols, (shape[0], shape[1]))
        fill = nonzeros / slots if slots else 1.0
        if kept < occupied.numel() and fill >= BLOCK_FILL:
            share = groups.shortest_share(kept, occupied.numel())
            found.append((Pattern("block", rows=rows, cols=cols, sparsity=share), fill))
    return found


def _occupied(union: Tensor, counts: dict[int, Tensor], cols: int) -> Tensor:
    """Which groups of columns keep any, from the kept columns and their counts by group size."""
    if cols == 1:
        return union
    if cols in counts:
        return counts[cols] > 0
    widest = max(counts)
    return groups.fold_columns(counts[widest], cols // widest) > 0
