"""The pattern of a weight: its grammar, the projection of a weight on it, and the measure of how a weight fills it.

One grammar serves Python, the command line and JSON. A weight is a matrix `[O, I]` of O outputs by I inputs:

| text | what may be nonzero |
| --- | --- |
| `dense` | everything |
| `unstructured`, `unstructured@S` | any entries; with a share S of them zero |
| `N:M` | N of every M consecutive inputs, each output row on its own |
| `V:N:M` | the same, and V consecutive output rows keep the same inputs |
| `V:N:K:M` | V consecutive output rows choose K of every M inputs, each of them keeps N of these (VENOM) |
| `RxC`, `RxC@S` | whole blocks of R outputs by C inputs; with a share S of the blocks zero |
| `taps:N:T` | of a convolution with T taps (`kh * kw`): each output keeps N taps, the same for all inputs |
| `V:taps:N:T` | the same, and V consecutive outputs keep the same taps |

Zero means the value: a negative zero (what multiplying a weight by a mask leaves) is a zero, a NaN is not.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from sparsecomp.patterns import groups
from sparsecomp.patterns.taps import slots, taps_mask, used_taps
from sparsecomp.patterns.venom import venom_mask

Kind = Literal["dense", "unstructured", "nm", "vnm", "venom", "block", "taps"]

MAX_M = 256
MAX_ROWS = 256
MAX_COLS = 256

_KINDS = ("dense", "unstructured", "nm", "vnm", "venom", "block", "taps")
_GROUPED = ("nm", "vnm", "venom")
_FIELDS = {
    "nm": ("n", "m"),
    "vnm": ("n", "m", "v"),
    "venom": ("n", "m", "v", "k"),
    "taps": ("n", "m", "v"),
    "block": ("rows", "cols"),
}
_SHARE = re.compile(r"[0-9]*\.?[0-9]+(e[-+]?[0-9]+)?|[0-9]+\.")
_GROUPS = re.compile(r"(?:([0-9]{1,9}):)?([0-9]{1,9}):([0-9]{1,9})")
_VENOM = re.compile(r"([0-9]{1,9}):([0-9]{1,9}):([0-9]{1,9}):([0-9]{1,9})")
_TAPS = re.compile(r"(?:([0-9]{1,9}):)?taps:([0-9]{1,9}):([0-9]{1,9})")
_BLOCK = re.compile(r"([0-9]{1,9})x([0-9]{1,9})")
_GRAMMAR = (
    "expected 'dense', 'unstructured' or 'unstructured@SHARE', 'N:M', 'V:N:M', 'V:N:K:M', 'RxC' or 'RxC@SHARE', "
    "'taps:N:T' or 'V:taps:N:T', such as 'unstructured@0.8', '2:4', '32:2:4', '64:2:4:8', '16x1@0.5' or '16:taps:4:9'"
)


@dataclass(frozen=True)
class Fit:
    """How a weight lies in a pattern.

    Attributes:
        satisfied: no entry outside the pattern is nonzero.
        density: nonzeros / entries of the weight.
        fill: nonzeros / slots; below 1 where the pattern keeps room for zeros, above 1 only where it is not satisfied.
        nonzeros: entries that are not zero.
        slots: entries that the pattern keeps room for: for N:M, V:N:M and V:N:K:M every allowed one, where positions
            are free (blocks, unstructured) those of the occupied blocks.
        violations: groups (rows or panels, of kernel patterns) that hold more than they may, of V:N:K:M those of rows
            and those of panels, or blocks (entries, if unstructured) beyond the share.
    """

    satisfied: bool
    density: float
    fill: float
    nonzeros: int
    slots: int
    violations: int


@dataclass(frozen=True)
class Pattern:
    """Which entries of a weight may be nonzero; immutable, hashable, `Pattern.parse(str(p)) == p`.

    Attributes:
        kind: the family; the fields that it does not use keep their defaults.
        n: kept inputs of every group (N:M, V:N:M, V:N:K:M), or kept taps.
        m: inputs of a group, or taps of a kernel, at most 256.
        v: output rows that share their inputs (V:N:M) or those they choose from (V:N:K:M), 2 to 256, or their taps, 1
            to 256.
        k: inputs of a group that a panel chooses (V:N:K:M), more than n and fewer than m.
        rows: outputs of a block, at most 256.
        cols: inputs of a block, at most 256.
        sparsity: share of zero entries (unstructured) or zero blocks, in [0, 1); None means whatever the weight has.

    Raises:
        ValueError: a field is out of its range or does not belong to the kind.
    """

    kind: Kind
    n: int = 1
    m: int = 1
    v: int = 1
    rows: int = 1
    cols: int = 1
    sparsity: float | None = None
    k: int = 1

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"unknown kind of pattern {self.kind!r}: expected one of {', '.join(_KINDS)}")
        used = _FIELDS.get(self.kind, ())
        for field in ("n", "m", "v", "k", "rows", "cols"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{field} of a pattern must be an integer, not {value!r}")
            if field not in used and value != 1:
                raise ValueError(f"a pattern of kind {self.kind!r} has no {field}, given {value}")
        if self.kind in (*_GROUPED, "taps"):
            whole = "T" if self.kind == "taps" else "M"
            if not 2 <= self.m <= MAX_M:
                raise ValueError(f"pattern {self._text()!r}: {whole} must be from 2 to {MAX_M}, given {self.m}")
            if not 0 < self.n <= self.m:
                raise ValueError(f"pattern {self._text()!r}: N must be from 1 to {whole} = {self.m}, given {self.n}")
        if self.kind == "venom" and not self.n < self.k < self.m:
            raise ValueError(
                f"pattern {self._text()!r}: K must lie between N = {self.n} and M = {self.m}, given {self.k}"
            )
        least = {"vnm": 2, "venom": 2, "taps": 1}.get(self.kind)
        if least is not None and not least <= self.v <= MAX_ROWS:
            raise ValueError(f"pattern {self._text()!r}: V must be from {least} to {MAX_ROWS}, given {self.v}")
        if self.kind == "block":
            if not (1 <= self.rows <= MAX_ROWS and 1 <= self.cols <= MAX_COLS):
                raise ValueError(f"pattern {self._text()!r}: R and C must be from 1 to {MAX_ROWS}")
            if self.rows == self.cols == 1:
                raise ValueError("a block of 1x1 is no block: use 'unstructured'")
        self._check_sparsity()

    def _check_sparsity(self) -> None:
        if self.sparsity is None:
            return
        if self.kind not in ("unstructured", "block"):
            raise ValueError(f"pattern {self._text()!r} fixes its own share of zeros; it takes no @{self.sparsity}")
        if isinstance(self.sparsity, bool) or not isinstance(self.sparsity, (int, float)):
            raise ValueError(f"the share of zeros must be a number, not {self.sparsity!r}")
        if not 0.0 <= self.sparsity < 1.0:
            hint = f" (for {self.sparsity:g} % write @{self.sparsity / 100:g})" if 1 < self.sparsity < 100 else ""
            raise ValueError(f"the share of zeros must be at least 0 and below 1, given {self.sparsity:g}{hint}")
        # Adding 0.0 turns -0.0 into 0.0, which would print differently.
        object.__setattr__(self, "sparsity", float(self.sparsity) + 0.0)

    @classmethod
    def parse(cls, text: str | Pattern) -> Pattern:
        """Read a pattern, such as `2:4`, `32:2:4`, `16x1@0.5`, `16:taps:4:9`, `unstructured@0.8` or `dense`.

        Case and surrounding blanks do not matter. `1:N:M`, `1:N:K:M` and `V:N:M:M` are `N:M`, `V:N:N:M` is `V:N:M`,
        `1:taps:N:T` is `taps:N:T` and `1x1` is `unstructured`, which they mean.
        A pattern is returned as it is.

        Raises:
            ValueError: the text is not in the grammar or a number is out of its range; the message says what to write.
        """
        if isinstance(text, Pattern):
            return text
        if not isinstance(text, str):
            raise ValueError(f"a pattern is a text, not {type(text).__name__} {text!r}: {_GRAMMAR}")
        name, at, share = text.strip().lower().partition("@")
        sparsity = _parse_share(text, share) if at else None
        taps_match, venom_match = _TAPS.fullmatch(name), _VENOM.fullmatch(name)
        if groups_match := taps_match or venom_match or _GROUPS.fullmatch(name):
            if at:
                raise ValueError(f"pattern {text!r}: N:M fixes its own share of zeros; write {name!r} without @{share}")
            v, n, *chosen, m = (int(number or 1) for number in groups_match.groups())
            if v == 0:
                raise ValueError(f"pattern {text!r}: V must be from 1 to {MAX_ROWS}, given 0")
            if taps_match:
                return cls("taps", n=n, m=m, v=v)
            k = chosen[0] if chosen else n
            if chosen and not n <= k <= m:
                raise ValueError(f"pattern {text!r}: K must be from N = {n} to M = {m}, given {k}")
            if v == 1 or k == m > n:
                return cls("nm", n=n, m=m)
            return cls("vnm", n=n, m=m, v=v) if k == n else cls("venom", n=n, m=m, v=v, k=k)
        if block_match := _BLOCK.fullmatch(name):
            rows, cols = (int(number) for number in block_match.groups())
            if rows == cols == 1:
                return cls("unstructured", sparsity=sparsity)
            return cls("block", rows=rows, cols=cols, sparsity=sparsity)
        if name == "unstructured":
            return cls("unstructured", sparsity=sparsity)
        if name == "dense":
            if at:
                raise ValueError(f"pattern {text!r}: dense has no zeros to take a share of; write 'dense'")
            return cls("dense")
        near = difflib.get_close_matches(name, ("unstructured", "dense"), n=1)
        hint = f"did you mean {near[0] + at + share!r}? " if near else ""
        raise ValueError(f"pattern {text!r} is not known: {hint}{_GRAMMAR}")

    def __str__(self) -> str:
        return self._text() if self.sparsity is None else f"{self._text()}@{self.sparsity!r}"

    def _text(self) -> str:
        if self.kind == "nm":
            return f"{self.n}:{self.m}"
        if self.kind == "vnm":
            return f"{self.v}:{self.n}:{self.m}"
        if self.kind == "venom":
            return f"{self.v}:{self.n}:{self.k}:{self.m}"
        if self.kind == "taps":
            return f"{f'{self.v}:' if self.v > 1 else ''}taps:{self.n}:{self.m}"
        if self.kind == "block":
            return f"{self.rows}x{self.cols}"
        return self.kind

    @property
    def shared_rows(self) -> int:
        """Consecutive output rows that keep the same inputs: V (but of V:N:K:M), or the R of a block, else 1."""
        return self.rows if self.kind == "block" else 1 if self.kind == "venom" else self.v

    @property
    def nominal_density(self) -> float | None:
        """Share of entries that the pattern keeps where sizes divide; None if it does not fix one."""
        if self.kind in (*_GROUPED, "taps"):
            return self.n / self.m
        if self.kind == "dense":
            return 1.0
        return None if self.sparsity is None else 1.0 - self.sparsity

    @property
    def chosen(self) -> int:
        """Inputs of a group that the rows of a panel keep, all of them together: K, or N where the pattern has no K."""
        return self.k if self.kind == "venom" else self.n

    def covers(self, other: Pattern) -> bool:
        """Whether every weight of any size that satisfies `other` satisfies this pattern too (`4:8` covers `32:2:4`).

        With shares, only patterns of the same units are compared, since what a share leaves depends on the size.
        """
        if self == other or self.kind == "dense" or (self.kind in ("unstructured", "block") and self.sparsity is None):
            return True
        if self.kind in _GROUPED and other.kind in _GROUPED:
            # n / m compared as n * m, since a group of M that holds several of other.m adds up their limits.
            entries = self.m % other.m == 0 and self.n * other.m >= other.n * self.m
            columns = self.v == 1 or self.chosen * other.m >= other.chosen * self.m
            return other.v % self.v == 0 and entries and columns
        if self.kind == other.kind == "taps":
            return other.v % self.v == 0 and self.m == other.m and self.n >= other.n
        same_units = (self.kind, self.rows, self.cols) == (other.kind, other.rows, other.cols)
        if same_units and self.sparsity is not None and other.sparsity is not None:
            return self.sparsity <= other.sparsity
        return False

    def admits(self, found: Pattern) -> bool:
        """Whether a weight that satisfies `found` is of the form of this pattern, whose own share of zeros is left out.

        As `covers`, except for blocks: one without a share covers every weight, since all of its blocks may be kept;
        here it means weights that `found` shows to consist of such blocks.
        """
        if self.kind != "block":
            return self.covers(found)
        if found.kind == "block":
            return (found.rows, found.cols) == (self.rows, self.cols)
        return self.cols == 1 and found.shared_rows % self.rows == 0

    def mask(self, score: Tensor) -> Tensor:
        """Choose the entries to keep: those of the highest score that the pattern allows.

        Entries that stand or fall together (a column of a panel, a block, a tap) are ranked by the sum of their scores,
        the columns of V:N:K:M by what they add to what the rows of the panel can keep (`venom_mask`).
        Ties go to the entry or block that comes first, so equal scores give equal masks. `unstructured@S` keeps exactly
        `round((1 - S) * O * I)` entries, `RxC@S` that share of its blocks, ragged ones included; the last group of
        `length < M` inputs keeps `ceil(N * length / M)`.

        Args:
            score: `[O, I]`, any real type; higher is more important.

        Returns:
            bool `[O, I]`, contiguous, True where an entry is kept.

        Raises:
            ValueError: the score is not a matrix or holds NaN, or the pattern needs a share and has none.
        """
        if self.kind in ("unstructured", "block") and self.sparsity is None:
            raise ValueError(
                f"pattern {str(self)!r} does not say how much to keep: give the share of zeros, such as '{self}@0.8'"
            )
        score = groups.prepare_score(score)
        shape = (score.shape[0], score.shape[1])
        if self.kind == "dense":
            return torch.ones_like(score, dtype=torch.bool)
        if self.kind in ("nm", "vnm"):
            panels = groups.top_of_groups(groups.block_scores(score, self.v, 1), self.n, self.m)
            return groups.spread(panels, self.v, 1, shape)
        if self.kind == "venom":
            return venom_mask(score, self.v, self.n, self.k, self.m)
        if self.kind == "taps":
            return taps_mask(score, self.v, self.n, self.m)
        blocks = groups.block_scores(score, self.rows, self.cols)
        chosen = groups.top_of_all(blocks, groups.keep_count(cast("float", self.sparsity), blocks.numel()))
        return groups.spread(chosen, self.rows, self.cols, shape)

    def project(self, weight: Tensor, score: Tensor | None = None) -> Tensor:
        """Set the entries to zero that `mask` does not keep; the kept ones stay bit for bit.

        Args:
            weight: `[O, I]`.
            score: `[O, I]`; the magnitude of the weight if None.

        Returns:
            A new tensor of the weight's shape and type, without autograd history.

        Raises:
            ValueError: as `mask`, or the shapes differ.
        """
        weight = groups.as_matrix(weight)
        if score is None:
            score = weight.abs()
        elif score.shape != weight.shape:
            raise ValueError(
                f"the score has shape {tuple(score.shape)}, the weight {tuple(weight.shape)}: give one per entry"
            )
        return weight.masked_fill(~self.mask(score), 0)

    def check(self, weight: Tensor) -> bool:
        """Whether no entry of the weight `[O, I]` outside the pattern is nonzero."""
        return self.measure(weight).satisfied

    def measure(self, weight: Tensor) -> Fit:
        """Measure how a weight `[O, I]` lies in the pattern.

        Raises:
            ValueError: the weight is not a matrix.
        """
        mask = groups.nonzero_mask(groups.as_matrix(weight))
        shape = (mask.shape[0], mask.shape[1])
        nonzeros = int(torch.count_nonzero(mask))
        if self.kind == "dense":
            room, violations = mask.numel(), 0
        elif self.kind in _GROUPED:
            room, violations = self._measure_groups(mask)
        elif self.kind == "taps":
            room = slots(shape, self.n, self.m)
            violations = int(torch.count_nonzero(used_taps(mask, self.v, self.m) > self.n))
        else:
            counts = groups.fold_columns(groups.union_rows(mask, self.rows).to(torch.int16), self.cols)
            occupied = counts > 0
            room = groups.occupied_slots(occupied, self.rows, self.cols, shape)
            allowed = occupied.numel() if self.sparsity is None else groups.keep_count(self.sparsity, occupied.numel())
            violations = max(0, int(torch.count_nonzero(occupied)) - allowed)
        return Fit(
            satisfied=violations == 0,
            density=nonzeros / mask.numel() if mask.numel() else 1.0,
            fill=nonzeros / room if room else 1.0,
            nonzeros=nonzeros,
            slots=room,
            violations=violations,
        )

    def _measure_groups(self, mask: Tensor) -> tuple[int, int]:
        """Slots of N:M, V:N:M or V:N:K:M in a mask `[O, I]`, and the groups that hold more than they may."""
        whole, tail = divmod(mask.shape[1], self.m)
        row_slots = whole * self.n + (groups.group_limit(self.n, self.m, tail) if tail else 0)
        levels = [(self.v, self.chosen)] if self.kind != "venom" else [(self.v, self.k), (1, self.n)]
        violations = 0
        for v, most in levels:
            counts = groups.fold_columns(groups.union_rows(mask, v).to(torch.int16), self.m)
            violations += int(torch.count_nonzero(counts[:, :whole] > most))
            if tail:
                violations += int(torch.count_nonzero(counts[:, whole] > groups.group_limit(most, self.m, tail)))
        return mask.shape[0] * row_slots, violations


def _parse_share(text: str, share: str) -> float:
    share = share.strip()
    if _SHARE.fullmatch(share):
        return float(share)
    raise ValueError(
        f"pattern {text!r}: the share of zeros after @ must be a number at least 0 and below 1, such as @0.8; "
        f"given {share!r}"
    )
