"""The cells of a report's row, the same for every form of it."""

from __future__ import annotations

from sparsecomp.planner import SiteChoice
from sparsecomp.targets.base import Candidate

HEADERS = ("layer", "shape", "tokens", "density", "satisfies", "us", "chosen", "MB", "reason")
"""Columns of the full form."""

SHORT_HEADERS = ("layer", "shape", "tokens", "density", "chosen", "us / dense", "MB / dense")
"""Columns of the form for narrow terminals; `details` has the rest."""

SHOWN = 4
"""Patterns and candidates a cell lists; the JSON form has all."""


def cells(choice: SiteChoice) -> tuple[str, ...]:
    """The texts of a row, in the order of `HEADERS`."""
    layer, shape, tokens, density, chosen, _, megabytes = short_cells(choice)
    return (
        layer,
        shape,
        tokens,
        density,
        "\n".join(satisfied(choice)),
        "\n".join(costs(choice)),
        chosen,
        megabytes,
        choice.reason,
    )


def short_cells(choice: SiteChoice) -> tuple[str, ...]:
    """The texts of a row, in the order of `SHORT_HEADERS`."""
    dense, chosen = choice.dense_us, choice.chosen_us
    both = "" if dense is None or chosen is None else f"{chosen:.0f} / {dense:.0f}"
    packed = choice.packed_bytes
    return (
        choice.name or "(model)",
        f"{choice.shape[1]} to {choice.shape[0]}",
        f"{choice.tokens}{'*' if choice.dynamic else ''}",
        f"{choice.density:.2f}" if choice.patterns else "?",  # nothing was counted
        str(choice.chosen),
        both,
        f"{_megabytes(choice.dense_bytes if packed is None else packed)} / {_megabytes(choice.dense_bytes)}",
    )


def details(choice: SiteChoice) -> list[str]:
    """What a row of `SHORT_HEADERS` leaves out: the reason, then the patterns and costs if there are any."""
    lines = [f"{choice.name or '(model)'}: {choice.reason}"]
    if choice.patterns:
        lines.append(f"satisfies {', '.join(satisfied(choice))}")
    if choice.predictions:
        lines.append(f"{', '.join(costs(choice))} (us)")
    return lines


def satisfied(choice: SiteChoice) -> list[str]:
    """The patterns that the weight satisfies, fullest first."""
    texts = [pattern_text(pattern) for pattern in choice.patterns[:SHOWN]]
    more = len(choice.patterns) - len(texts)
    return [*texts, f"{more} more"] if more else texts


def costs(choice: SiteChoice) -> list[str]:
    """What the candidates cost in microseconds: dense first, then the cheapest; `m` marks a measurement."""
    ranked = sorted(choice.predictions, key=lambda item: (not item.candidate.is_dense, item.cost))
    shown = ranked[: SHOWN + 1]
    texts = [
        f"{_label(item.candidate)} {item.cost:.0f}{' m' if item.measured_us is not None else ''}" for item in shown
    ]
    more = len(ranked) - len(shown)
    return [*texts, f"{more} more"] if more else texts


def _label(candidate: Candidate) -> str:
    """A candidate with its parameters, which tell the variants of one kernel apart."""
    params = " ".join(f"{name}={value}" for name, value in candidate.params)
    return f"{candidate} {params}" if params else str(candidate)


def pattern_text(pattern: str) -> str:
    """A printed pattern with its share of zeros rounded to read well."""
    form, at, share = pattern.partition("@")
    return f"{form}@{float(share):.2f}" if at else form


def _megabytes(number: int) -> str:
    return f"{number / 1e6:.2f}" if number < 1e7 else f"{number / 1e6:.1f}"
