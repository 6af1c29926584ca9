"""The one module that imports TVM: a few words to write kernels with, and the way from TIR to an object file.

Kernels are written with TVM's IR builder rather than with TVMScript, because they are families: the number of vectors,
rows and tokens in registers, and the lanes of a vector, are Python numbers when a kernel is built.

TVM's usual calling convention passes packed arguments and needs its run time. A function that is not put
through ``MakePackedAPI`` keeps its plain C signature instead, so the objects built here depend on nothing.

TVM is imported by the first function that needs it: a start with a warm kernel cache never does, which saves seconds.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Every kernel has these parameters, in this order; `w0`..`w3` are the arrays of the packed weight, `dims` the sizes.
SIGNATURE: tuple[tuple[str, str], ...] = (
    ("x", "float32"),
    ("bias", "float32"),
    ("residual", "float32"),
    ("y", "float32"),
    ("scratch", "float32"),
    ("w0", ""),
    ("w1", ""),
    ("w2", ""),
    ("w3", ""),
    ("dims", "int32"),
)
# Buffers are views of bare pointers: their length is the caller's business, TIR only wants an upper bound.
_UNBOUNDED = 1 << 30

Expr = Any  # TVM ships no type information


@functools.cache
def _tvm() -> Any:
    import tvm

    return tvm


@functools.cache
def _tirx() -> Any:
    from tvm import tirx

    return tirx


@functools.cache
def _script() -> Any:
    from tvm.tirx.script.builder import ir

    return ir


@functools.cache
def _ir_builder() -> Any:
    from tvm.script.ir_builder import IRBuilder

    return IRBuilder


class Arguments:
    """The buffers of a kernel under construction by name, and the range ``begin``..``end`` of its items."""

    def __init__(self, buffers: dict[str, Expr], handles: dict[str, Expr], begin: Expr, end: Expr) -> None:
        self._buffers, self._handles = buffers, handles
        self.begin = begin
        self.end = end

    def __getitem__(self, name: str) -> Expr:
        return self._buffers[name]

    def view(self, name: str, dtype: str) -> Expr:
        """The same memory with entries of another type; what is written as one type must not be read as another."""
        key = f"{name}.{dtype}"
        if key not in self._buffers:
            self._buffers[key] = _script().decl_buffer((_UNBOUNDED,), dtype, data=self._handles[name])
        return self._buffers[key]

    def sizes(self, *names: str) -> list[Expr]:
        """The leading entries of ``dims``, bound once, in the order of ``names`` (which are for the reader)."""
        return [bind(self["dims"][position]) for position, _ in enumerate(names)]


class KernelBuilder:
    """Builds one PrimFunc with :data:`SIGNATURE`; ``weights`` gives the element types of ``w0``..``w3``.

    Used as a context manager: inside, statements are emitted by the functions of this module; afterwards
    :attr:`function` is the result.
    """

    def __init__(self, name: str, weights: Sequence[str]) -> None:
        self.name = name
        self._types = dict(SIGNATURE) | {f"w{i}": (weights[i] if i < len(weights) else "int32") for i in range(4)}
        self.function: Expr = None

    @contextmanager
    def build(self) -> Iterator[Arguments]:
        """Everything that is emitted inside becomes the body of the kernel."""
        with _ir_builder()() as builder, _script().prim_func(private=True):
            _script().func_name(self.name)
            _script().func_attr({"_tirx().noalias": True})
            handles = {name: _script().arg(name, _script().handle(dtype)) for name, dtype in self._types.items()}
            begin, end = _script().arg("begin", _script().int32()), _script().arg("end", _script().int32())
            buffers = {
                name: _script().decl_buffer((_UNBOUNDED,), self._types[name], data=handle)
                for name, handle in handles.items()
            }
            yield Arguments(buffers, handles, begin, end)
        self.function = builder.get()


# -- expressions ------------------------------------------------------------------------------------------------------


def bind(value: Expr) -> Expr:
    """Evaluate once, here; the result is a variable."""
    return _script().Bind(value)


def settle(value: Expr, dtype: str = "int32") -> Expr:
    """As `bind`, and TVM does not look behind the variable.

    Its analysis puts the values of variables into each other, which takes seconds where many follow from each other.
    LLVM sees through it.
    """
    held = registers(1, dtype)
    store(held, 0, value)
    return bind(held[0])


def const(value: float, dtype: str = "float32", lanes: int = 1) -> Expr:
    """A constant, in every lane."""
    scalar = _tirx().IntImm(dtype, int(value)) if "int" in dtype else _tirx().FloatImm(dtype, float(value))
    return splat(scalar, lanes)


def splat(value: Expr, lanes: int) -> Expr:
    """A scalar in every lane."""
    return value if lanes == 1 else _tirx().Broadcast(value, lanes)


def load(buffer: Expr, index: Expr, lanes: int = 1) -> Expr:
    """Consecutive entries from an index on."""
    return buffer[index] if lanes == 1 else buffer[_script().ramp(index, 1, lanes)]


def load_step(buffer: Expr, index: Expr, lanes: int, step: int) -> Expr:
    """Every entry (step 1) or every second one (step 2) from an index on; none behind the last one is read."""
    vector = load(buffer, index, lanes)
    if step == 1:
        return vector
    # The second load overlaps the first by one entry.
    second = bind(load(buffer, index + (lanes - 1), lanes))
    half = lanes // 2
    picked = [2 * k for k in range(half)] + [lanes + 2 * k + 1 for k in range(half)]
    return shuffle(bind(vector), second, picked)


def store(buffer: Expr, index: Expr, value: Expr, lanes: int = 1) -> None:
    """Store consecutive entries from an index on."""
    _script().buffer_store(buffer, value, [index if lanes == 1 else _script().ramp(index, 1, lanes)])


def cast(dtype: str, value: Expr) -> Expr:
    """Convert the value."""
    return _tirx().Cast(dtype, value)


def reinterpret(dtype: str, value: Expr) -> Expr:
    """Keep the bits."""
    return _tirx().reinterpret(dtype, value)


def select(condition: Expr, then: Expr, otherwise: Expr) -> Expr:
    """Lane by lane; both sides are evaluated."""
    return _tirx().Select(condition, then, otherwise)


def maximum(a: Expr, b: Expr) -> Expr:
    """Lane by lane."""
    return _tirx().Max(a, b)


def minimum(a: Expr, b: Expr) -> Expr:
    """Lane by lane."""
    return _tirx().Min(a, b)


def both(a: Expr, b: Expr) -> Expr:
    """Whether both of two scalar conditions hold."""
    return _tirx().And(a, b)


def either(a: Expr, b: Expr) -> Expr:
    """Whether one of two scalar conditions holds, or both."""
    return _tirx().Or(a, b)


def negate(a: Expr) -> Expr:
    """Whether a scalar condition does not hold."""
    return _tirx().Not(a)


def first_lanes(vector: Expr, count: Expr, lanes: int) -> Expr:
    """The first lanes of a vector of float32; zero in the others."""
    numbers = vector_of([const(i, "int32") for i in range(lanes)])
    return select(numbers < splat(count, lanes), vector, const(0.0, lanes=lanes))


def fence(vector: Expr, lanes: int, dtype: str = "float32") -> Expr:
    """The same vector; LLVM does not see through it and so does not merge what makes it with what uses it."""
    return bind(llvm_call(f"{dtype}x{lanes}", "llvm.arithmetic.fence", vector))


def popcount(value: Expr) -> Expr:
    """Bits that are set."""
    return _tirx().popcount(value)


def ceil_div(a: Expr, b: int | Expr) -> Expr:
    """Ceiling of a quotient of sizes, which are never negative: a plain machine division."""
    return _tirx().truncdiv(a + b - 1, b)


def floor_div(a: Expr, b: int | Expr) -> Expr:
    """Quotient of sizes."""
    return _tirx().truncdiv(a, b)


def floor_mod(a: Expr, b: int | Expr) -> Expr:
    """Remainder of sizes."""
    return _tirx().truncmod(a, b)


def vector_of(scalars: Sequence[Expr]) -> Expr:
    """One vector from scalar expressions."""
    return _tirx().Shuffle(list(scalars), [_tirx().IntImm("int32", i) for i in range(len(scalars))])


def lane(vector: Expr, index: int) -> Expr:
    """One lane as a scalar."""
    return _tirx().Shuffle([vector], [_tirx().IntImm("int32", index)])


def shuffle(a: Expr, b: Expr, indices: Sequence[int]) -> Expr:
    """Lanes picked from ``a`` followed by ``b``."""
    return _tirx().Shuffle([a, b], [_tirx().IntImm("int32", i) for i in indices])


def repeat(vector: Expr, lanes: int, times: int) -> Expr:
    """A vector of so many lanes, several times over."""
    return _tirx().Shuffle([vector] * times, [_tirx().IntImm("int32", i) for i in range(lanes * times)])


def llvm_call(dtype: str, intrinsic: str, *args: Expr) -> Expr:
    """A pure LLVM intrinsic, by its LLVM name."""
    return _tirx().call_llvm_pure_intrin(dtype, intrinsic, *args)


def _address_of(buffer: Expr, index: Expr) -> Expr:
    return _tirx().address_of(buffer[index])


# -- statements -------------------------------------------------------------------------------------------------------


def loop(extent: Expr | int) -> Any:
    """A serial loop, used as a context manager that gives the loop variable."""
    return _script().serial(extent)


def prefetch(buffer: Expr, index: Expr, locality: int = 2) -> None:
    """Ask for the cache line of an entry (LLVM's `prefetch` for reading).

    Args:
        buffer: that holds the entry.
        index: of the entry.
        locality: 3 brings it into the L1 cache, 2 into the L2 cache.
    """
    hints = [const(value, "int32") for value in (0, locality, 1)]
    call = _tirx().call_llvm_intrin("void", "llvm.prefetch.p0", _address_of(buffer, index), *hints)
    _script().evaluate(call)


@contextmanager
def when(condition: Expr) -> Iterator[None]:
    """Statements that run only if a scalar condition holds."""
    with _script().If(condition), _script().Then():
        yield


def registers(count: int, dtype: str = "float32") -> Expr:
    """A small local array that LLVM keeps in registers (all indices are constants after unrolling)."""
    return _script().alloc_buffer((count,), dtype, scope="local")


def transpose(vectors: Sequence[Expr]) -> list[Expr]:
    """Transpose a square of `lanes` vectors of `lanes` entries (4, 8 or 16) by rounds of two-input shuffles.

    Within 128 bits four rows are transposed by interleaving single entries and then pairs, which are one instruction
    each on x86 (unpack) and AArch64 (zip); then the blocks of 128 bits are.
    """
    rows = list(vectors)
    lanes = len(rows)
    quads = range(0, lanes, 4)
    for width in (1, 2):
        result: list[Expr] = []
        for first in quads:
            group = rows[first : first + 4]
            upper = [(0, 1), (2, 3)] if width == 1 else [(0, 2), (1, 3)]
            for a, b in upper:
                for half in (0, 2):
                    if width == 1:
                        order = [i for q in quads for e in (0, 1) for i in (q + half + e, lanes + q + half + e)]
                    else:
                        order = [
                            i for q in quads for i in (q + half, q + half + 1, lanes + q + half, lanes + q + half + 1)
                        ]
                    result.append(bind(shuffle(group[a], group[b], order)))
        rows = result
    # The blocks of 128 bits: rounds that x86 has one instruction for (vshuff32x4, vperm2f128).
    blocks = lanes // 4
    if blocks == 1:
        return rows
    halves = [list(range(lanes // 2)) + list(range(lanes, lanes + lanes // 2))]
    halves.append([i + lanes // 2 for i in halves[0]])
    if blocks == 2:
        return [bind(shuffle(rows[i], rows[i + 4], order)) for order in halves for i in range(4)]
    every = [[i for b in range(odd, 2 * blocks, 2) for i in range(4 * b, 4 * b + 4)] for odd in (0, 1)]
    result = []
    for half_order in halves:
        low = [bind(shuffle(rows[i], rows[i + 4], half_order)) for i in range(4)]
        high = [bind(shuffle(rows[i + 8], rows[i + 12], half_order)) for i in range(4)]
        result += [bind(shuffle(low[i], high[i], picked)) for picked in every for i in range(4)]
    return result


def transpose_half(vectors: Sequence[Expr]) -> list[Expr]:
    """Transpose a square of 8 vectors of 8 float16 by exchanging blocks of 1, 2 and 4: AArch64's `trn`, each time."""
    rows, lanes = list(vectors), len(vectors)
    for width in (1, 2, 4):
        low = [i if not i & width else lanes + i - width for i in range(lanes)]
        high = [i + width if not i & width else lanes + i for i in range(lanes)]
        for i in range(lanes):
            if not i & width:
                a, b = rows[i], rows[i + width]
                rows[i], rows[i + width] = bind(shuffle(a, b, low)), bind(shuffle(a, b, high))
    return rows


# -- to an object file ------------------------------------------------------------------------------------------------


def lower(function: Expr, name: str, target: dict[str, Any]) -> tuple[Any, Any]:
    """TIR passes up to (not including) code generation; returns the module and the TVM target.

    Kernels are written in vectors, unrolled, and over flat buffers, so code generation needs almost nothing more; TVM's
    simplifier would only rewrite index arithmetic that was laid out for the addressing modes.
    """
    tvm_target = _tvm().target.Target(target)
    tvm_target = tvm_target.with_host(tvm_target)
    module = _tvm().IRModule({name: function})
    for step in (_tirx().transform.BindTarget(tvm_target), _tirx().transform.LowerIntrin()):
        module = step(module)
    return _tvm().IRModule({name: module[name].with_attr("global_symbol", name)}), tvm_target


def compile_object(function: Expr, name: str, target: dict[str, Any]) -> tuple[bytes, str]:
    """Object code of ``function`` as the plain C function ``name``, and its assembly for reading."""
    module, tvm_target = lower(function, name, target)
    built = _tvm().get_global_func("target.build.llvm")(module, tvm_target)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.o"
        built.write_to_file(str(path))
        return path.read_bytes(), str(built.inspect_source("asm"))
