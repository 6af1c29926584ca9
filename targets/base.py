"""What a target is: the kernels that it offers for a weight, what they cost, and how they are made ready.

A target answers three questions. Which kernels could compute this weight (`candidates`)? How long would one take on
this problem (`predict`)? And, once chosen: pack the weight for it (`prepare`). The planner asks the first two, the run
time the third.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsecomp.patterns import Detection, Pattern, detect, kept_columns
from sparsecomp.targets.skip import FEW_TOKENS, DeviceSkipKernel, SkipKernel, SkipRows, SkipSpec
from sparsecomp.window import Maps, Window

PANEL_SIZES = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of output rows that kernels let share their columns; the facts of a weight count the columns for each."""


@dataclass(frozen=True)
class Candidate:
    """One way to compute a site.

    Attributes:
        kernel: `dense`, or the name of a kernel family of the target (`rows`, `panel`, `rows_few`, `panel_few`).
        pattern: the printed pattern that the weight must satisfy, such as `unstructured` or `32:2:4`.
        params: schedule parameters by name, sorted.
    """

    kernel: str
    pattern: str
    params: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        if self.kernel == "dense":
            return "dense"
        return f"{self.kernel}[{self.pattern}]"

    @property
    def is_dense(self) -> bool:
        """Whether the weight stays dense."""
        return self.kernel == "dense"


DENSE = Candidate("dense", "dense")
"""The candidate that every target offers: the framework's own product."""

DEPTHWISE = Candidate("depthwise", "dense")
"""A depthwise convolution that stays dense, computed channels first as sparse convolutions beside it want it."""


@dataclass(frozen=True)
class WeightFacts:
    """What the cost model has to know about a weight `[O, I]`; it holds no tensor.

    Attributes:
        out_features: O.
        in_features: I.
        nonzeros: entries that are not zero.
        panels: for every v of `PANEL_SIZES` the columns that panels of v rows keep, summed over the panels.
        patterns: the patterns that the weight satisfies, fullest first.
    """

    out_features: int
    in_features: int
    nonzeros: int
    panels: Mapping[int, int] = field(hash=False)
    patterns: tuple[Detection, ...]

    @classmethod
    def assumed(cls, out_features: int, in_features: int, pattern: Pattern) -> WeightFacts:
        """The facts of a weight that nobody has: what a pattern keeps of a random one, on average.

        Rows that share no columns keep each column by chance: of v such rows with density d, `1 - (1 - d)^v` of them.
        So do the rows of a panel of V:N:K:M among the columns that it chooses.

        Args:
            out_features: O.
            in_features: I.
            pattern: that it satisfies; of one that does not say how much is zero, a weight that is full.
        """
        density = pattern.nominal_density
        density = 1.0 if density is None else density
        panels = {}
        for v in PANEL_SIZES:
            if pattern.kind == "venom":
                chosen = 1 - (1 - pattern.n / pattern.k) ** min(v, pattern.v)
                kept = 1 - (1 - chosen * pattern.k / pattern.m) ** max(1.0, v / pattern.v)
            else:
                kept = 1 - (1 - density) ** max(1.0, v / pattern.shared_rows)
            panels[v] = round(-(-out_features // v) * in_features * kept)
        nonzeros = round(out_features * in_features * density)
        return cls(out_features, in_features, nonzeros, panels, (Detection(pattern, density, 1.0),))

    @property
    def density(self) -> float:
        """Nonzeros / entries, 1 for an empty weight."""
        entries = self.out_features * self.in_features
        return self.nonzeros / entries if entries else 1.0

    @classmethod
    def of(cls, weight: Tensor) -> WeightFacts:
        """Count the facts of a weight `[O, I]`.

        Raises:
            ValueError: the weight is not a matrix.
        """
        found = tuple(detect(weight))
        out_features, in_features = weight.shape
        if found and found[0].pattern.kind == "dense":
            panels = {v: -(-out_features // v) * in_features for v in PANEL_SIZES}
        else:
            panels = kept_columns(weight, PANEL_SIZES)
        return cls(out_features, in_features, panels[1], panels, found)


@dataclass(frozen=True)
class Problem:
    """What a site computes in one call: `activation(x @ W.T + bias) + residual` with x of `[tokens, I]`.

    Of a convolution the weight is seen as `[O, I / groups * taps]`.

    Attributes:
        facts: of the weight.
        tokens: rows of x; of a convolution the output positions of all images.
        threads: threads that the call may use.
        activation: as `sparsecomp.kernels.epilogue` spells it.
        residual: whether a tensor of the output's shape is added.
        dtype: of x, weight and output.
        window: of a convolution, None for a linear.
        maps: that a convolution is called with.
    """

    facts: WeightFacts
    tokens: int
    threads: int
    activation: str = "none"
    residual: bool = False
    dtype: torch.dtype = torch.float32
    window: Window | None = None
    maps: Maps | None = None


class Product(ABC):
    """A weight packed for a product that is ready to be computed.

    Attributes:
        nbytes: bytes of the packed weight.
    """

    nbytes: int

    def build(self, tokens: int, activation: str, residual: bool) -> None:  # noqa: B027 -- most kernels are built when packed
        """Compile now what a call would compile; a target that compiles nothing does nothing."""

    @property
    def source(self) -> str:
        """The generated code, for people; empty if there is none."""
        return ""


class DeviceKernel(Product):
    """A weight packed for a kernel on an accelerator, which computes in the type of x."""

    @abstractmethod
    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`x @ W.T + bias` of `[tokens, O]`, contiguous, of x's type, int32 where that is int8.

        Args:
            x: `[tokens, I]`, contiguous and not empty, on the device of the weight.
            bias: `[O]` of x's type, or None.
        """


class Kernel(Product):
    """A weight packed for a kernel on the CPU, which computes in float32."""

    @abstractmethod
    def run(self, x: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, out: Tensor) -> None:
        """Write `activation(x @ W.T + bias) + residual` to out.

        Args:
            x: `[tokens, I]`.
            bias: `[O]` or None.
            residual: `[tokens, O]` or None.
            activation: as in `Problem`.
            out: `[tokens, O]`, written.
        """

    def ready(self, tokens: int, activation: str, residual: bool) -> LinearCall:
        """What `run` does for so many tokens and PyTorch's present number of threads.

        Returns:
            A function `call(x, bias, residual, out)` of contiguous float32 tensors with any leading dimensions.
        """

        def call(x: Tensor, bias: Tensor | None, added: Tensor | None, out: Tensor) -> None:
            flat = None if added is None else added.view(tokens, -1)
            self.run(x.view(tokens, -1), bias, flat, activation, out.view(tokens, -1))

        return call


LinearCall = Callable[[Tensor, Tensor | None, Tensor | None, Tensor], None]
ConvCall = Callable[[Tensor, Tensor | None, Tensor | None, Tensor], None]


class ConvKernel(ABC):
    """A weight packed for a convolution kernel that is ready to run.

    Attributes:
        nbytes: bytes of the packed weight.
    """

    nbytes: int

    @abstractmethod
    def run(
        self, x: Tensor, terms: Tensor | None, residual: Tensor | None, epilogue: ConvEpilogue, out: Tensor
    ) -> None:
        """Write the convolution of x with its epilogue to out; all tensors are contiguous float32.

        Args:
            x: `[N, I, H, W]`.
            terms: `[2 * O]`, what is added to the scaled sums, then the scales; nothing is added or scaled if None.
            residual: of the output's shape, or None.
            epilogue: what follows.
            out: `[N, O, OH, OW]`, not empty, written.
        """

    @abstractmethod
    def build(self, maps: Maps, epilogue: ConvEpilogue, residual: bool) -> None:
        """Compile now what a call would compile."""

    def ready(self, maps: Maps, epilogue: ConvEpilogue, residual: bool) -> ConvCall:
        """What `run` does for such maps and PyTorch's present number of threads, as `call(x, terms, residual, out)`."""
        return lambda x, terms, residual, out: self.run(x, terms, residual, epilogue, out)

    @property
    def source(self) -> str:
        """The generated code, for people; empty if there is none."""
        return ""


@dataclass(frozen=True)
class ConvEpilogue:
    """What follows a convolution.

    Attributes:
        activation: as in `Problem`.
        residual_first: whether a residual is added before the activation.
    """

    activation: str = "none"
    residual_first: bool = False


class Target(ABC):
    """Facts, kernels and cost model of a piece of hardware.

    Attributes:
        name: as `get_target` takes it.
        description: one line for people.
        skips: kinds of the forms that it has kernels for, as `SkipForm` names them; empty where nothing skips.
        skip_tokens: most tokens of a call that skips more than exact zeros.
        watches_skips: whether sites that skip look at run time whether that pays; elsewhere the predictions decide.
        device: type of the devices that its kernels run on, as PyTorch names it.
        dtypes: element types of x, weight and output that it prices; any other stays dense.
        fuses: whether its kernels apply activations and residuals; if not, these are left to Inductor.
    """

    name: str
    description: str
    skips: tuple[str, ...] = ()
    skip_tokens = FEW_TOKENS
    watches_skips = True
    device = "cpu"
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    fuses = True

    def why_not_here(self) -> str | None:
        """Why this machine cannot run its kernels, None if it can; prices and plans are there in any case."""
        return None

    def for_model(self, nbytes: int) -> Target:
        """The target with the prices of a model whose weights take so many bytes: they may not fit the caches."""
        return self

    @abstractmethod
    def candidates(self, facts: WeightFacts, allowed: Collection[str] | None = None) -> list[Candidate]:
        """The ways to compute a weight, `DENSE` first.

        Args:
            facts: of the weight.
            allowed: printed patterns that may be used; every one if None.
        """

    @abstractmethod
    def predict(self, candidate: Candidate, problem: Problem) -> float:
        """Predicted microseconds of one call; infinity where the kernel cannot take the problem."""

    @abstractmethod
    def prepare(self, candidate: Candidate, weight: Tensor) -> Product:
        """Pack a weight `[O, I]` for a candidate and build its kernel.

        Raises:
            ValueError: the weight does not satisfy the pattern of the candidate.
        """

    def conv_candidates(
        self, facts: WeightFacts, window: Window, allowed: Collection[str] | None = None
    ) -> list[Candidate]:
        """The ways to compute a convolution, `DENSE` first; a target without convolution kernels has no other."""
        return [DENSE]

    def prepare_conv(self, candidate: Candidate, weight: Tensor, window: Window) -> ConvKernel:
        """Pack a weight `[O, I / groups, *kernel]` for one of `conv_candidates` and build its kernel.

        Raises:
            ValueError: the target has no such kernel, or the weight does not satisfy the pattern of the candidate.
        """
        raise ValueError(f"target {self.name} has no convolution kernel {candidate.kernel!r}")

    def prepare_pool(self, window: Window) -> ConvKernel | None:
        """The kernel for max pooling of maps that lie channels first, whose channels are the window's groups.

        It takes no terms and no residual, and positions outside of a map do not count. None if there is no kernel.
        """
        return None

    def skip_rows(self, matrix: Tensor) -> SkipRows | None:
        """A weight for operations that skip; None if the target has no such kernels.

        Args:
            matrix: `[units, width]`, a row for each unit; what is contiguous float32 may be used as it is.
        """
        return None

    def predict_skip(
        self,
        facts: WeightFacts,
        kept: float,
        tokens: int,
        threads: int,
        dtype: torch.dtype = torch.float32,
        by_input: bool = True,
    ) -> float:
        """Predicted microseconds of one call of a linear of which a share of the units or inputs is read.

        Args:
            facts: of its weight.
            kept: the share.
            tokens: of the call.
            threads: that it may use.
            dtype: of x, weight and output.
            by_input: whether the share is of its inputs; else it is of its outputs, as of the gate and up of an FFN.
        """
        return float("inf")

    def prepare_skip(self, spec: SkipSpec, rows: Sequence[SkipRows]) -> SkipKernel | DeviceSkipKernel:
        """Make an operation that skips, from what `skip_rows` gave.

        Raises:
            ValueError: the target has no such kernels.
        """
        raise ValueError(f"target {self.name} has no kernels that skip at run time")

    def layout_us(self, values: int, threads: int) -> float:
        """Predicted microseconds to turn maps of so many values from channels first to channels last, or back."""
        return 0.0

    def packed_bytes(self, candidate: Candidate, facts: WeightFacts, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of the packed weight as `prepare` gives them, from the facts alone; of dense, those of the weight."""
        if candidate.is_dense:
            return facts.out_features * facts.in_features * dtype.itemsize
        v = dict(candidate.params).get("v", 1)
        columns = facts.panels[v]
        return 4 * (-(-facts.out_features // v) + 1) + columns * (4 + 4 * v)


def label_of(facts: WeightFacts, v: int | None, allowed: Collection[str] | None) -> str | None:
    """The pattern under which a kernel for panels of v rows takes a weight; None if `allowed` has none for it.

    Of the patterns that the weight satisfies, the fullest whose shared rows are a multiple of v; `unstructured` always
    holds, and says nothing more than that the kernel finds the zeros by itself. The kernel of convolutions (v of None)
    finds rows that share columns by itself too, whatever their number.
    """
    kinds = ("nm", "vnm", "venom", "block", *(("taps",) if v is None else ()))
    found = [d.pattern for d in facts.patterns if d.pattern.kind in kinds and d.pattern.shared_rows % (v or 1) == 0]
    if v == 1:
        found = [pattern for pattern in found if pattern.shared_rows == 1]
    if allowed is None:
        return _plain(found[0]) if found and facts.patterns[0].pattern == found[0] else "unstructured"
    for text in allowed:
        pattern = Pattern.parse(text)
        if pattern.kind == "unstructured" or (pattern.kind != "dense" and any(pattern.admits(p) for p in found)):
            return _plain(pattern)
    return None


def _plain(pattern: Pattern) -> str:
    """A pattern without the share of zeros that it was found with."""
    return str(pattern).partition("@")[0]
