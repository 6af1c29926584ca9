"""The options of `torch.compile(model, backend="sparse", options={...})`, checked before anything else happens."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sparsecomp.patterns import Pattern
from sparsecomp.planner.plan import Plan
from sparsecomp.skipping.forms import SkipPlan
from sparsecomp.targets import get_target, target_names
from sparsecomp.targets.base import Target

_MODES = {
    "default": False,
    "reduce-overhead": False,  # CUDA graphs to Inductor, nothing on a CPU
    "max-autotune": True,
    "max-autotune-no-cudagraphs": True,
}
_PATTERN_EXAMPLES = ("unstructured", "2:4", "32:2:4", "16x1")


@dataclass(frozen=True)
class Options:
    """Options of the backend.

    Attributes:
        target: name of the target, or a `Target`; if None this machine's GPU for models on it, and its CPU for others.
        plan: choices to follow where the weights allow it; a path in the options dict is loaded.
        patterns: printed patterns that may be used, without shares of zeros; all if None.
        exclude: regular expressions; a site whose module name one of them matches anywhere stays dense.
        autotune: measure the candidates and dense on the real shapes while compiling and keep the fastest.
        verify: compare every rewritten site with dense while compiling.
        skip: what FFN blocks and linears skip at run time; a path in the options dict is loaded. Exact zeros behind a
            ReLU are skipped without it, where that is predicted to pay.
    """

    target: str | Target | None = None
    plan: Plan | None = None
    patterns: tuple[str, ...] | None = None
    exclude: tuple[re.Pattern[str], ...] = ()
    autotune: bool = False
    verify: bool = False
    skip: SkipPlan | None = None

    @classmethod
    def parse(cls, options: Mapping[str, Any] | Options | None = None, mode: str | None = None) -> Options:
        """Check the `options` and `mode` of `torch.compile`.

        Args:
            options: by name, as the attributes; `patterns` and `exclude` also take a single text.
            mode: `"max-autotune"` means `autotune`; the others that Inductor knows change nothing.

        Raises:
            ValueError: a key is unknown or a value is bad; the message names the nearest right one.
        """
        if isinstance(options, Options):
            return options
        if options is None:
            options = {}
        if not isinstance(options, Mapping):
            raise ValueError(f"options must be a dict such as {{'verify': True}}, given {_given(options)}")
        values: dict[str, Any] = {}
        for key, value in options.items():
            if key not in _CHECKS:
                names = ", ".join(_CHECKS)
                raise ValueError(f"unknown option {key!r}{_nearest(key, _CHECKS)}; the options are {names}")
            values[key] = _CHECKS[key](value)
        if mode is not None:
            if mode not in _MODES:
                raise ValueError(f"unknown mode {mode!r}{_nearest(mode, _MODES)}; the modes are {', '.join(_MODES)}")
            values["autotune"] = values.get("autotune", False) or _MODES[mode]
        return cls(**values)

    def resolve_target(self, tensors: Iterable[object] = ()) -> Target:
        """The target that is meant.

        Args:
            tensors: of the model; where no target was given, it is this machine's GPU if one of these is there.

        Raises:
            ValueError: it cannot be made here, or `autotune` would have to measure on hardware that is not here.
        """
        target, name = self.target, "cuda" if any(map(_on_gpu, tensors)) else None
        if not isinstance(target, Target):
            target = get_target(name if target is None else target)
        if self.autotune and (reason := target.why_not_here()) is not None:
            raise ValueError(f"option autotune: target {target.name} cannot be measured here: {reason}")
        return target

    def excluding(self, name: str) -> str | None:
        """The expression that excludes a site, None if none does."""
        module = name.partition("#")[0]  # the suffix counts calls of one module
        return next((rule.pattern for rule in self.exclude if rule.search(module)), None)

    def replace(self, **changes: Any) -> Options:
        """The options with some of them changed."""
        return dataclasses.replace(self, **changes)


def _on_gpu(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "cuda"


def _target(value: Any) -> str | Target | None:
    if value is None or isinstance(value, Target):
        return value
    if not isinstance(value, str) or value not in target_names():
        names = target_names()
        raise ValueError(f"option target: unknown {_given(value)}{_nearest(value, names)}; {_among(names)}")
    return value


def _plan(value: Any) -> Plan | None:
    if value is None or isinstance(value, Plan):
        return value
    if isinstance(value, (str, os.PathLike)):
        return Plan.load(value)
    raise ValueError(f"option plan: expected a sparsecomp.Plan or the path of one, given {_given(value)}")


def _skip(value: Any) -> SkipPlan | None:
    if value is None or isinstance(value, SkipPlan):
        return value
    if isinstance(value, (str, os.PathLike)):
        return SkipPlan.load(value)
    raise ValueError(f"option skip: expected a sparsecomp.skipping.SkipPlan or the path of one, given {_given(value)}")


def _patterns(value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    items = [value] if isinstance(value, (str, Pattern)) else value
    if not isinstance(items, Iterable) or isinstance(items, (Mapping, bytes)):
        raise ValueError(f"option patterns: expected patterns such as {list(_PATTERN_EXAMPLES)}, given {_given(value)}")
    found = []
    for item in items:
        try:
            # What may be used is the form: how many zeros there are is the weight's matter.
            found.append(str(dataclasses.replace(Pattern.parse(item), sparsity=None)))
        except ValueError as error:
            raise ValueError(f"option patterns: {error}") from error
    return tuple(dict.fromkeys(found))


def _exclude(value: Any) -> tuple[re.Pattern[str], ...]:
    if value is None:
        return ()
    items = [value] if isinstance(value, (str, re.Pattern)) else value
    if not isinstance(items, Iterable) or isinstance(items, (Mapping, bytes)):
        raise ValueError(f"option exclude: expected regular expressions such as ['lm_head'], given {_given(value)}")
    rules = []
    for item in items:
        if not isinstance(item, (str, re.Pattern)) or isinstance(getattr(item, "pattern", ""), bytes):
            raise ValueError(f"option exclude: expected a regular expression as text, given {_given(item)}")
        try:
            rules.append(re.compile(item))
        except re.error as error:
            raise ValueError(
                f"option exclude: {item!r} is no regular expression ({error}); "
                f"for the text itself write {re.escape(str(item))!r}"
            ) from error
    return tuple(rules)


def _flag(name: str) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        if isinstance(value, bool):
            return value
        words = {
            "true": True,
            "yes": True,
            "on": True,
            "1": True,
            "false": False,
            "no": False,
            "off": False,
            "0": False,
        }
        near = difflib.get_close_matches(str(value).lower(), words, n=1, cutoff=0.5)
        hint = f"; did you mean {words[near[0]]}?" if near else ""
        raise ValueError(f"option {name}: expected True or False, given {_given(value)}{hint}")

    return check


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "target": _target,
    "plan": _plan,
    "patterns": _patterns,
    "exclude": _exclude,
    "autotune": _flag("autotune"),
    "verify": _flag("verify"),
    "skip": _skip,
}


def _given(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"


def _nearest(given: Any, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(given)[:200].lower(), list(names), n=1, cutoff=0.4)
    return f", did you mean {near[0]!r}?" if near else ""


def _among(names: Iterable[str]) -> str:
    return f"expected one of {', '.join(names)}"
