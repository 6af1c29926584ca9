from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest

from sparsecomp import Plan, Report
from sparsecomp.planner import Prediction, SiteChoice
from sparsecomp.targets.base import DENSE, Candidate

ROWS = Candidate("rows", "unstructured")
OTHERS = tuple(Prediction(Candidate("panel", f"{v}:2:4"), 900.0 + v, 10) for v in (4, 8, 16, 32))


def choice(name: str, chosen: Candidate, reason: str, **changes: object) -> SiteChoice:
    values: dict[str, object] = {
        "name": name,
        "shape": (3072, 768),
        "tokens": 128,
        "density": 0.2,
        "chosen": chosen,
        "reason": reason,
        "patterns": ("unstructured@0.8001234",),
        "predictions": (Prediction(DENSE, 640.0, 9437184), Prediction(ROWS, 210.4, 2_000_000), *OTHERS),
    }
    return SiteChoice(**{**values, **changes})  # type: ignore[arg-type]


def report() -> Report:
    sites = [
        choice("encoder.layer.0.intermediate.dense", ROWS, "rows[unstructured]: predicted 210 us against dense 640 us"),
        choice("encoder.layer.0.<script>.dense", DENSE, "dense: the weight has no zeros", dynamic=True),
        choice("head", DENSE, "dense: its weight is not constant", predictions=(), patterns=(), declined=True),
    ]
    return Report(Plan("x86", sites, threads=2), target="x86 (AVX2)", notes=["gradients are enabled here"])


def test_sums() -> None:
    made = report()
    assert [site.name for site in made.rewritten] == ["encoder.layer.0.intermediate.dense"]
    assert (made.packed_bytes, made.dense_bytes) == (2_000_000, 3072 * 768 * 4)
    assert made.dense_us == 1280.0
    assert made.chosen_us == pytest.approx(850.4)
    assert len(made) == 3


@pytest.mark.parametrize("width", [40, 60, 80, 120, 169, 170, 400])
def test_text_keeps_to_the_width_and_loses_nothing(width: int) -> None:
    text = report().to_text(width)
    assert max(map(len, text.splitlines())) <= max(width, 60)
    words = " ".join(text.split())
    assert "note: gradients are enabled here" in words
    assert "1 of 3 sites would run sparse kernels" in words
    if width < 170 or width == 400:
        assert "rows[unstructured]: predicted 210 us against dense" in words
    assert "its weight is not constant" in words
    assert "unstructured@0.80" in words
    assert "1 more" in words
    assert "panel[16:2:4] 916" in words
    assert "128*" in words
    assert "\x1b" not in text


def test_str_is_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "130")
    made = report()
    assert str(made) == made.to_text(130)


def test_an_empty_report_says_so() -> None:
    text = Report(Plan("x86")).to_text(80)
    assert "no site was found" in text


def test_json_is_complete() -> None:
    made = report()
    read = json.loads(made.to_json())
    assert read == made.to_dict()
    assert read["rewritten"] == ["encoder.layer.0.intermediate.dense"]
    assert read["notes"] == ["gradients are enabled here"]
    assert len(read["plan"]["sites"][0]["candidates"]) == 6
    assert Plan.from_json(json.dumps(read["plan"])) == made.plan


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_html_is_well_formed_and_escaped() -> None:
    page = report().to_html()
    parser = _Tags()
    parser.feed(page)
    assert not parser.open
    assert "script" not in parser.seen
    assert "encoder.layer.0.&lt;script&gt;.dense" in page
    assert parser.seen.count("tr") == 4
