"""How fast a language model writes: Hugging Face's `generate`, compiled in different ways, in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CACHES = ("static", "dynamic")


@dataclass(frozen=True)
class Candidate:
    """One way to run a model.

    Attributes:
        model: a causal language model of transformers; candidates may share one.
        backend: of `torch.compile`.
        options: of the backend.
    """

    model: nn.Module
    backend: str
    options: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Generation:
    """What was measured of a candidate.

    Attributes:
        name: of the candidate.
        tokens_per_s: median over the rounds, from the first new token to the last.
        speedup: median over the rounds of the ratio to the first candidate in the same round.
        tokens: that it wrote, int64 `[batch, new_tokens]`.
    """

    name: str
    tokens_per_s: float
    speedup: float
    tokens: Tensor


def time_generation(
    candidates: Mapping[str, Candidate],
    prompt: Tensor,
    *,
    new_tokens: int = 64,
    rounds: int = 7,
    cache: str = "static",
) -> list[Generation]:
    """Let candidates write in turn, greedily, and measure their rates of decoding.

    Each is compiled by its first run, once for the prompt and once for a single token (with a dynamic cache the second
    compilation is for any length). A round runs every candidate once; the order rotates.

    Args:
        candidates: by name; speed-ups are over the first.
        prompt: int64 `[batch, tokens]`.
        new_tokens: to write, whatever the end-of-text token says.
        rounds: runs of each that are timed.
        cache: `static` or `dynamic`, of keys and values.

    Raises:
        ValueError: there is no candidate, too few tokens or rounds, or no such cache.
    """
    if not candidates or new_tokens < 2 or rounds < 1:
        raise ValueError(
            f"expected candidates, at least 2 new tokens and a round; given {len(candidates)}, {new_tokens}, {rounds}"
        )
    if cache not in CACHES:
        raise ValueError(f"cache {cache!r}: expected one of {', '.join(CACHES)}")
    runs = {name: _runner(candidate, prompt, new_tokens, cache) for name, candidate in candidates.items()}
    written = {name: run()[0] for name, run in runs.items()}
    names = list(runs)
    rates: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            rates[name].append(runs[name]()[1])
    return [
        Generation(
            name,
            statistics.median(rates[name]),
            statistics.median(a / b for a, b in zip(rates[name], rates[names[0]], strict=True)),
            written[name],
        )
        for name in names
    ]


def _runner(candidate: Candidate, prompt: Tensor, new_tokens: int, cache: str) -> Callable[[], tuple[Tensor, float]]:
    model: Any = candidate.model
    compile_forward: Any = torch.compile
    options = None if candidate.options is None else dict(candidate.options)
    # Candidates are of one class: each needs compilations of its own.
    forward = compile_forward(model.forward, backend=candidate.backend, options=options, isolate_recompiles=True)

    def run() -> tuple[Tensor, float]:
        clock = _Clock()
        with torch.inference_mode(), _forward_of(model, forward):
            ids = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
                streamer=clock,
                **({"cache_implementation": "static"} if cache == "static" else {}),
            )
        return ids[:, prompt.shape[1] :], clock.rate()

    return run


@contextmanager
def _forward_of(model: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Let `generate` call another forward."""
    model.forward = forward
    try:
        yield
    finally:
        del model.forward


class _Clock:
    """A streamer of `generate` that notes when tokens come."""

    def __init__(self) -> None:
        self._times: list[float] = []

    def put(self, value: Tensor) -> None:
        """The prompt first, then every token."""
        self._times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""

    def rate(self) -> float:
        """Tokens per second behind the first new one."""
        times = self._times[1:]
        return (len(times) - 1) / (times[-1] - times[0])


def perplexity(model: nn.Module, windows: Sequence[Tensor]) -> float:
    """Perplexity of a causal language model of transformers.

    Args:
        model: the model.
        windows: token numbers, int64 `[batch, tokens]` each; every window counts the same.
    """
    run: Any = model
    with torch.inference_mode():
        losses = [float(run(window, labels=window, use_cache=False).loss) for window in windows]
    return float(torch.tensor(losses, dtype=torch.float64).mean().exp())
