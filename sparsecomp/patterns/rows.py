"""The packed form of a weight whose rows are each their own (unstructured, N:M): pairs of rows over blocks of columns.

With the tokens in the vector lanes, every kept weight costs one load of activations for one multiply-add, and the loads
are what bounds the loop. Two rows that keep the same column share its load, so rows are taken in pairs, matched by how
many columns they share; since the sums of a block of columns return to memory anyway, each block matches its rows anew.
The pairs of a block are sorted by the lengths of their lists. The columns of a pair are three lists: kept by both, kept
by one or the other (alternating, so that two sums grow at once), and what the fuller row has left.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Int32 = npt.NDArray[np.int32]

# Beyond this density two rows share about as much by chance as by matching, and matching costs compile time.
_MATCH_BELOW = 0.4
# Cells of the overlap matrices in memory at once while rows are matched.
_OVERLAP_CELLS = 1 << 24
PAIR_FIELDS = 5


@dataclass(frozen=True, eq=False)
class RowWeight:
    """A weight `[O, I]` as pairs of rows over blocks of columns.

    Chunks of `chunk` rows, in them blocks of `block` columns, in them pairs: the order in which a kernel reads.

    Attributes:
        shape: (O, I) of the weight.
        chunk: rows of a chunk, even; the last chunk may have fewer.
        block: columns of a block, at most 65536; the last block may have fewer.
        values: float32 `[nonzeros]`.
        columns: uint16 `[entries]`, column within its block; a column that both rows of a pair keep stands once.
        pairs: int32 `[pairs, 5]`: where its values start, where its columns start, columns kept by both, alternating
            columns of each, columns left of the first row.
        rows: int32 `[pairs, 2]`, rows within the chunk; `chunk` stands for no row (odd numbers of rows).
    """

    shape: tuple[int, int]
    chunk: int
    block: int
    values: npt.NDArray[np.float32]
    columns: npt.NDArray[np.uint16]
    pairs: Int32
    rows: Int32

    @property
    def chunks(self) -> int:
        """Chunks of rows."""
        return -(-self.shape[0] // self.chunk)

    @property
    def blocks(self) -> int:
        """Blocks of columns."""
        return -(-self.shape[1] // self.block)

    @property
    def nbytes(self) -> int:
        """Bytes of the four arrays."""
        return self.values.nbytes + self.columns.nbytes + self.pairs.nbytes + self.rows.nbytes

    @property
    def shared(self) -> int:
        """Columns that stand once for two rows."""
        return int(self.pairs[:, 2].sum())

    @classmethod
    def pack(cls, weight: Tensor, *, chunk: int, block: int) -> RowWeight:
        """Pack a weight.

        Args:
            weight: `[O, I]`, float32 or a type that float32 holds exactly; negative zeros are dropped as zeros.
            chunk: rows of a chunk, even.
            block: columns of a block, 1 to 65536.

        Raises:
            ValueError: not a matrix, or sizes out of range, or more than 2^31 - 1 kept entries.
        """
        if weight.dim() != 2:
            raise ValueError(f"a weight is a matrix [outputs, inputs]; given shape {tuple(weight.shape)}")
        if chunk < 2 or chunk % 2 or not 1 <= block <= 65536:
            raise ValueError(f"chunk must be even and block within 1 to 65536; given chunk={chunk}, block={block}")
        dense = weight.detach().to("cpu", torch.float32).numpy()
        outputs, inputs = dense.shape
        if np.count_nonzero(dense) > 2**31 - 1:
            raise ValueError(f"the weight keeps more than {2**31 - 1} entries, which int32 cannot address")
        builder = _Builder(block, match=bool(np.count_nonzero(dense) < _MATCH_BELOW * max(dense.size, 1)))
        for start in range(0, outputs if inputs else 0, chunk):
            builder.add_chunk(dense[start : start + chunk], chunk)
        return cls((outputs, inputs), chunk, block, *builder.arrays())

    def unpack(self) -> Tensor:
        """Return the weight `[O, I]` in float32, bit for bit as packed but for negative zeros."""
        dense = np.zeros(self.shape, np.float32)
        if not dense.size:
            return torch.from_numpy(dense)
        pair, row, value_at, column_at = self.entries()
        place = self._places()
        dense[place[0][pair, row], place[1][pair] + self.columns[column_at]] = self.values[value_at]
        return torch.from_numpy(dense)

    def entries(self) -> tuple[Int32, Int32, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """For every kept entry its pair, its row in the pair (0 or 1), and where its value and its column stand."""
        value0, column0, both, turns, left = self.pairs.astype(np.int64).T
        pairs = np.arange(len(self.pairs))
        parts = []
        for member in (0, 1):
            owner, step = _steps(pairs, both)
            parts.append((owner, member, value0[owner] + 2 * step + member, column0[owner] + step))
            owner, step = _steps(pairs, turns)
            turn = 2 * step + member
            parts.append((owner, member, value0[owner] + 2 * both[owner] + turn, column0[owner] + both[owner] + turn))
        owner, step = _steps(pairs, left)
        done = both[owner] + 2 * turns[owner] + step
        parts.append((owner, 0, value0[owner] + both[owner] + done, column0[owner] + done))
        return (
            np.concatenate([part[0] for part in parts]).astype(np.int32),
            np.concatenate([np.full(len(part[0]), part[1]) for part in parts]).astype(np.int32),
            np.concatenate([part[2] for part in parts]),
            np.concatenate([part[3] for part in parts]),
        )

    def _places(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """For every pair its two rows of the weight, and the first column of its block."""
        first_row, first_column = [], []
        for index in range(self.chunks):
            size = min(self.chunk, self.shape[0] - index * self.chunk)
            count = -(-size // 2)
            first_row.append(np.full(count * self.blocks, index * self.chunk))
            first_column.append(np.repeat(np.arange(self.blocks) * self.block, count))
        rows = (np.concatenate(first_row)[:, None] + self.rows).astype(np.int64)
        return rows, np.concatenate(first_column)


def _steps(owners: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], ...]:
    """Every owner as often as its count, with the running number."""
    owner = np.repeat(owners, counts)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)


class _Builder:
    """Collects the arrays chunk by chunk."""

    def __init__(self, block: int, match: bool) -> None:
        self._block = block
        self._match = match
        self._values: list[npt.NDArray[np.float32]] = []
        self._columns: list[npt.NDArray[np.uint16]] = []
        self._pairs: list[Int32] = []
        self._rows: list[Int32] = []
        self._value_count = 0
        self._column_count = 0

    def arrays(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint16], Int32, Int32]:
        def joined(parts: list[npt.NDArray[np.generic]], empty: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
            return np.ascontiguousarray(np.concatenate(parts)) if parts else empty

        return (
            joined(self._values, np.empty(0, np.float32)),  # type: ignore[arg-type, return-value]
            joined(self._columns, np.empty(0, np.uint16)),  # type: ignore[arg-type]
            joined(self._pairs, np.empty((0, PAIR_FIELDS), np.int32)),  # type: ignore[arg-type]
            joined(self._rows, np.empty((0, 2), np.int32)),  # type: ignore[arg-type]
        )

    def add_chunk(self, dense: npt.NDArray[np.float32], chunk: int) -> None:
        rows, inputs = dense.shape
        padded_rows, blocks = rows + rows % 2, -(-inputs // self._block)
        padded = np.zeros((padded_rows, blocks * self._block), np.float32)
        padded[:rows, :inputs] = dense
        tiles = np.ascontiguousarray(padded.reshape(padded_rows, blocks, self._block).transpose(1, 0, 2))
        kept = tiles != 0
        pairs = matched_pairs(kept) if self._match else _neighbours(blocks, padded_rows)
        block_of = np.arange(blocks)[:, None]
        # The fuller row comes first: only it has columns left when the turns end.
        counts = kept.sum(axis=2)
        swap = counts[block_of, pairs[..., 0]] < counts[block_of, pairs[..., 1]]
        pairs = np.where(swap[..., None], pairs[..., ::-1], pairs)
        # Pairs of equal trip counts follow each other, so that the branches at the ends of the loops are predicted: a
        # wide core loses as much by a mispredicted end as by the multiply-adds of a short list.
        both = (kept[block_of, pairs[..., 0]] & kept[block_of, pairs[..., 1]]).sum(axis=2)
        fuller, other = counts[block_of, pairs[..., 0]], counts[block_of, pairs[..., 1]]
        order = np.lexsort((fuller - other, other - both, both), axis=-1)
        pairs = np.take_along_axis(pairs, order[..., None], axis=1)
        first, second = pairs[..., 0], pairs[..., 1]
        self._emit(
            kept[block_of, first].reshape(-1, self._block),
            kept[block_of, second].reshape(-1, self._block),
            tiles[block_of, first].reshape(-1, self._block),
            tiles[block_of, second].reshape(-1, self._block),
        )
        # Where the number of rows is odd, the padding row is sent to the spare row behind the chunk.
        self._rows.append(np.where(pairs == rows, chunk, pairs).reshape(-1, 2).astype(np.int32))

    def _emit(
        self,
        kept_a: npt.NDArray[np.bool_],
        kept_b: npt.NDArray[np.bool_],
        values_a: npt.NDArray[np.float32],
        values_b: npt.NDArray[np.float32],
    ) -> None:
        shared = kept_a & kept_b
        only_a, only_b = kept_a & ~shared, kept_b & ~shared
        both, turns = shared.sum(1), only_b.sum(1)
        left = only_a.sum(1) - turns
        value_counts, column_counts = 2 * both + 2 * turns + left, both + 2 * turns + left
        value0, column0 = np.cumsum(value_counts) - value_counts, np.cumsum(column_counts) - column_counts
        values = np.empty(int(value_counts.sum()), np.float32)
        columns = np.empty(int(column_counts.sum()), np.uint16)

        pair, column = np.nonzero(shared)
        step = _running(pair, both)
        values[value0[pair] + 2 * step] = values_a[pair, column]
        values[value0[pair] + 2 * step + 1] = values_b[pair, column]
        columns[column0[pair] + step] = column
        for member, (only, source) in enumerate(((only_a, values_a), (only_b, values_b))):
            pair, column = np.nonzero(only)
            step = _running(pair, only.sum(1))
            turn = np.where(step < turns[pair], 2 * step + member, turns[pair] + step)
            values[value0[pair] + 2 * both[pair] + turn] = source[pair, column]
            columns[column0[pair] + both[pair] + turn] = column

        table = np.stack([self._value_count + value0, self._column_count + column0, both, turns, left], axis=1)
        self._pairs.append(table.astype(np.int32))
        self._values.append(values)
        self._columns.append(columns)
        self._value_count += len(values)
        self._column_count += len(columns)


def _running(owner: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Running number of each entry among those of its (sorted) owner."""
    return np.arange(len(owner)) - (np.cumsum(counts) - counts)[owner]


def _neighbours(blocks: int, rows: int) -> npt.NDArray[np.int64]:
    return np.broadcast_to(np.arange(rows).reshape(1, -1, 2), (blocks, rows // 2, 2))


def matched_pairs(kept: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Pairs `[blocks, rows / 2, 2]` for `kept [blocks, rows, columns]`: each row takes the one that shares most.

    A greedy matching, done for all blocks in step.
    """
    blocks, rows, _ = kept.shape
    slab = max(1, _OVERLAP_CELLS // max(rows * rows, 1))
    return np.concatenate([_matched_slab(kept[start : start + slab]) for start in range(0, blocks, slab)])


def _matched_slab(kept: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    blocks, rows, _ = kept.shape
    # Exact small integers in float32: the product runs in BLAS.
    masks = kept.astype(np.float32)
    overlap = masks @ masks.transpose(0, 2, 1)
    taken = np.zeros((blocks, rows), np.float32)  # minus infinity for a row that has its partner
    block = np.arange(blocks)
    pairs = np.empty((blocks, rows // 2, 2), np.int64)
    for turn in range(rows // 2):
        first = taken.argmax(axis=1)  # the first free row of each block
        taken[block, first] = -np.inf
        second = (overlap[block, first] + taken).argmax(axis=1)
        taken[block, second] = -np.inf
        pairs[:, turn, 0], pairs[:, turn, 1] = first, second
    return pairs
