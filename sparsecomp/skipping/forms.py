"""What sites skip at run time: their forms with calibrated thresholds, and the plan that holds them.

A plan is a JSON file, with the thresholds and scales that are tensors in a safetensors file beside it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from sparsecomp.planner.reader import DocumentError, Reader, nearest, parse_json, read_text
from sparsecomp.planner.skips import SkipForm, read_form

FORMAT = "sparsecomp-skip"
VERSION = 1
WARMUP = 25
"""Tokens of a sequence that `block` skips nothing for; the paper's range is 25 to 30."""
MAX_TENSOR_BYTES = 2**30
"""The most that the tensors of one plan may hold."""


@dataclass(frozen=True, eq=False)
class SkipChoice:
    """What one site skips.

    Attributes:
        site: qualified module name: of the FFN for `relu`, `threshold` and `block`, of the linear for `input` and
            `rsparse`.
        form: what is skipped.
        threshold: a hidden unit is kept where `|act(gate)| > threshold`, an input where `|x| * scale > threshold`, all
            in float32: one number, or float32 `[hidden]` (`threshold`) or `[in]` (`input`). Of `block` the cosine. 0
            for `relu`.
        scale: float32 `[in]` for `input` by WINA; None means 1.
        expected: share that was skipped on the calibration inputs, of units, inputs or calls.
        low_rank: of `rsparse`: float32 `A [out, rank]` and `B [rank, in]`; `A B` times the dropped inputs is added.
    """

    site: str
    form: SkipForm
    threshold: float | Tensor = 0.0
    scale: Tensor | None = None
    expected: float = 0.0
    low_rank: tuple[Tensor, Tensor] | None = None


@dataclass
class SkipPlan(Mapping[str, SkipChoice]):
    """What the sites of a model skip: a mapping of site names to choices.

    Attributes:
        choices: by site.
        warmup: tokens at the beginning of a sequence that `block` skips nothing for.
        span: FFN calls that `block` skips at a time, from the one behind that whose cosine exceeded the threshold.
    """

    choices: dict[str, SkipChoice] = field(default_factory=dict)
    warmup: int = WARMUP
    span: int = 1

    @classmethod
    def of(cls, choices: Iterable[SkipChoice], *, warmup: int = WARMUP, span: int = 1) -> SkipPlan:
        """A plan of choices.

        Raises:
            ValueError: two are for the same site.
        """
        result: dict[str, SkipChoice] = {}
        for choice in choices:
            if choice.site in result:
                raise ValueError(f"two skip choices for {choice.site!r}: give one for every site")
            result[choice.site] = choice
        return cls(result, warmup, span)

    def __getitem__(self, site: str) -> SkipChoice:
        return self.choices[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.choices)

    def __len__(self) -> int:
        return len(self.choices)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to `path`, which ends in .json, and its tensors to the .safetensors file of the same name.

        Raises:
            ValueError: the path does not end in .json.
            OSError: a file cannot be written.
        """
        target = _json_path(path)
        tensors: dict[str, Tensor] = {}
        entries = []
        for number, choice in enumerate(self.choices.values()):
            # Copies: linears that share an input share their scale, and the format has no shared memory.
            held = {
                name: value.float().clone(memory_format=torch.contiguous_format) for name, value in _tensors(choice)
            }
            tensors.update({f"{number}.{name}": value for name, value in held.items()})
            threshold = choice.threshold
            entries.append(
                {
                    "site": choice.site,
                    "form": str(choice.form),
                    "threshold": None if isinstance(threshold, Tensor) else threshold,
                    "expected": choice.expected,
                    "tensors": {name: value.numel() for name, value in held.items()},
                }
            )
        document = {
            "format": FORMAT,
            "version": VERSION,
            "warmup": self.warmup,
            "span": self.span,
            "choices": entries,
        }
        beside = target.with_suffix(".safetensors")
        if tensors:
            safetensors.torch.save_file(tensors, str(beside))
        else:
            beside.unlink(missing_ok=True)
        target.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SkipPlan:
        """Read what `save` wrote; the files need not be trusted.

        Raises:
            ValueError: a file is missing or damaged, with the place in it.
        """
        source = _json_path(path)
        what = f"skip plan {source}"
        reader = Reader(parse_json(read_text(source, what), what), what)
        reader.text("format", among=(FORMAT,))
        if (version := reader.integer("version")) != VERSION:
            raise DocumentError(f"{what}.version: this package reads version {VERSION}, given {version}")
        entries = reader.items("choices", _Entry.read)
        tensors = _read_tensors(source.with_suffix(".safetensors"), entries)
        warmup, span = reader.integer("warmup", WARMUP), reader.integer("span", 1)
        reader.finish()
        return cls.of((entry.choice(number, tensors) for number, entry in enumerate(entries)), warmup=warmup, span=span)


def _tensors(choice: SkipChoice) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a choice by their name in the file."""
    if isinstance(choice.threshold, Tensor):
        yield "threshold", choice.threshold
    if choice.scale is not None:
        yield "scale", choice.scale
    if choice.low_rank is not None:
        yield from zip(("a", "b"), choice.low_rank, strict=True)


_NAMES = ("threshold", "scale", "a", "b")


@dataclass(frozen=True)
class _Entry:
    """One choice as the document has it: the tensors are only announced."""

    site: str
    form: SkipForm
    threshold: float | None
    expected: float
    sizes: dict[str, int]
    where: str

    @classmethod
    def read(cls, value: Any, where: str) -> _Entry:
        reader = Reader(value, where)
        form = read_form(reader, "form")
        if form is None:
            raise DocumentError(f"{reader.place('form')}: expected a skip form, such as 'input:0.4'")
        entry = cls(
            reader.text("site"),
            form,
            reader.maybe_number("threshold"),
            reader.maybe_number("expected") or 0.0,
            reader.integers("tensors"),
            where,
        )
        reader.finish()
        unknown = [name for name in entry.sizes if name not in _NAMES]
        if unknown:
            raise DocumentError(f"{where}.tensors: unknown {unknown[0][:60]!r}{nearest(unknown[0], _NAMES)}")
        if (entry.threshold is None) != ("threshold" in entry.sizes):
            raise DocumentError(f"{where}.threshold: expected a number, or null and a tensor of that name")
        if ("a" in entry.sizes) != ("b" in entry.sizes) or ("a" in entry.sizes) != (form.kind == "rsparse"):
            raise DocumentError(f"{where}.tensors: a and b belong to rsparse, which needs both")
        return entry

    def choice(self, number: int, tensors: dict[str, Tensor]) -> SkipChoice:
        found = {name: tensors[f"{number}.{name}"] for name in self.sizes}
        dims = {name: 2 if name in ("a", "b") else 1 for name in found}
        for name, tensor in found.items():
            if tensor.dim() != dims[name] or tensor.numel() != self.sizes[name] or not tensor.isfinite().all():
                raise DocumentError(
                    f"{self.where}.tensors.{name}: expected {self.sizes[name]} finite numbers in {dims[name]} "
                    f"dimensions, the file has shape {tuple(tensor.shape)}"
                )
        threshold = found.get("threshold", self.threshold)
        assert threshold is not None
        low_rank = (found["a"], found["b"]) if "a" in found else None
        return SkipChoice(self.site, self.form, threshold, found.get("scale"), self.expected, low_rank)


def _read_tensors(path: Path, entries: Iterable[_Entry]) -> dict[str, Tensor]:
    """The announced tensors: the file holds these and no others."""
    sizes = {f"{number}.{name}": size for number, entry in enumerate(entries) for name, size in entry.sizes.items()}
    if not sizes:
        return {}
    if 4 * sum(sizes.values()) > MAX_TENSOR_BYTES:
        raise DocumentError(f"skip plan: its tensors would take more than {MAX_TENSOR_BYTES >> 20} MiB")
    if not path.is_file():
        raise DocumentError(f"skip plan: {path} is missing; keep it beside the JSON file")
    # The header is at most a few MiB more than the numbers.
    if path.stat().st_size > 4 * sum(sizes.values()) + (16 << 20):
        raise DocumentError(f"skip plan: {path} is larger than the tensors that the plan names")
    try:
        tensors = safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise DocumentError(f"skip plan: {path} is damaged or not a safetensors file: {error}") from error
    if set(tensors) != set(sizes):
        name = sorted(set(tensors) ^ set(sizes))[0]
        raise DocumentError(f"skip plan: {path} and the plan do not agree on the tensor {name[:60]!r}")
    if other := next((name for name, tensor in tensors.items() if tensor.dtype != torch.float32), None):
        raise DocumentError(f"skip plan: {path}: tensor {other[:60]!r} is not float32")
    return tensors


def _json_path(path: str | os.PathLike[str]) -> Path:
    result = Path(path)
    if result.suffix != ".json":
        raise ValueError(f"a skip plan is a .json file, given {result}")
    return result
