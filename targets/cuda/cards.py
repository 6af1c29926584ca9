"""Which NVIDIA cards are known: `facts.json`, with the source of every number."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import torch

RATES = {torch.float16: "half", torch.bfloat16: "half", torch.int8: "int8", torch.float32: "float32"}
"""Names in `facts.json` of the arithmetic of an element type; float32 is that of the CUDA cores, dense alone."""


_CORES_SHARE = 0.85
"""Of the float32 peak of the CUDA cores that large products sustain: an assumption."""


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
        share: of the peak that large products sustain under the card's limit of power, by the names of `RATES`, for
            dense products and for 2:4 (there of twice the peak).
        base: microseconds of a small product, dense and 2:4.
        stream: GB/s that one multiprocessor can ask of the memory, dense and 2:4.
        edge: how much longer small tiles take for their arithmetic, dense and 2:4.
        measured: whether `share`, `base`, `stream` and `edge` come from measurements of this card.
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
    share: dict[str, tuple[float, float]]
    base: tuple[float, float]
    stream: tuple[float, float]
    edge: tuple[float, float]
    measured: bool

    def rate(self, dtype: torch.dtype, sparse: bool) -> float:
        """TFLOPS of large products, dense or 2:4 (multiply-adds with the zeros count too), within the power limit."""
        kind = RATES[dtype]
        if kind not in self.share:
            return self.peak[kind] * _CORES_SHARE
        return self.peak[kind] * (2 * self.share[kind][1] if sparse else self.share[kind][0])


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
        {kind: (dense, sparse) for kind, (dense, sparse) in chosen["share"].items()},
        (chosen["base"][0], chosen["base"][1]),
        (chosen["stream"][0], chosen["stream"][1]),
        (chosen["edge"][0], chosen["edge"][1]),
        "like" not in found,
    )


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
