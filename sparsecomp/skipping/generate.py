"""How fast a language model writes: Hugging Face's `generate`, compiled in different ways, in turn."""

from __future__ import annotations

import functools
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

    Each is compiled by its first run, once for the prompt and once for a single token. A round runs every candidate
    once; the order rotates.

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


def compiled_forward(
    model: nn.Module, backend: str | Callable[..., Any] = "sparse", options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Compile the forward of a model for `generate`: one graph for the prompt, and one for a token behind it.

    Use it as `model.forward = compiled_forward(model, options={"skip": skips})`. The result is that of `torch.compile`,
    but for a dynamic cache of keys and values. By itself that gives a graph more: Dynamo takes sizes for constants
    until it has seen them change, and the first cache may be laid out in another way than those that grow from it.

    Args:
        model: a causal language model of transformers.
        backend: of `torch.compile`.
        options: of the backend.
    """
    from transformers.cache_utils import DynamicLayer

    given: Any = model.forward
    compile_forward: Any = torch.compile
    # Models of one class share their code: each needs compilations of its own.
    compiled = compile_forward(
        given, backend=backend, options=None if options is None else dict(options), isolate_recompiles=True
    )

    @functools.wraps(given)
    def forward(*args: Any, **kwargs: Any) -> Any:
        values = (*args, *kwargs.values())
        layers = [layer for value in values for layer in getattr(value, "layers", None) or ()]
        grown = [layer for layer in layers if isinstance(layer, DynamicLayer) and layer.is_initialized]
        for layer in grown:
            layer.keys, layer.values = (_of_any_length(entry.contiguous(), 2) for entry in (layer.keys, layer.values))
        for value in values if grown else ():
            if isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] > 1:
                _of_any_length(value, 1)  # the mask grows with the cache
        return compiled(*args, **kwargs)

    return forward


def _of_any_length(value: Tensor, dim: int) -> Tensor:
    torch._dynamo.maybe_mark_dynamic(value, dim)
    return value


def _runner(candidate: Candidate, prompt: Tensor, new_tokens: int, cache: str) -> Callable[[], tuple[Tensor, float]]:
    model: Any = candidate.model
    forward = compiled_forward(model, candidate.backend, candidate.options)

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
