"""The budget of a plan, and what a plan under a budget means for the whole model."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sparsecomp.planner.reader import DocumentError, Reader

BUDGETS = ("max_quality_loss", "max_latency", "speedup")
"""Kinds of a budget: a loss, seconds, or times as fast as dense."""

GAINS = (0.5, 2.0)
"""Measured over predicted gain of a plan; beyond these the moment of the measurement is doubted, not the prediction."""

_LATENCY = re.compile(r"([0-9]{1,12}(?:\.[0-9]{0,12})?|\.[0-9]{1,12})\s*(us|ms|s)")


@dataclass(frozen=True)
class Budget:
    """What a model may lose, or how fast it has to be.

    Attributes:
        kind: one of `BUDGETS`.
        value: the loss or the seconds that it may have at most, or how many times as fast it has to be at least.

    Raises:
        ValueError: the kind is unknown or the value out of its range.
    """

    kind: str
    value: float

    def __post_init__(self) -> None:
        if self.kind not in BUDGETS:
            raise ValueError(f"unknown kind of budget {self.kind!r}: expected one of {', '.join(BUDGETS)}")
        number = isinstance(self.value, (int, float)) and not isinstance(self.value, bool)
        low = {"max_quality_loss": 0.0, "max_latency": 0.0, "speedup": 1.0}[self.kind]
        if not number or not low <= self.value < float("inf"):
            raise ValueError(f"{self.kind} must be a number from {low:g} on, given {self.value!r:.80}")

    @classmethod
    def of(cls, max_quality_loss: float | None, max_latency: float | str | None, speedup: float | None) -> Budget:
        """The one budget that is given; a latency is seconds, or a text such as `"8 ms"` or `"800 us"`.

        Raises:
            ValueError: there is not exactly one, or it is bad.
        """
        values = {"max_quality_loss": max_quality_loss, "max_latency": max_latency, "speedup": speedup}
        given = {kind: value for kind, value in values.items() if value is not None}
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(BUDGETS)}; given {', '.join(given) or 'none'}")
        ((kind, value),) = given.items()
        if kind == "max_latency" and isinstance(value, str):
            match = _LATENCY.fullmatch(value.strip().lower())
            if match is None:
                raise ValueError(f"max_latency: expected seconds or a text such as '8 ms', given {value!r:.80}")
            value = float(match.group(1)) * {"us": 1e-6, "ms": 1e-3, "s": 1.0}[match.group(2)]
        return cls(kind, value)  # type: ignore[arg-type]  # a text for another kind is refused there

    @classmethod
    def read(cls, reader: Reader) -> Budget:
        """Read what `dataclasses.asdict` gave.

        Raises:
            DocumentError: it is not that.
        """
        kind, value = reader.text("kind", among=BUDGETS), reader.number("value")
        reader.finish()
        try:
            return cls(kind, value)
        except ValueError as error:
            raise DocumentError(f"{reader.place('value')}: {error}") from error

    def __str__(self) -> str:
        if self.kind == "max_latency":
            return f"latency of at most {milliseconds(1e6 * self.value)}"
        return f"loss of at most {self.value:g}" if self.kind == "max_quality_loss" else f"speed-up of {self.value:g}"


def milliseconds(us: float) -> str:
    """A latency for people."""
    return f"{us / 1e3:.3g} ms" if us >= 1000 else f"{us:.3g} us"


@dataclass(frozen=True)
class Summary:
    """What a plan under a budget means for the whole model.

    Attributes:
        dense_us: microseconds of one call of the model under Inductor, measured; for a target that is not here, of its
            linears and convolutions together, predicted.
        rest_us: the part of it that is spent outside of the sites which have options.
        planned_us: microseconds of one call of the model as planned, predicted.
        quality: what the loss is, such as `KL divergence per token`.
        estimated_loss: sum of the estimates of what was chosen.
        measured_loss: of the pruned model, None if it was not measured.
        gain: microseconds that the fastest choice was measured to take less than dense, over those that its sites are
            predicted to; 1 if it was not measured.
    """

    dense_us: float
    rest_us: float
    planned_us: float
    quality: str
    estimated_loss: float
    measured_loss: float | None = None
    gain: float = 1.0

    @classmethod
    def read(cls, reader: Reader) -> Summary:
        """Read what `dataclasses.asdict` gave.

        Raises:
            DocumentError: it is not that.
        """
        summary = cls(
            dense_us=reader.number("dense_us"),
            rest_us=reader.number("rest_us"),
            planned_us=reader.number("planned_us"),
            quality=reader.text("quality", ""),
            estimated_loss=reader.number("estimated_loss"),
            measured_loss=reader.maybe_number("measured_loss"),
            gain=1.0 if (gain := reader.maybe_number("gain")) is None else gain,
        )
        reader.finish()
        low, high = GAINS
        if not low <= summary.gain <= high:
            raise DocumentError(f"{reader.place('gain')}: expected a number from {low} to {high}, given {summary.gain}")
        return summary

    def call_us(self, parts_us: float) -> float:
        """Microseconds of one call of the model, from those of its sites and of the rest as they are one by one.

        What a choice gains over dense is corrected by what the fastest choice was measured to gain.
        """
        return parts_us + (self.gain - 1) * (parts_us - self.dense_us)

    def parts_us(self, call_us: float) -> float:
        """The inverse of `call_us`."""
        return (call_us + (self.gain - 1) * self.dense_us) / self.gain

    @property
    def speedup(self) -> float:
        """Predicted times as fast as dense."""
        return self.dense_us / self.planned_us if self.planned_us else 1.0
