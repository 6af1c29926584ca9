"""`CudaTarget`: what sparse products cost on an NVIDIA card, asked with or without one, and their kernels on one."""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sparsecomp.targets import scales as kept
from sparsecomp.targets.base import DENSE, Candidate, DeviceKernel, Problem, Target, WeightFacts
from sparsecomp.targets.cuda import cost, own
from sparsecomp.targets.cuda.cards import RATES, Card, card, card_here, card_names
from sparsecomp.targets.cuda.ffn import CudaRows, FfnThreshold
from sparsecomp.targets.cuda.kernels import CompiledKernel, SemiStructured
from sparsecomp.targets.skip import SkipRows, SkipSpec

SEMI = Candidate("semi_structured", "2:4")
"""PyTorch's semi-structured products: cuSPARSELt."""
FFN_THRESHOLD = "ffn_threshold"
"""What the factor of an FFN that skips is kept under."""


def names() -> tuple[str, ...]:
    """The targets of this family; `cuda` is the card of this machine."""
    return ("cuda", *(f"cuda:{name}" for name in card_names()))


@functools.cache
def create(name: str) -> CudaTarget:
    """The target of a name, such as `cuda:h100`.

    Raises:
        ValueError: the name is `cuda`, and there is no card with sparse tensor cores here.
    """
    wanted = name.partition(":")[2]
    if wanted:
        return CudaTarget(card(wanted))
    here = card_here()
    return CudaTarget(here, kept.load(scales_of(here))[0])


def scales_of(found: Card) -> str:
    """The name that the factors of a card are kept under."""
    return f"cuda-{found.name}"


def scale_name(kernel: str, dtype: torch.dtype) -> str:
    """The name of a kernel's factor for an element type: those of 16 bits share one, the kernel's own."""
    return kernel if RATES[dtype] == "half" else f"{kernel}, {RATES[dtype]}"


class CudaTarget(Target):
    """An NVIDIA card.

    Args:
        card: the card.
        scales: by `scale_name`, what a kernel was measured to take over what is predicted. Where a type has none, that
            of 16 bits counts, and 1 where there is none of these either.
    """

    device = "cuda"
    fuses = False
    skips = ("relu", "threshold")
    skip_tokens = 1
    watches_skips = False
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16, torch.int8)

    def __init__(self, card: Card, scales: Mapping[str, float] | None = None) -> None:
        self.card = card
        self._scales = scales or {}
        self.name = f"cuda:{card.name}"
        origin = "fitted to published times" if card.measured else "with constants of another card, nothing measured"
        ours = f"kernels other than {SEMI.kernel} are estimated, no card has run them"
        if self._scales:
            ours = "scaled by what was measured on this machine"
        if self._lacks_cusparselt():
            ours += "; PyTorch has no cuSPARSELt here, so 2:4 is left to these kernels"
        self.description = f"{self.name}, {card.board}, {card.sms} multiprocessors; {origin}; {ours}"

    def why_not_here(self) -> str | None:
        """See `Target.why_not_here`."""
        if not torch.cuda.is_available():
            return f"PyTorch {torch.__version__} sees no NVIDIA GPU"
        major, minor = torch.cuda.get_device_capability()
        if self.card.arch != f"sm_{major}{minor}":
            return (
                f"the GPU here is {torch.cuda.get_device_name()}, of sm_{major}{minor}; the card's is {self.card.arch}"
            )
        return None

    def _lacks_cusparselt(self) -> bool:
        """Whether the card is here, and what would multiply 2:4 on it is not: some builds of PyTorch come without."""
        return self.why_not_here() is None and not torch.backends.cusparselt.is_available()

    def for_model(self, nbytes: int) -> CudaTarget:
        """See `Target.for_model`; of more than the L2 cache holds nothing is left there when a weight's turn comes."""
        if self.card.streamed or nbytes <= self.card.l2:
            return self
        found = copy.copy(self)
        found.card = replace(self.card, streamed=True)
        return found

    def candidates(self, facts: WeightFacts, allowed: Collection[str] | None = None) -> list[Candidate]:
        """See `Target.candidates`."""
        if facts.nonzeros == facts.out_features * facts.in_features:
            return [DENSE]
        semi = [SEMI] if own.takes_two_four(facts, allowed) and not self._lacks_cusparselt() else []
        return [DENSE, *semi, *own.offers(facts, allowed)]

    def predict(self, candidate: Candidate, problem: Problem) -> float:
        """See `Target.predict`; infinity for 2:4 where the libraries do not take the weight, or lose by its size.

        What `own` offers is estimated, no card has run these kernels; `sparsecomp calibrate` scales the prices.
        """
        return self._predict(candidate, problem) * self._scale(candidate.kernel, problem.dtype)

    def _scale(self, name: str, dtype: torch.dtype) -> float:
        return self._scales.get(scale_name(name, dtype), self._scales.get(name, 1.0))

    def _predict(self, candidate: Candidate, problem: Problem) -> float:
        if problem.tokens == 0:
            return 0.0
        if candidate.is_dense:
            return cost.predict_us(self.card, problem, sparse=False)
        if candidate != SEMI:
            return own.predict_us(self.card, candidate, problem)
        rows = cost.ROWS.get(problem.dtype)
        shape = (problem.facts.out_features, problem.facts.in_features)
        if rows is None or min(shape) < cost.CHANNELS or any(size % rows for size in shape):
            return float("inf")
        return cost.predict_us(self.card, problem, sparse=True)

    def prepare(self, candidate: Candidate, weight: Tensor) -> DeviceKernel:
        """See `Target.prepare`.

        Raises:
            ValueError: it is no candidate of this target, or the weight does not satisfy its pattern.
            ModuleNotFoundError: NVRTC, which compiles our kernels, is not installed.
        """
        if candidate != SEMI:
            kernel = own.kernel_of(candidate, weight.dtype)
            if kernel is None:
                raise ValueError(f"target {self.name} has no kernel {candidate} for {weight.dtype}")
            return CompiledKernel(kernel, weight, self.card.arch)
        if not own.TWO_FOUR.check(weight):
            raise ValueError(f"{candidate} needs a weight of the pattern 2:4")
        return SemiStructured(weight)

    def predict_skip(
        self,
        facts: WeightFacts,
        kept: float,
        tokens: int,
        threads: int,
        dtype: torch.dtype = torch.float32,
        by_input: bool = True,
    ) -> float:
        """See `Target.predict_skip`: of a linear of an FFN, estimated; a launch is counted for each of them."""
        us = own.predict_ffn_us(self.card, facts, kept, tokens, dtype, by_input)
        return us * self._scale(FFN_THRESHOLD, dtype)

    def skip_rows(self, matrix: Tensor) -> CudaRows:
        """See `Target.skip_rows`."""
        return CudaRows(matrix)

    def prepare_skip(self, spec: SkipSpec, rows: Sequence[SkipRows]) -> FfnThreshold:
        """See `Target.prepare_skip`.

        Raises:
            ValueError: there is no kernel for it.
            ModuleNotFoundError: NVRTC, which compiles our kernels, is not installed.
        """
        return FfnThreshold(spec, [row for row in rows if isinstance(row, CudaRows)], self.card.arch)

    def packed_bytes(self, candidate: Candidate, facts: WeightFacts, dtype: torch.dtype = torch.float32) -> int:
        """See `Target.packed_bytes`: by cuSPARSELt half of the entries, and two bits for each of them."""
        entries = facts.out_features * facts.in_features
        if candidate.is_dense:
            return entries * dtype.itemsize
        if candidate != SEMI:
            return own.packed_bytes(candidate, facts, dtype.itemsize)
        return entries * dtype.itemsize // 2 + entries // 8
