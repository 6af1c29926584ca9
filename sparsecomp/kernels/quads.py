"""The inner loop over a quad: four rows of a weight against a tile that lies in scratch, column by column.

Shared by the linear and the convolution kernel, which differ in how the tile comes to scratch and where sums go. What
bounds the loop are loads, so eight column numbers are one load, and so are the weights of a step where the processor
has the shuffles to spread them; a column that two rows keep is loaded once for both. The four rows take turns, so that
multiply-adds which follow each other do not wait for each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsecomp.kernels import tir
from sparsecomp.patterns.quads import QUAD, QUAD_FIELDS, WORDS_AHEAD

WEIGHTS = ("float32", "uint64", "int32", "int32")  # values, words, quads, and the first quad of each block of a chunk
_AHEAD = 256  # floats
_AHEAD_VECTORS = 4  # of a row
_COLUMN_BITS = 8


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
    def word_steps(self) -> int:
        """Steps whose columns one load brings, each a column for each row; more than CPUs short of loads would gain."""
        return 2 if self.spread == "shuffle" and not self.half else 1

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
        self._own_words: tuple[tir.Expr, tir.Expr] = (None, None)  # the array, and where in it they begin
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
        shared, own, steps = self._shared, self._own, self._shape.word_steps
        halves = self._args.view("w1", "uint32")
        begin = tir.bind(self._word + tir.ceil_div(shared, 2))
        self._own_words = (self._args["w1"], begin) if steps == 2 else (halves, tir.bind(begin * 2))
        self._load_words()
        with tir.loop(shared) as i:
            word = tir.bind(tir.cast("uint64", halves[self._word * 2 + i]))
            self._fetch(self._value, i)
            for half in (0, 1):
                factors = self._factors(tir.bind(self._value + i * (2 * QUAD) + half * QUAD))
                self._multiply((0, 1), factors, self._column(base, word, 2 * half))
                self._multiply((2, 3), factors, self._column(base, word, 2 * half + 1))
        value = tir.bind(self._value + shared * (2 * QUAD))
        whole = own if steps == 1 else tir.bind(tir.floor_div(own, steps))
        with tir.loop(whole) as i:
            word = self._next_word(i)
            if steps == 2:
                self._fetch(value, i)
            for step in range(steps):
                self._step(base, word, step, tir.bind(value + i * (steps * QUAD) + step * QUAD))
        if steps == 2:
            with tir.when(own > whole * 2):
                self._step(base, self._next_word(whole), 0, tir.bind(value + whole * (2 * QUAD)))

    def _fetch(self, value: tir.Expr, i: tir.Expr) -> None:
        """Ask for weights that come 1 KB later: 32 multiply-adds hide the instruction."""
        tir.prefetch(self._args["w0"], value + i * (2 * QUAD) + _AHEAD, locality=3)

    def _step(self, base: tir.Expr, word: tir.Expr, step: int, at: tir.Expr) -> None:
        """Multiply by one column of each row, the four of a step of `word`."""
        factors = self._factors(at)
        for member in range(QUAD):
            self._multiply(
                (member,), factors, self._column(base, word, QUAD * step + member, self._shape.word_steps * QUAD)
            )

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
        on a Zen 5 a step of 16 multiply-adds took 11.0 cycles with words of four columns loaded where they are used,
        10.2 so, and takes 9.5 with words of eight. Steps of 28 are long enough for the load, and leave no registers. A
        Neoverse N1 keeps its multipliers busy for 0.88 of a step instead of 0.72 (llvm-mca). SSE, without
        multiply-adds, is 3 % slower at 50 % zeros.
        """
        if not self._shape.words_ahead:
            return
        words, begin = self._own_words
        self._ahead = tir.registers(WORDS_AHEAD, "uint64")
        for i in range(WORDS_AHEAD):
            tir.store(self._ahead, i, tir.cast("uint64", words[begin + i]), 1)

    def _next_word(self, i: tir.Expr) -> tir.Expr:
        """Word `i` of those with a column for each row, the one after the last call's."""
        words, begin = self._own_words
        at = tir.bind(begin + i)
        if not self._shape.words_ahead:
            return tir.bind(tir.cast("uint64", words[at]))
        word = tir.bind(self._ahead[0])
        for k in range(1, WORDS_AHEAD):
            tir.store(self._ahead, k - 1, self._ahead[k], 1)
        tir.store(self._ahead, WORDS_AHEAD - 1, tir.cast("uint64", words[at + WORDS_AHEAD]), 1)
        return word

    def _column(self, base: tir.Expr, word: tir.Expr, place: int, places: int = QUAD) -> tir.Expr:
        """Where column `place` of the `places` in a word lies."""
        shifted = word >> tir.const(_COLUMN_BITS * place, "uint64") if place else word
        low = shifted & tir.const(0xFF, "uint64") if place < places - 1 else shifted
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
