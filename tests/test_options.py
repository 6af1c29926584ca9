from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeTarget

from sparsecomp import Options, Plan
from sparsecomp.patterns import Pattern


def test_defaults() -> None:
    assert Options.parse() == Options.parse({}) == Options.parse(None, "default") == Options()


def test_options_pass_through() -> None:
    options = Options(verify=True)
    assert Options.parse(options) is options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tagret": "x86"}, "did you mean 'target'"),
        ({"autotuning": True}, "did you mean 'autotune'"),
        ({"excludes": []}, "did you mean 'exclude'"),
        ({"max_autotune": True}, "unknown option 'max_autotune'"),
        ({3: True}, "unknown option 3"),
        ({"target": "x86:avx"}, "did you mean 'x86:avx"),
        ({"target": "arm9"}, "expected one of x86"),
        ({"target": 5}, "expected one of x86"),
        ({"plan": 5}, "sparsecomp.Plan or the path"),
        ({"patterns": "2:q4"}, "'2:q4' is not known"),
        ({"patterns": ["unstructred"]}, "did you mean 'unstructured'"),
        ({"patterns": 7}, "given int 7"),
        ({"patterns": [7]}, "a pattern is a text, not int 7"),
        ({"exclude": ["layer.("]}, "no regular expression"),
        ({"exclude": [b"layer"]}, "as text"),
        ({"exclude": [re.compile(b"layer")]}, "as text"),
        ({"exclude": 4}, "given int 4"),
        ({"autotune": "true"}, "did you mean True"),
        ({"autotune": 1}, "did you mean True"),
        ({"verify": "off"}, "did you mean False"),
        ({"verify": None}, "expected True or False"),
        ("target=x86", "options must be a dict"),
    ],
)
def test_bad_options_are_named(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Options.parse(options)


def test_patterns_lose_their_shares() -> None:
    parsed = Options.parse({"patterns": ["unstructured@0.8", "2:4", "unstructured", Pattern.parse("16x1@0.5")]})
    assert parsed.patterns == ("unstructured", "2:4", "16x1")
    assert Options.parse({"patterns": "32:2:4"}).patterns == ("32:2:4",)
    assert Options.parse({"patterns": []}).patterns == ()


def test_exclude_matches_anywhere_and_ignores_the_call_number() -> None:
    options = Options.parse({"exclude": ["^head$", r"layer\.[01]\."]})
    assert options.excluding("head") == options.excluding("head#2") == "^head$"
    assert options.excluding("encoder.layer.1.up") == r"layer\.[01]\."
    assert options.excluding("encoder.layer.2.up") is None
    assert Options.parse({"exclude": "head"}).excluding("lm_head") == "head"


@pytest.mark.parametrize(
    ("mode", "autotune"),
    [("default", False), ("reduce-overhead", False), ("max-autotune", True), ("max-autotune-no-cudagraphs", True)],
)
def test_modes(mode: str, autotune: bool) -> None:
    assert Options.parse(None, mode).autotune is autotune


def test_unknown_mode() -> None:
    with pytest.raises(ValueError, match="did you mean 'max-autotune'"):
        Options.parse(None, "max-autotun")


def test_plan_from_a_path(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    Plan("x86").save(path)
    assert Options.parse({"plan": path}).plan == Options.parse({"plan": str(path)}).plan == Plan("x86")
    with pytest.raises(ValueError, match=re.escape("did you mean " + str(path))):
        Options.parse({"plan": tmp_path / "plam.json"})


def test_target_object() -> None:
    target = FakeTarget()
    assert Options.parse({"target": target}).resolve_target() is target
