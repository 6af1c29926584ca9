"""The inner loop over a quad: four rows of a weight against a tile that lies in scratch, column by column.

Shared by the linear and the convolution kernel, which differ in how the tile comes to scratch and where sums go. What
bounds the loop are loads, so four column numbers are one load, and so are the weights of a step where the processor has
the shuffles to spread them; a column that two rows keep is loaded once for both. The four rows take turns, so that
multiply-adds which follow each other do not wait for each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsecomp.kernels import tir
from sparsecomp.patterns.quads import QUAD, QUAD_FIELDS, WORDS_AHEAD

WEIGHTS = ("float32", "uint64", "int32", "int32")  # values, words, quads, and the first quad of each block of a chunk
_LINE = 16  # floats
_AHEAD = 4096  # floats
_AHEAD_VECTORS = 4  # of a row


@dataclass(frozen=True)
class QuadShape:
    """Registers of a quad: `vectors` vectors of `lanes` tokens or positions for each of its four rows.

    Attributes:
        lanes: float32 in a vector.
        vectors: vectors for each row.
        spread: `load` broadcasts each weight from memory; `shuffle` loads four at once, for CPUs that run short of
            loads before they do of shuffles.
        half: whether weights, tile and the sums over a block of columns are float16, see `HalfShape`.
    """

    lanes: int
    vectors: int
    spread: str
    half: ClassVar[bool] = False

    @property
    def dtype(self) -> str:
        """Type of what is multiplied."""
        return "float16" if self.half else "float32"

    @property
    def tile(self) -> int:
        """Tokens or positions of a tile."""
        return self.lanes * self.vectors

    @property
    def words_ahead(self) -> bool:
        """Whether words are loaded before their step."""
        return self.vectors <= _AHEAD_VECTORS


class HalfShape(QuadShape):
    """Registers of a quad whose weights, tile and sums over a block of columns are float16.

    Sums over several blocks wait, and are added up, in float32.
    """

    half: ClassVar[bool] = True


def weight_types(shape: QuadShape) -> tuple[str, ...]:
    """Element types of the arrays of a weight."""
    return (shape.dtype, *WEIGHTS[1:])


class Quad:
    """The sums of one quad in registers: begin, add a block of columns, and what follows is the kernel's."""

    def __init__(self, args: tir.Arguments, shape: QuadShape, number: tir.Expr, sums: tir.Expr) -> None:
        """Read the quad `number`; its sums wait in scratch at `sums` + row * tile."""
        self._args, self._shape = args, shape
        self._block: tir.Expr = None
        self._ahead: tir.Expr = None  # words that are loaded already
        fields = [tir.bind(args["w2"][number * QUAD_FIELDS + i]) for i in range(QUAD_FIELDS)]
        self._value, self._word, self._shared, self._own, *self.rows = fields
        self._waiting = [tir.bind(sums + row * shape.tile) for row in self.rows]
        self._total = tir.registers(QUAD * shape.tile, shape.dtype)
        self._slots = [
            (member, v * shape.lanes, member * shape.tile + v * shape.lanes)
            for member in range(QUAD)
            for v in range(shape.vectors)
        ]

    def begin(self, block: tir.Expr) -> None:
        """Zeros before the first block of columns, else the sums that wait; in float16 always zeros."""
        lanes, self._block = self._shape.lanes, block
        zero = tir.const(0.0, self._shape.dtype, lanes)
        if self._shape.half:
            for _, _, slot in self._slots:
                tir.store(self._total, slot, zero, lanes)
            return
        with tir.when(block == 0):
            for _, _, slot in self._slots:
                tir.store(self._total, slot, zero, lanes)
        with tir.when(block > 0):
            for member, at, slot in self._slots:
                waiting = tir.load(self._args["scratch"], self._waiting[member] + at, lanes)
                tir.store(self._total, slot, waiting, lanes)

    def add(self, base: tir.Expr, maps: tuple[tir.Expr, tir.Expr] | None = None) -> None:
        """Add a block of columns.

        Args:
            base: where the first of them begins (int64).
            maps: the buffer that they are in and the floats from one to the next (int64), if they are not in scratch,
                a tile each.
        """
        self._columns = maps or (self._args["scratch"], tir.const(self._shape.tile, "int64"))
        shared, own = self._shared, self._own
        self._load_words()
        with tir.loop(shared) as i:
            word = self._next_word(self._word + i)
            # A line of what will be read later: large models come from memory. Only here, where 32 multiply-adds hide
            # the instruction; asking in the other loop too costs more than it brings.
            tir.prefetch(self._args["w0"], self._value + i * _LINE + _AHEAD)
            for half in (0, 1):
                factors = self._factors(tir.bind(self._value + i * (2 * QUAD) + half * QUAD))
                self._multiply((0, 1), factors, self._column(base, word, 2 * half))
                self._multiply((2, 3), factors, self._column(base, word, 2 * half + 1))
        value, first = tir.bind(self._value + shared * (2 * QUAD)), tir.bind(self._word + shared)
        with tir.loop(own) as i:
            word = self._next_word(first + i)
            factors = self._factors(tir.bind(value + i * QUAD))
            for member in range(QUAD):
                self._multiply((member,), factors, self._column(base, word, member))

    def keep(self) -> None:
        """Put the sums back where they wait."""
        lanes = self._shape.lanes
        if self._shape.half:
            with tir.when(self._block == 0):
                self._widen(add=False)
            with tir.when(self._block > 0):
                self._widen(add=True)
            return
        for member, at, slot in self._slots:
            total = tir.load(self._total, slot, lanes)
            tir.store(self._args["scratch"], self._waiting[member] + at, total, lanes)

    def _widen(self, *, add: bool) -> None:
        """Put sums of float16 where they wait in float32, or add them to what waits."""
        lanes, scratch = self._shape.lanes, self._args["scratch"]
        for member, at, slot in self._slots:
            place = self._waiting[member] + at
            total = tir.cast(f"float32x{lanes}", tir.load(self._total, slot, lanes))
            tir.store(scratch, place, tir.load(scratch, place, lanes) + total if add else total, lanes)

    def total(self, member: int, v: int) -> tir.Expr:
        """One vector of the sums of one row."""
        return tir.load(self._total, member * self._shape.tile + v * self._shape.lanes, self._shape.lanes)

    def _load_words(self) -> None:
        """Load the first words: each is in a register two steps before its columns are needed.

        A multiply-add whose address waits for a load lets load ports idle, however many instructions are in flight:
        on a Zen 5 a step of 16 multiply-adds takes 11.0 cycles with words loaded where they are used, and 10.2 so.
        Steps of 28 are long enough for the load, and leave no registers. A Neoverse N1 keeps its multipliers busy for
        0.88 of a step instead of 0.72 (llvm-mca). SSE, without multiply-adds, is 3 % slower at 50 % zeros.
        """
        if not self._shape.words_ahead:
            return
        self._ahead = tir.registers(WORDS_AHEAD, "uint64")
        for i in range(WORDS_AHEAD):
            tir.store(self._ahead, i, self._args["w1"][self._word + i], 1)

    def _next_word(self, at: tir.Expr) -> tir.Expr:
        """The word at `at`, the one after the last call's."""
        if not self._shape.words_ahead:
            return tir.bind(self._args["w1"][at])
        word = tir.bind(self._ahead[0])
        for i in range(1, WORDS_AHEAD):
            tir.store(self._ahead, i - 1, self._ahead[i], 1)
        tir.store(self._ahead, WORDS_AHEAD - 1, self._args["w1"][at + WORDS_AHEAD], 1)
        return word

    def _column(self, base: tir.Expr, word: tir.Expr, place: int) -> tir.Expr:
        shifted = word >> tir.const(16 * place, "uint64") if place else word
        low = shifted & tir.const(0xFFFF, "uint64") if place < QUAD - 1 else shifted
        return tir.bind(base + tir.cast("int64", low) * self._columns[1])

    def _multiply(self, members: tuple[int, ...], factors: list[tir.Expr], at: tir.Expr) -> None:
        lanes, tile = self._shape.lanes, self._shape.tile
        for v in range(self._shape.vectors):
            activation = tir.load(self._columns[0], at + tir.const(v * lanes, "int64"), lanes)
            activation = tir.bind(activation) if len(members) > 1 else activation
            for member in members:
                slot = member * tile + v * lanes
                total = tir.load(self._total, slot, lanes) + factors[member] * activation
                tir.store(self._total, slot, total, lanes)

    def _factors(self, at: tir.Expr) -> list[tir.Expr]:
        """Four weights, each in every lane."""
        lanes, values = self._shape.lanes, self._args["w0"]
        if self._shape.spread == "load":
            return [tir.bind(tir.splat(values[at + member], lanes)) for member in range(QUAD)]
        four = tir.load(values, at, QUAD)
        if self._shape.half:
            # Four of eight lanes: AArch64 multiplies by one of them.
            fenced = tir.fence(four, QUAD, self._shape.dtype)
            return [tir.bind(tir.shuffle(fenced, fenced, [member] * lanes)) for member in range(QUAD)]
        # The fence keeps LLVM from making four loads of it again.
        repeated = tir.fence(tir.repeat(four, QUAD, lanes // QUAD), lanes)
        return [
            tir.bind(tir.shuffle(repeated, repeated, [i - i % QUAD + member for i in range(lanes)]))
            for member in range(QUAD)
        ]
