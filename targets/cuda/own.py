"""Our kernels as candidates: which of them take a weight, and what they are estimated to cost.

No card has run them: their arithmetic and their bytes are known, and what the compiler made of them
(`kernels.json`); which share of the card's rates they reach is assumed. A multiprocessor holds as many blocks as
registers, shared memory and warps allow (`resident_blocks`), and reaches its rates as far as enough warps are there to
hide latencies. Blocks are dealt out evenly, and the multiprocessor with the most of them sets the time: the last wave
takes as long as a full one (roofline of S. Williams et al., CACM 52(4), 2009, for a block).
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch

from sparsecomp.cuda.library import FFN, KERNELS, TILE, CudaKernel, Launch
from sparsecomp.patterns import Detection, Pattern
from sparsecomp.targets.base import Candidate, Problem, WeightFacts, label_of
from sparsecomp.targets.cuda.cards import Card
from sparsecomp.targets.cuda.cost import memory_us, operands_us

TWO_FOUR = Pattern.parse("2:4")
SHARE = 0.5
"""Of the rates of the libraries (arithmetic of large products, and operands that one multiprocessor gets), and of the
multiply-adds of the CUDA cores, that ours are taken to reach."""
_WORK = {
    "panel_tensor": (8, 1.0),
    "panel_int8": (8, 1.0),
    "panel_fma": (16, 1.5),
    "rows": (32, 3.0),
    "rows_token": (32, 5.0),
    "two_four_token": (32, 4.0),
    "ffn_hidden": (32, 4.0),
    "ffn_down": (32, 7.0),
}
"""By source, or function where a source has two: warps of a multiprocessor that hide latencies, and instructions for a
multiply-add (counted in the inner loops of the sources: reading, placing and widening of an operand count as one each);
both are assumptions."""
_REGISTERS, _REGISTER_UNIT, _QUARTERS = 65536, 256, 4
_SHARED_UNIT, _RESERVED = 128, 1024  # bytes; the driver takes the second of each block


@dataclass(frozen=True)
class _Work:
    """What a kernel does for a weight.

    Attributes:
        entries: of the weight that are multiplied, with what fills up steps; 2:4 on tensor cores, at twice the rate of
            dense, counts half.
        nbytes: of the packed weight.
        rows: of x that are read for a tile of tokens, summed over the blocks.
    """

    entries: float
    nbytes: float
    rows: float


def offers(facts: WeightFacts, allowed: Collection[str] | None = None) -> list[Candidate]:
    """Our candidates for a weight; types and prices decide between them.

    Args:
        facts: of the weight.
        allowed: printed patterns that may be used; every one if None.
    """
    panels = {v: label_of(facts, v, allowed) for v in (16, 32, 64)}
    blocks = {v: _block(facts, v, allowed) for v in (16, 32, 64)}
    found = [Candidate("panel", label, (("v", v),)) for v, label in panels.items() if label is not None]
    found += [Candidate("block", _plain(made.pattern), (("v", v),)) for v, made in blocks.items() if made is not None]
    if (label := label_of(facts, 1, allowed)) is not None:
        found.append(Candidate("rows", label))
        found += [Candidate("rows_token", label, (("tokens", tokens),)) for tokens in (1, 4)]
    two_four = takes_two_four(facts, allowed)
    if (label := _venom(facts, allowed) or ("2:4" if two_four else None)) is not None:
        found += [Candidate("panel_sparse", label, (("v", v),)) for v in (16, 32, 64)]
    if two_four:
        found += [Candidate("two_four", "2:4", (("tokens", tokens),)) for tokens in (1, 4)]
    return found


def _venom(facts: WeightFacts, allowed: Collection[str] | None) -> str | None:
    """The pattern of VENOM under which `panel_sparse` takes a weight, None if it has none or that may not be used."""
    for found in facts.patterns:
        # Panels of fewer rows than the kernel's choose other columns each, so that 2:4 says as much.
        if (pattern := found.pattern).kind == "venom" and pattern.n <= TWO_FOUR.n and pattern.v % 16 == 0:
            wanted = [pattern] if allowed is None else [Pattern.parse(text) for text in allowed]
            return next((str(each) for each in wanted if each.kind == "venom" and each.admits(pattern)), None)
    return None


def takes_two_four(facts: WeightFacts, allowed: Collection[str] | None) -> bool:
    """Whether a weight satisfies 2:4, and that may be used."""
    fits = any(_is_two_four(found.pattern, facts.in_features) for found in facts.patterns)
    return fits and (allowed is None or any(Pattern.parse(text).admits(TWO_FOUR) for text in allowed))


def _is_two_four(pattern: Pattern, inputs: int) -> bool:
    """Whether weights of a pattern are 2:4; VENOM's rows keep 2 of more than 4, fours must not lie across groups."""
    aligned = pattern.m % 4 == 0 and inputs % 4 == 0
    return TWO_FOUR.admits(pattern) or (pattern.kind == "venom" and pattern.n <= TWO_FOUR.n and aligned)


def kernel_of(candidate: Candidate, dtype: torch.dtype) -> CudaKernel | None:
    """The kernel of a candidate for an element type; None if there is none."""
    params = dict(candidate.params)
    wanted = (candidate.kernel, params.get("v", 1), params.get("tokens", 0), dtype)
    return next((k for k in KERNELS if (k.family, k.rows, k.tokens, k.dtype) == wanted), None)


def resident_blocks(card: Card, registers: int, shared: int, threads: int) -> int:
    """Blocks of a kernel that a multiprocessor holds at a time; 0 if it cannot hold one.

    The rules are those of `cuda_occupancy.h` (CUDA 13.0): registers are given to warps in units, on each quarter of
    the multiprocessor; shared memory to blocks.

    Args:
        card: the card.
        registers: of a thread.
        shared: bytes of shared memory of a block.
        threads: of a block.
    """
    warps = -(-threads // 32)
    of_warp = -(-registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    by_registers = _REGISTERS // _QUARTERS // of_warp * _QUARTERS // warps
    by_shared = card.shared // (-(-(shared + _RESERVED) // _SHARED_UNIT) * _SHARED_UNIT)
    return min(by_registers, by_shared, card.warps // warps, card.blocks)


def predict_us(card: Card, candidate: Candidate, problem: Problem) -> float:
    """Microseconds of one call, estimated; infinity where there is no kernel for the problem, or none for the card."""
    kernel = kernel_of(candidate, problem.dtype)
    taken = _compiled().get(card.arch, {}).get(kernel.name) if kernel is not None else None
    facts, tokens = problem.facts, problem.tokens
    outputs, inputs, size = facts.out_features, facts.in_features, problem.dtype.itemsize
    if kernel is None or taken is None or not outputs * inputs:
        return math.inf
    try:
        launch = kernel.launch(outputs, inputs, tokens)
    except ValueError:  # too many tokens, or x does not fit into shared memory
        return math.inf
    library = card.library(problem.dtype, sparse=False)
    work, tile = _work(candidate, facts, size), kernel.tokens or TILE
    nbytes = work.nbytes + work.rows * tile * size
    us = _blocks_us(card, problem.dtype, kernel.source, launch, taken, work.entries * tile, nbytes)
    given = 4 if problem.dtype == torch.int8 else size  # bytes of an entry of y
    activations = tokens * (size * inputs + given * outputs * (1 + problem.residual))
    us = max(us, operands_us(card, work.nbytes, activations))
    if not kernel.tokens:  # x and y are turned around by kernels of PyTorch
        stride = kernel.stride(tokens)
        us += (
            2 * library.base
            + memory_us(card, 2 * size * stride * inputs)
            + memory_us(card, 2 * given * stride * outputs)
        )
    return library.base + us


def predict_ffn_us(
    card: Card, facts: WeightFacts, kept: float, tokens: int, dtype: torch.dtype, by_input: bool
) -> float:
    """Microseconds of a linear in an FFN of one token that skips hidden units; infinity where no kernel takes it.

    Args:
        card: the card.
        facts: of the weight, which is read as a dense one.
        kept: share of its rows that is read, or of its columns if `by_input`, as of down.
        tokens: of the call.
        dtype: of x, weight and output.
        by_input: see `kept`.
    """
    ffn = next((kernel for kernel in FFN if kernel.dtype == dtype), None)
    outputs, inputs, size = facts.out_features, facts.in_features, dtype.itemsize
    if ffn is None or tokens != 1 or not outputs * inputs:
        return math.inf
    entry = ffn.down_entry if by_input else ffn.hidden_entry
    taken = _compiled().get(card.arch, {}).get(f"{ffn.name}, {entry}")
    try:
        launch = ffn.launch_down(outputs) if by_input else ffn.launch_hidden(outputs, inputs)
    except ValueError:  # x does not fit into shared memory
        return math.inf
    if taken is None:
        return math.inf
    entries = outputs * inputs * kept
    # Every block reads x, or the numbers and values of all units that stay.
    beside = launch.grid[0] * (8 * inputs * kept if by_input else size * inputs)
    us = _blocks_us(card, dtype, entry, launch, taken, entries, size * entries + beside)
    # What is read of a weight that no cache holds as a whole comes from memory: other units stay for the next token.
    whole = size * outputs * inputs
    floor = operands_us(card, whole, 0) * (size * (entries + inputs + outputs) / whole)
    return card.library(dtype, sparse=False).base + max(us, floor)


def _blocks_us(
    card: Card, dtype: torch.dtype, code: str, launch: Launch, taken: list[int], products: float, nbytes: float
) -> float:
    """Microseconds until all blocks of a launch are done; infinity where a multiprocessor holds none.

    Args:
        card: the card.
        dtype: of the operands.
        code: key of `_WORK`.
        launch: the geometry.
        taken: registers of a thread, and bytes of static shared memory.
        products: multiply-adds of the blocks of one column of the grid.
        nbytes: operands of these blocks.
    """
    registers, shared = taken
    resident = resident_blocks(card, registers, shared + launch.shared, launch.block[0])
    if not resident:
        return math.inf
    wanted, instructions = _WORK[code]
    turns = math.ceil(math.prod(launch.grid) / card.sms)
    hidden = min(1.0, min(resident, turns) * launch.block[0] / 32 / wanted)
    rate = card.rate(dtype if code in ("panel_tensor", "panel_int8") else torch.float32, sparse=False)
    arithmetic = 2 * products * instructions / (1e6 * SHARE * rate / card.sms)
    arrival = nbytes / (1e3 * SHARE * card.library(dtype, sparse=False).stream)
    return turns * max(arithmetic, arrival) / launch.grid[0] / hidden


def packed_bytes(candidate: Candidate, facts: WeightFacts, size: int) -> int:
    """Bytes of the packed weight, from the facts alone; size: bytes of an entry."""
    return round(_work(candidate, facts, size).nbytes)


def _work(candidate: Candidate, facts: WeightFacts, size: int) -> _Work:
    outputs, inputs, kept = facts.out_features, facts.in_features, facts.nonzeros
    params = dict(candidate.params)
    v = params.get("v", 1)
    panels = -(-outputs // v)
    match candidate.kernel:
        case "panel":
            columns = _filled(facts.panels[v], panels, 16 if size == 4 else 32)
            return _Work(columns * v, columns * (v * size + 4) + 4 * (panels + 1), columns)
        case "panel_sparse":
            # A group of four columns ends before a row has three of them.
            slots = _filled(max(facts.panels[v], 2 * kept / v), panels, 64 if size == 1 else 32)
            return _Work(slots * v / 2, slots * (v * (size / 2 + 1 / 8) + 4) + 4 * (panels + 1), slots)
        case "block":
            found = _block(facts, v, [candidate.pattern])
            columns = (kept / found.fill if found is not None and found.fill else float(kept)) / v
            columns = _filled(columns, panels, max(32, v))
            return _Work(columns * v, columns * (v * size + 4 / v) + 4 * (panels + 1), columns)
        case "two_four":
            return _Work(outputs * inputs / 2, outputs * inputs / 2 * (size + 1 / 4), -(-outputs // 32) * inputs)
        case "rows_token":
            return _Work(kept, kept * (size + 2) + 4 * (outputs + 1), -(-outputs // 32) * inputs)
        case _:
            return _Work(kept, kept * (size + 4) + 4 * (outputs + 1), kept)


def _filled(columns: float, panels: int, step: int) -> float:
    """Columns that panels walk over, with what fills up the last step of each: they are taken to keep equally many."""
    return math.ceil(columns / panels / step) * step * panels


def _block(facts: WeightFacts, size: int, allowed: Collection[str] | None) -> Detection | None:
    """The fullest pattern of the weight whose blocks are made of blocks of a size, None if none is allowed."""
    for found in facts.patterns:
        pattern = found.pattern
        made = pattern.kind == "block" and pattern.rows % size == 0 and pattern.cols % size == 0
        if made and (allowed is None or any(Pattern.parse(text).admits(pattern) for text in allowed)):
            return found
    return None


def _plain(pattern: Pattern) -> str:
    return str(pattern).partition("@")[0]


def compiler() -> str:
    """The compiler that `kernels.json` is of, with its version."""
    return str(_content()["compiler"])


def _compiled() -> dict[str, dict[str, list[int]]]:
    """Registers of a thread and bytes of static shared memory, by architecture and kernel."""
    found: dict[str, dict[str, list[int]]] = _content()["kernels"]
    return found


@functools.cache
def _content() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(resources.files(__package__).joinpath("kernels.json").read_text("utf-8"))
    return content
