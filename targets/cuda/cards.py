"""Which NVIDIA cards are known: `facts.json`, with the source of every number."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass, fields, replace
from importlib import resources
from typing import Any

import torch

RATES = {torch.float16: "half", torch.bfloat16: "half", torch.int8: "int8", torch.float32: "float32"}
"""Names in `facts.json` of the arithmetic of an element type; float32 is that of the CUDA cores, dense alone."""
_CORES_SHARE = 0.85
"""Of the float32 peak of the CUDA cores that large products sustain: an assumption."""


@dataclass(frozen=True)
class Library:
    """How a library's products of an element type behave on a card, dense or 2:4.

    Attributes:
        share: of the peak (2:4: of twice the peak) that large products sustain under the card's limit of power.
        base: microseconds of a small product.
        stream: GB/s at which one multiprocessor gets operands.
        edge: how much longer small tiles take for their arithmetic.
        depth: nanoseconds that a tile takes for each input at least, however small it is.
        slices: parts at most into which the inputs are cut where there are few tiles.
    """

    share: float
    base: float
    stream: float
    edge: float
    depth: float
    slices: int


@dataclass(frozen=True)
class Card:
    """A card of `facts.json`.

    Attributes:
        name: as the target is called, without `cuda:`.
        board: what it is in full.
        arch: architecture that kernels are compiled for, such as `sm_90`.
        sms: streaming multiprocessors.
        bandwidth: of the memory, GB/s.
        l2: bytes of the L2 cache.
        shared: bytes of shared memory of a multiprocessor.
        warps: that are resident on a multiprocessor at most.
        blocks: that are resident on a multiprocessor at most.
        peak: TFLOPS (or TOPS) of dense products, by the names of `RATES`.
        libraries: the dense and the 2:4 one, by the names of `RATES` without float32.
        measured: whether `libraries` come from measurements of this card.
        streamed: whether weights come from memory each time, since those of a model are more than the L2 cache holds.
    """

    name: str
    board: str
    arch: str
    sms: int
    bandwidth: float
    l2: int
    shared: int
    warps: int
    blocks: int
    peak: dict[str, float]
    libraries: dict[str, tuple[Library, Library]]
    measured: bool
    streamed: bool = False

    def library(self, dtype: torch.dtype, sparse: bool) -> Library:
        """The library for an element type; float32 is taken to be as float16, but on the CUDA cores."""
        if dtype == torch.float32:
            return replace(self.libraries["half"][0], share=_CORES_SHARE, depth=0.0)
        return self.libraries[RATES[dtype]][sparse]

    def rate(self, dtype: torch.dtype, sparse: bool) -> float:
        """TFLOPS of large products, dense or 2:4 (multiply-adds with the zeros count too), within the power limit."""
        return self.peak[RATES[dtype]] * (1 + sparse) * self.library(dtype, sparse).share


@functools.cache
def _facts() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(resources.files(__package__).joinpath("facts.json").read_text())
    return content


def card_names() -> tuple[str, ...]:
    """The cards of `facts.json`."""
    return tuple(_facts()["cards"])


@functools.cache
def card(name: str) -> Card:
    """A card by its name, one of `card_names`."""
    found = _facts()["cards"][name]
    limits = _facts()["architectures"][found["arch"]]
    chosen = _facts()["constants"][found.get("like", name)]
    return Card(
        name,
        found["board"],
        found["arch"],
        found["sms"],
        found["bandwidth"],
        found["l2"],
        limits["shared"],
        limits["warps"],
        limits["blocks"],
        found["peak"],
        {kind: (_library(by["dense"]), _library(by["sparse"])) for kind, by in chosen.items()},
        "like" not in found,
    )


def _library(constants: dict[str, Any]) -> Library:
    return Library(**{field.name: constants[field.name] for field in fields(Library)})


def card_here() -> Card:
    """The card of this machine that PyTorch computes on.

    Raises:
        ValueError: there is none, or it has no sparse tensor cores.
    """
    if not torch.cuda.is_available():
        raise ValueError(
            f"PyTorch {torch.__version__} sees no NVIDIA GPU here; name a card, such as 'cuda:h100', for its prices"
        )
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return matched(found.name, found.major * 10 + found.minor, found.multi_processor_count, found.L2_cache_size)


def matched(board: str, capability: int, sms: int, l2: int) -> Card:
    """A card by what the driver says of it.

    Args:
        board: such as `NVIDIA H100 PCIe`.
        capability: 90 for sm_90.
        sms: streaming multiprocessors.
        l2: bytes of the L2 cache.

    Returns:
        The card of `facts.json` of that name; of one that is not there, the nearest of the same architecture or the
        one before, with rates and bandwidth by the number of multiprocessors, which is a guess.

    Raises:
        ValueError: it has no sparse tensor cores.
    """
    if capability < 80:
        raise ValueError(f"{board} has compute capability {capability / 10}; sparse tensor cores begin with 8.0")
    words = set(re.split(r"[^a-z0-9]+", board.lower()))
    cards = [card(name) for name in card_names()]
    named = [found for found in cards if set(found.name.split("-")) <= words and found.sms == sms]
    if named:
        return max(named, key=lambda found: found.name.count("-"))
    age = max(int(found.arch[3:]) for found in cards if int(found.arch[3:]) <= capability)
    like = min((found for found in cards if found.arch == f"sm_{age}"), key=lambda found: abs(found.sms - sms))
    ratio = sms / like.sms
    return replace(
        like,
        name="-".join(word for word in re.split(r"[^a-z0-9]+", board.lower()) if word not in ("nvidia", "")),
        board=board,
        arch=f"sm_{capability}",
        sms=sms,
        bandwidth=like.bandwidth * ratio,
        l2=l2,
        peak={kind: value * ratio for kind, value in like.peak.items()},
        measured=False,
    )
