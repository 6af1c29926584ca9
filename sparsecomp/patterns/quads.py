"""The packed form of a weight whose rows are each their own (unstructured, N:M): rows in fours.

The kernels of linears and convolutions add to the sums of four rows at once. Rows are sorted by how many columns they
keep, so that the four of a quad need one count and few zeros to fill it up, and the loops of neighbouring quads end at
the same place, which the branch predictor likes. Among rows of about the same count, those that share most columns
become the pairs of a quad: a shared column is loaded once for two rows. A column number within its block has 8 bits,
and eight of them make one word of 64 bits, since loads are what bounds the loop.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Int32 = npt.NDArray[np.int32]

QUAD = 4
QUAD_FIELDS = 8
MOST_COLUMNS = 256
"""Columns of a block, whose numbers have 8 bits."""
WORDS_AHEAD = 2
"""Words that kernels load before they need them: so many zeros follow the last."""
_WORD = 8  # columns
# Cells of the overlap matrices in memory at once while rows are matched.
_OVERLAP_CELLS = 1 << 24
# Rows among which partners are looked for; beyond, their counts differ too much.
_WINDOW = 16


@dataclass(frozen=True, eq=False)
class QuadWeight:
    """A weight `[O, K]`, perhaps of several groups of rows, as quads of rows over blocks of columns.

    Chunks of rows (none crosses the border of a group), in them blocks of columns, in them quads.

    Attributes:
        shape: (O, K) of the weight.
        groups: groups that the rows fall into.
        chunk: rows of a chunk, a multiple of 4; the last chunk of a group may have fewer.
        block: columns of a block, at most 256; the last block may have fewer.
        values: float32; for a half word of shared columns 8, for another one 4.
        words: uint64, each eight columns within their block, in two halves: of a pair, the other pair, twice; or of the
            four rows. Those of the four rows begin a new word. `WORDS_AHEAD` zeros follow.
        quads: int32 `[quads, 8]`: where its values start, where its words start, half words of shared columns, other
            half words, its four rows within the chunk; `chunk` stands for no row.
        starts: int32 `[chunks * blocks + 1]`, the first quad of each block of each chunk.
    """

    shape: tuple[int, int]
    groups: int
    chunk: int
    block: int
    values: npt.NDArray[np.float32]
    words: npt.NDArray[np.uint64]
    quads: Int32
    starts: Int32

    @property
    def group_rows(self) -> int:
        """Rows of a group."""
        return self.shape[0] // self.groups

    @property
    def group_chunks(self) -> int:
        """Chunks of a group."""
        return -(-self.group_rows // self.chunk)

    @property
    def blocks(self) -> int:
        """Blocks of columns."""
        return -(-self.shape[1] // self.block)

    @property
    def nbytes(self) -> int:
        """Bytes of the four arrays."""
        return self.values.nbytes + self.words.nbytes + self.quads.nbytes + self.starts.nbytes

    @classmethod
    def pack(cls, weight: Tensor, *, chunk: int, block: int, groups: int = 1) -> QuadWeight:
        """Pack a weight.

        Args:
            weight: `[O, K]`, float32 or a type that float32 holds exactly; negative zeros are dropped as zeros.
            chunk: rows of a chunk, a multiple of 4.
            block: columns of a block, 1 to 256.
            groups: groups of rows; they divide O.

        Raises:
            ValueError: not a matrix, or sizes out of range, or more than 2^31 - 1 entries.
        """
        if weight.dim() != 2:
            raise ValueError(f"a weight is a matrix [outputs, inputs]; given shape {tuple(weight.shape)}")
        if chunk < QUAD or chunk % QUAD or not 1 <= block <= MOST_COLUMNS:
            raise ValueError(
                f"chunk must be a multiple of 4 and block 1 to {MOST_COLUMNS}; given chunk={chunk}, block={block}"
            )
        if groups < 1 or weight.shape[0] % groups:
            raise ValueError(f"groups must divide the {weight.shape[0]} rows of the weight; given {groups}")
        if weight.numel() > 2**31 - 1:
            raise ValueError(f"the weight has more than {2**31 - 1} entries, which int32 cannot address")
        dense = weight.detach().to("cpu", torch.float32).numpy()
        builder = _Builder(block)
        size = dense.shape[0] // groups
        for first in range(0, dense.shape[0] if dense.shape[1] else 0, max(size, 1)):
            for start in range(first, first + size, chunk):
                builder.add_chunk(dense[start : min(start + chunk, first + size)], chunk)
        return cls((dense.shape[0], dense.shape[1]), groups, chunk, block, *builder.arrays())

    def unpack(self) -> Tensor:
        """Return the weight `[O, K]` in float32, bit for bit as packed but for negative zeros."""
        dense = np.zeros(self.shape, np.float32)
        columns = self.words.view(np.uint8)
        for chunk in range(self.groups * self.group_chunks if self.shape[1] else 0):
            group, index = divmod(chunk, self.group_chunks)
            first_row = group * self.group_rows + index * self.chunk
            for block in range(self.blocks):
                at = chunk * self.blocks + block
                for quad in self.quads[self.starts[at] : self.starts[at + 1]]:
                    for row, value, word in _entries(quad):
                        if self.values[value]:
                            dense[first_row + row, block * self.block + columns[word]] = self.values[value]
        return torch.from_numpy(dense)


def _entries(quad: Int32) -> list[tuple[int, int, int]]:
    """For every slot of a quad its row in the chunk, where its value and where its column (of 8 bits) stand."""
    value, word, shared, own = (int(field) for field in quad[:4])
    rows = [int(row) for row in quad[QUAD_FIELDS - QUAD :]]
    steps = [(step, member) for step in range(2 * shared) for member in range(QUAD)]
    found = [(rows[member], value + 4 * step + member, 8 * word + 2 * step + member // 2) for step, member in steps]
    value, word = value + 8 * shared, word + -(-shared // 2)
    steps = [(step, member) for step in range(own) for member in range(QUAD)]
    return found + [(rows[member], value + 4 * step + member, 8 * word + 4 * step + member) for step, member in steps]


class _Builder:
    """Collects the arrays chunk by chunk."""

    def __init__(self, block: int) -> None:
        self._block = block
        self._values: list[npt.NDArray[np.float32]] = [np.empty(0, np.float32)]
        self._columns: list[npt.NDArray[np.uint8]] = [np.empty(0, np.uint8)]
        self._quads: list[Int32] = [np.empty((0, QUAD_FIELDS), np.int32)]
        self._counts: list[int] = []
        self._value_count = self._word_count = 0

    def arrays(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint64], Int32, Int32]:
        starts = np.concatenate([[0], np.cumsum(self._counts, dtype=np.int64)]).astype(np.int32)
        spare = np.zeros(_WORD * WORDS_AHEAD, np.uint8)
        words = np.concatenate([*self._columns, spare]).view(np.uint64)
        return np.concatenate(self._values), words, np.concatenate(self._quads), starts

    def add_chunk(self, dense: npt.NDArray[np.float32], chunk: int) -> None:
        rows, inputs = dense.shape
        padded = np.zeros((-(-rows // QUAD) * QUAD, -(-inputs // self._block) * self._block), np.float32)
        padded[:rows, :inputs] = dense
        for first in range(0, inputs, self._block):
            self._add_block(padded[:, first : first + self._block], rows, chunk)

    def _add_block(self, tile: npt.NDArray[np.float32], rows: int, chunk: int) -> None:
        order = _fours(tile != 0)
        values = tile[order]  # [quads, 4, columns]
        kept = values != 0
        common = np.stack([kept[:, 0] & kept[:, 1], kept[:, 2] & kept[:, 3]], axis=1)
        shared = common.sum(axis=2).min(axis=1) // 2 * 2
        taken = common & (np.cumsum(common, axis=2) <= shared[:, None, None])
        own = kept & ~np.repeat(taken, 2, axis=1)
        steps = own.sum(axis=2).max(axis=1)
        value_counts, shared_words = 4 * (shared + steps), -(-shared // 4)
        word_counts = shared_words + -(-steps // 2)
        value0, word0 = np.cumsum(value_counts) - value_counts, np.cumsum(word_counts) - word_counts
        packed = np.zeros(int(value_counts.sum()), np.float32)
        columns = np.zeros(_WORD * int(word_counts.sum()), np.uint8)

        quad, pair, column = np.nonzero(taken)
        step = (np.cumsum(taken, axis=2) - 1)[quad, pair, column]
        columns[_WORD * word0[quad] + 2 * step + pair] = column
        for member in (0, 1):
            packed[value0[quad] + 4 * step + 2 * pair + member] = values[quad, 2 * pair + member, column]
        quad, row, column = np.nonzero(own)
        step = (np.cumsum(own, axis=2) - 1)[quad, row, column]
        columns[_WORD * (word0 + shared_words)[quad] + 4 * step + row] = column
        packed[(value0 + 4 * shared)[quad] + 4 * step + row] = values[quad, row, column]

        heads = np.stack([self._value_count + value0, self._word_count + word0, shared // 2, steps], axis=1)
        members = np.where(order < rows, order, chunk)
        self._quads.append(np.concatenate([heads, members], axis=1).astype(np.int32))
        self._counts.append(len(order))
        self._values.append(packed)
        self._columns.append(columns)
        self._value_count += len(packed)
        self._word_count += len(columns) // _WORD


def _fours(kept: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Rows `[quads, 4]` for `kept [rows, columns]`: of about one count, in pairs that share columns."""
    rows = len(kept)
    counts = kept.sum(axis=1)
    order = np.argsort(-counts, kind="stable")
    whole = rows - rows % _WINDOW
    pairs = []
    for part in (order[:whole].reshape(-1, _WINDOW), order[whole:].reshape(1, -1)):
        if part.size:
            matched = _matched_pairs(kept[part])
            pairs.append(np.take_along_axis(part[:, None, :], matched, axis=2).reshape(len(part), -1, 2))
    quads = []
    for windows in pairs:
        # Of a window, pairs that share about as much go together.
        common = (kept[windows[..., 0]] & kept[windows[..., 1]]).sum(axis=2)
        ranked = np.argsort(-common, axis=1, kind="stable")
        quads.append(np.take_along_axis(windows, ranked[..., None], axis=1).reshape(-1, QUAD))
    return np.concatenate(quads)


def _matched_pairs(kept: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
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
