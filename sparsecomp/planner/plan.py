"""A plan: for every site what it may become at which cost, what was chosen and why; it can be edited as JSON."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsecomp.patterns import Pattern
from sparsecomp.planner.budget import Budget, Summary
from sparsecomp.planner.reader import DocumentError, Reader, parse_json, read_text
from sparsecomp.planner.skips import SkipForm, read_form
from sparsecomp.targets.base import DENSE, Candidate
from sparsecomp.window import Maps, Window

if TYPE_CHECKING:
    from sparsecomp.planner.pareto import Front

PLAN_VERSION = 1
FORMAT = "sparsecomp-plan"

_KERNEL = re.compile(r"[a-z][a-z0-9_]{0,63}")


class PlanError(DocumentError):
    """A plan cannot be read; the message says where in the document and what was expected."""


@dataclass(frozen=True)
class Prediction:
    """What a candidate would cost.

    Attributes:
        candidate: the way to compute the site.
        us: microseconds of one call that the cost model predicts.
        nbytes: bytes of the weight in the form that the candidate reads.
        measured_us: microseconds of one call as measured, None if it was not.
    """

    candidate: Candidate
    us: float
    nbytes: int
    measured_us: float | None = None

    @property
    def cost(self) -> float:
        """Microseconds that the choice goes by: measured if there is a measurement, else predicted."""
        return self.us if self.measured_us is None else self.measured_us


@dataclass(frozen=True)
class Option:
    """What a site could be pruned to.

    Attributes:
        prune: printed pattern with its share of zeros; empty for the weight as it is.
        candidate: the cheapest way to compute the site then.
        us: microseconds of one call.
        loss: what it is estimated to add to the model's loss; the same in every entry of a module that runs more than
            once, whose weight is pruned for all of them.
        skip: in which form it skips beside, None for nothing; `us` is then of a call that skips. A form of FFN blocks
            is for all linears of the block together, which share its loss.
    """

    prune: str
    candidate: Candidate
    us: float
    loss: float
    skip: SkipForm | None = None


@dataclass(frozen=True)
class SiteChoice:
    """What one site becomes.

    Attributes:
        name: qualified module name.
        shape: `(O, I)` of the weight; of a convolution `(O, I / groups * taps)`.
        tokens: rows of the input that the costs are for; of a convolution the output positions of all images.
        dtype: such as `float32`.
        density: nonzeros / entries of the weight.
        patterns: printed patterns that the weight satisfies, fullest first.
        predictions: every candidate that was considered, dense first; empty for a site that was not looked at closer.
        chosen: one of their candidates.
        reason: why, in one sentence.
        activation: fused into the site.
        residual: whether an addition is fused into the site.
        dynamic: whether the number of tokens may change from call to call.
        declined: whether the site cannot be rewritten, whatever the costs.
        prune: printed pattern that the weight is to be pruned to, with its share of zeros; empty: it stays as it is.
        options: what `prune` was chosen from, the weight as it is first; empty for a site that was not to be pruned.
        window: of a convolution, None for a linear.
        maps: that a convolution is called with, None for a linear.
        skip: the form in which it skips at run time, where a call has few tokens; None for nothing.
        block: name of the FFN block that it is a linear of, where that can skip as a whole; else empty.
    """

    name: str
    shape: tuple[int, int]
    tokens: int
    density: float
    chosen: Candidate
    reason: str
    dtype: str = "float32"
    patterns: tuple[str, ...] = ()
    predictions: tuple[Prediction, ...] = ()
    activation: str = "none"
    residual: bool = False
    dynamic: bool = False
    declined: bool = False
    prune: str = ""
    options: tuple[Option, ...] = ()
    window: Window | None = None
    maps: Maps | None = None
    skip: SkipForm | None = None
    block: str = ""

    def prediction(self, candidate: Candidate) -> Prediction | None:
        """The costs of a candidate, None if it was not considered."""
        return next((item for item in self.predictions if item.candidate == candidate), None)

    @property
    def dense_us(self) -> float | None:
        """Microseconds of dense, None if nothing was predicted."""
        dense = self.prediction(DENSE)
        return None if dense is None else dense.cost

    @property
    def chosen_us(self) -> float | None:
        """Microseconds of what was chosen, None if nothing was predicted."""
        chosen = self.prediction(self.chosen)
        return None if chosen is None else chosen.cost

    @property
    def dense_bytes(self) -> int:
        """Bytes of the weight as the model holds it."""
        return self.shape[0] * self.shape[1] * {"float64": 8, "bfloat16": 2, "float16": 2, "int8": 1}.get(self.dtype, 4)

    @property
    def packed_bytes(self) -> int | None:
        """Bytes of the packed weight, None where it stays dense."""
        if self.chosen.is_dense:
            return None
        chosen = self.prediction(self.chosen)
        return None if chosen is None else chosen.nbytes

    def to_dict(self) -> dict[str, Any]:
        """The choice as JSON types."""
        return {
            "name": self.name,
            "out_features": self.shape[0],
            "in_features": self.shape[1],
            "tokens": self.tokens,
            "window": None if self.window is None else _window_dict(self.window),
            "maps": None if self.maps is None else asdict(self.maps),
            "dynamic": self.dynamic,
            "dtype": self.dtype,
            "activation": self.activation,
            "residual": self.residual,
            "density": self.density,
            "patterns": list(self.patterns),
            "candidates": [
                {
                    **_candidate_dict(item.candidate),
                    "us": item.us,
                    "measured_us": item.measured_us,
                    "bytes": item.nbytes,
                }
                for item in self.predictions
            ],
            "chosen": _candidate_dict(self.chosen),
            "declined": self.declined,
            "reason": self.reason,
            "prune": self.prune,
            "options": [
                {
                    "prune": item.prune,
                    **_candidate_dict(item.candidate),
                    "us": item.us,
                    "loss": item.loss,
                    "skip": str(item.skip or ""),
                }
                for item in self.options
            ],
            "skip": str(self.skip or ""),
            "block": self.block,
        }

    @classmethod
    def from_value(cls, value: Any, where: str) -> SiteChoice:
        """Read what `to_dict` gave; only name and chosen must be there.

        Raises:
            DocumentError: it is not that.
        """
        reader = Reader(value, where)
        choice = cls(
            name=reader.text("name"),
            shape=(reader.integer("out_features", 0), reader.integer("in_features", 0)),
            tokens=reader.integer("tokens", 0),
            window=_window(reader),
            maps=_maps(reader),
            dynamic=reader.boolean("dynamic", False),
            dtype=reader.text("dtype", "float32"),
            activation=reader.text("activation", "none"),
            residual=reader.boolean("residual", False),
            density=1.0 if (density := reader.maybe_number("density")) is None else density,
            patterns=reader.items("patterns", _pattern_text),
            predictions=reader.items("candidates", _prediction),
            chosen=_candidate(Reader(reader.raw("chosen"), reader.place("chosen")), finish=True),
            declined=reader.boolean("declined", False),
            reason=reader.text("reason", ""),
            prune=_prune_text(reader.text("prune", ""), reader.place("prune")),
            options=reader.items("options", _option),
            skip=read_form(reader, "skip"),
            block=reader.text("block", ""),
        )
        reader.finish()
        return choice


@dataclass
class Plan:
    """The choices for the sites of a model on a target.

    Attributes:
        target: name of the target.
        threads: that the costs are for.
        budget: that the patterns to prune to were chosen under; None for a plan that prunes nothing.
        summary: of the model as planned; None likewise.
        sites: the choices, in graph order; a site may be there once for every number of tokens it was compiled for.
        version: of the format.
    """

    target: str
    sites: list[SiteChoice] = field(default_factory=list)
    threads: int = 1
    version: int = PLAN_VERSION
    budget: Budget | None = None
    summary: Summary | None = None

    def __iter__(self) -> Iterator[SiteChoice]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def add(self, choices: Iterable[SiteChoice]) -> None:
        """Append choices, replacing those for the same site and number of tokens (the same maps)."""
        merged = {(choice.name, choice.tokens, choice.maps): choice for choice in (*self.sites, *choices)}
        self.sites = list(merged.values())

    def site(self, name: str, tokens: int | None = None, maps: Maps | None = None) -> SiteChoice | None:
        """The choice for a site: the one for that number of tokens if there is one, else the first of that name.

        Of a convolution, whose maps may differ at one number of positions, it is the one for these maps.
        """
        named = [choice for choice in self.sites if choice.name == name]
        exact = (choice for choice in named if choice.tokens == tokens and choice.maps in (None, maps))
        return next(exact, named[0] if named else None)

    def skips(self) -> dict[str, SkipForm]:
        """The forms in which FFN blocks and linears skip, by name; `calibrate_skips` finds their thresholds."""
        chosen = [(site, site.skip) for site in self if site.skip is not None]
        return {(site.block if form.of_block else site.name).partition("#")[0]: form for site, form in chosen}

    def replan(
        self,
        *,
        max_quality_loss: float | None = None,
        max_latency: float | str | None = None,
        speedup: float | None = None,
    ) -> Plan:
        """Choose again among the saved options under another budget; nothing is run or measured.

        Args:
            max_quality_loss: sum of the estimated losses, at most.
            max_latency: of the model, such as `"8 ms"`, or seconds, at most.
            speedup: of the model over dense, at least.

        Returns:
            A new plan, whose loss is estimated and not measured.

        Raises:
            ValueError: not exactly one budget is given, it is bad or cannot be reached (the message says what can), or
                this plan has no options to choose from, or a quality budget leaves nothing to prune.
        """
        from sparsecomp.planner.select import replan

        return replan(self, Budget.of(max_quality_loss, max_latency, speedup))

    def pareto(self, points: int = 24) -> Front:
        """The best losses that can be had at different latencies, from the saved options.

        Args:
            points: at most this many.

        Returns:
            The front, fastest first; `print` it or see `Front.plot`.

        Raises:
            ValueError: this plan has no options to choose from, or fewer than 2 points are asked for.
        """
        from sparsecomp.planner.pareto import front

        return front(self, points)

    def __str__(self) -> str:
        from sparsecomp.report.plan import plan_text

        return plan_text(self)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON types."""
        return {
            "format": FORMAT,
            "version": self.version,
            "target": self.target,
            "threads": self.threads,
            "budget": None if self.budget is None else asdict(self.budget),
            "summary": None if self.summary is None else asdict(self.summary),
            "sites": [choice.to_dict() for choice in self.sites],
        }

    def to_json(self) -> str:
        """The plan as JSON text that `from_json` reads back to an equal plan."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to a file, all of it or nothing.

        Raises:
            OSError: the file cannot be written.
        """
        target = Path(path)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(self.to_json())
            # mkstemp makes private files; a plan is an ordinary one.
            os.chmod(temporary, 0o644)
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    @classmethod
    def from_json(cls, text: str, what: str = "plan") -> Plan:
        """Read a plan from JSON text that need not be trusted.

        Args:
            text: the document.
            what: how messages call it.

        Raises:
            PlanError: it is no valid plan, or of a version that this package does not know.
        """
        try:
            reader = Reader(parse_json(text, what), what)
            reader.text("format", among=(FORMAT,))
            version = reader.integer("version")
            if version != PLAN_VERSION:
                raise DocumentError(f"{what}.version: this package reads version {PLAN_VERSION}, given {version}")
            plan = cls(
                target=reader.text("target"),
                threads=reader.integer("threads", 1),
                budget=None if (inner := reader.inner("budget")) is None else Budget.read(inner),
                summary=None if (inner := reader.inner("summary")) is None else Summary.read(inner),
                sites=list(reader.items("sites", SiteChoice.from_value)),
                version=version,
            )
            reader.finish()
        except DocumentError as error:
            raise PlanError(str(error)) from error
        return plan

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan from a file that need not be trusted.

        Raises:
            PlanError: the file cannot be read or holds no valid plan.
        """
        try:
            text = read_text(Path(path), "plan")
        except DocumentError as error:
            raise PlanError(str(error)) from error
        return cls.from_json(text, what=f"plan {path}")


def _candidate_dict(candidate: Candidate) -> dict[str, Any]:
    return {"kernel": candidate.kernel, "pattern": candidate.pattern, "params": dict(candidate.params)}


def _candidate(reader: Reader, *, finish: bool) -> Candidate:
    kernel = reader.text("kernel")
    if not _KERNEL.fullmatch(kernel):
        raise DocumentError(
            f"{reader.place('kernel')}: expected the name of a kernel such as 'rows', given {kernel[:60]!r}"
        )
    pattern = _pattern_text(reader.text("pattern", "dense" if kernel == "dense" else None), reader.place("pattern"))
    params = tuple(sorted(reader.integers("params").items()))
    if finish:
        reader.finish()
    return DENSE if kernel == DENSE.kernel else Candidate(kernel, pattern, params)


_WINDOW_PAIRS = ("kernel", "stride", "padding", "dilation", "extra")
_MAPS = ("images", "height", "width")


def _window_dict(window: Window) -> dict[str, int]:
    pairs = {name: getattr(window, name) for name in _WINDOW_PAIRS}
    flat = {f"{name}_{axis}": pair[at] for name, pair in pairs.items() for at, axis in enumerate("yx")}
    return {**flat, "groups": window.groups}


def _window(reader: Reader) -> Window | None:
    names = [f"{name}_{axis}" for name in _WINDOW_PAIRS for axis in "yx"]
    sizes = _sizes(reader, "window", [*names, "groups"])
    if sizes is None:
        return None
    for name in ("kernel_y", "kernel_x", "stride_y", "stride_x", "dilation_y", "dilation_x", "groups"):
        if not sizes[name]:
            raise DocumentError(f"{reader.place('window')}.{name}: expected at least 1, given 0")
    pairs = {name: (sizes[f"{name}_y"], sizes[f"{name}_x"]) for name in _WINDOW_PAIRS}
    return Window(**pairs, groups=sizes["groups"])


def _maps(reader: Reader) -> Maps | None:
    sizes = _sizes(reader, "maps", _MAPS)
    if (sizes is None) != (not reader.has("window")):
        raise DocumentError(f"{reader.place('maps')}: a convolution has both a window and maps, a linear has neither")
    return None if sizes is None else Maps(**sizes)


def _sizes(reader: Reader, key: str, names: Iterable[str]) -> dict[str, int] | None:
    inner = reader.inner(key)
    if inner is None:
        return None
    sizes = {name: inner.integer(name) for name in names}
    inner.finish()
    return sizes


def _prediction(value: Any, where: str) -> Prediction:
    reader = Reader(value, where)
    prediction = Prediction(
        candidate=_candidate(reader, finish=False),
        us=reader.number("us"),
        measured_us=reader.maybe_number("measured_us"),
        nbytes=reader.integer("bytes", 0),
    )
    reader.finish()
    return prediction


def _option(value: Any, where: str) -> Option:
    reader = Reader(value, where)
    option = Option(
        prune=_prune_text(reader.text("prune", ""), reader.place("prune")),
        candidate=_candidate(reader, finish=False),
        us=reader.number("us"),
        loss=reader.number("loss"),
        skip=read_form(reader, "skip"),
    )
    reader.finish()
    return option


def _prune_text(text: str, where: str) -> str:
    """What a weight may be pruned to: nothing, or a pattern that says how much."""
    if not text:
        return ""
    pattern = Pattern.parse(printed := _pattern_text(text, where))
    if pattern.kind == "dense" or pattern.nominal_density is None:
        raise DocumentError(f"{where}: {printed!r} does not say how much to prune; write such as '{_example(pattern)}'")
    return printed


def _example(pattern: Pattern) -> str:
    return "2:4" if pattern.kind == "dense" else f"{pattern}@0.5"


def _pattern_text(value: Any, where: str) -> str:
    if not isinstance(value, str) or len(value) > 64:
        raise DocumentError(f"{where}: expected a pattern of at most 64 characters, such as '2:4'")
    try:
        return str(Pattern.parse(value))
    except ValueError as error:
        raise DocumentError(f"{where}: {error}") from error
