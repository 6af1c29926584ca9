"""What a plan lets a linear skip of its inputs at run time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from sparsecomp.planner.reader import DocumentError, Reader

if TYPE_CHECKING:
    from sparsecomp.planner.plan import SiteChoice
    from sparsecomp.skipping.forms import SkipPlan


@dataclass(frozen=True)
class InputSkip:
    """The small inputs of a linear are skipped where a call has few tokens (TEAL, see docs/skipping.md).

    Attributes:
        rate: share of the inputs, as calibrated.
        threshold: an input is read where it is larger in size.
    """

    rate: float
    threshold: float

    def __str__(self) -> str:
        return f"input:{self.rate:g}"

    @classmethod
    def read(cls, reader: Reader | None) -> InputSkip | None:
        """Read what `skip_dict` gave; None for None.

        Raises:
            DocumentError: it is not that.
        """
        if reader is None:
            return None
        skip = cls(reader.number("rate"), reader.number("threshold"))
        reader.finish()
        if skip.rate >= 1:
            raise DocumentError(f"{reader.place('rate')}: expected a share below 1, given {skip.rate:g}")
        return skip


def skip_dict(skip: InputSkip | None) -> dict[str, Any]:
    """The field `skip` as JSON types; none where nothing is skipped."""
    return {} if skip is None else {"skip": asdict(skip)}


def skip_plan(sites: Iterable[SiteChoice]) -> SkipPlan:
    """The skip plan of the entries of a plan, one for each module."""
    # The forms of skipping know plans in their turn: they are read with the reader of plans.
    from sparsecomp.planner.select import module_name
    from sparsecomp.skipping.forms import SkipChoice, SkipForm, SkipPlan

    found = {module_name(site): site.skip for site in sites if site.skip is not None}
    return SkipPlan.of(
        SkipChoice(name, SkipForm("input", skip.rate), skip.threshold, expected=skip.rate)
        for name, skip in found.items()
    )
