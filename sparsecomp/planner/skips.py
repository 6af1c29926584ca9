"""The forms in which a site may skip at run time, as plans name them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sparsecomp.planner.reader import DocumentError, Reader, nearest

_PARAMETERS = {"relu": None, "threshold": 0.4, "input": 0.4, "block": 0.98, "rsparse": 0.4}
"""The kinds, with an example of the parameter of each; None for one that has none."""


@dataclass(frozen=True)
class SkipForm:
    """What a site may skip.

    Attributes:
        kind: `relu` (exact zeros of the hidden layer; lossless), `threshold` (hidden units whose gate is small),
            `input` (small inputs of a linear), `rsparse` (the same, with what is skipped approximated at low rank) or
            `block` (whole FFN calls).
        parameter: the share to skip, of `threshold`, `input` and `rsparse`, from 0 to below 1; of `block` the cosine
            above which the next FFN is skipped; None for `relu`.
    """

    kind: str
    parameter: float | None = None

    def __post_init__(self) -> None:
        kinds = ", ".join(name if example is None else f"{name}:{example}" for name, example in _PARAMETERS.items())
        if self.kind not in _PARAMETERS:
            raise ValueError(f"unknown skip form {self.kind[:60]!r}{nearest(self.kind, _PARAMETERS)}; expected {kinds}")
        if (example := _PARAMETERS[self.kind]) is None:
            if self.parameter is not None:
                raise ValueError(f"skip form {self.kind} takes no parameter, given {self.parameter:g}")
            return
        if self.parameter is None or not 0 <= self.parameter < 1:
            given = "none" if self.parameter is None else f"{self.parameter:g}"
            raise ValueError(
                f"skip form {self.kind} needs a number from 0 to below 1, such as '{self.kind}:{example}', "
                f"given {given}"
            )

    @property
    def of_block(self) -> bool:
        """Whether it is a form of FFN blocks, else of linears."""
        return self.kind in ("relu", "threshold", "block")

    @classmethod
    def parse(cls, text: str | SkipForm) -> SkipForm:
        """Read what `str` prints, such as `threshold:0.4` or `relu`.

        Raises:
            ValueError: it is no form, with the nearest right one.
        """
        if isinstance(text, SkipForm):
            return text
        kind, colon, number = text.strip().partition(":")
        if not colon:
            return cls(kind)
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(f"skip form {text[:60]!r}: expected a number behind the colon, such as 'threshold:0.4'")
        return cls(kind, value)

    def __str__(self) -> str:
        # All digits: what is printed is read back.
        return self.kind if self.parameter is None else f"{self.kind}:{repr(self.parameter).removesuffix('.0')}"


def read_form(reader: Reader, key: str) -> SkipForm | None:
    """The form in a field of a document; None if the field is absent or empty.

    Raises:
        DocumentError: it is no form.
    """
    text = reader.text(key, "")
    try:
        return SkipForm.parse(text) if text else None
    except ValueError as error:
        raise DocumentError(f"{reader.place(key)}: {error}") from error
