"""Patterns found in the zeros of a weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparsecomp.patterns import PanelWeight, Pattern, detect, kept_columns
from sparsecomp.patterns.groups import keep_count, shortest_share

FAMILY = [f"{n}:{m}" for n, m in [(1, 4), (2, 4), (3, 4), (4, 8), (5, 8), (8, 16)]]
FAMILY += [f"{v}:{text}" for v in (4, 8, 16, 32, 64) for text in ("2:4", "1:4", "3:8")]
FAMILY += [f"{v}:2:4:{m}" for v in (4, 16, 64) for m in (8, 16)] + ["8:1:4:8"]
FAMILY += ["16x1@0.5", "4x4@0.75", "1x8@0.25", "unstructured@0.8", "unstructured@0.5"]
FAMILY += ["16x16@0.5", "32x32@0.5", "64x64@0.5"]
KERNELS = ["taps:4:9", "taps:1:9", "16:taps:4:9", "4:taps:9:25"]


def normal(rows: int, cols: int, seed: int) -> torch.Tensor:
    """Values that are all different from zero."""
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    return torch.where(weight == 0, 1.0, weight)


def texts(weight: torch.Tensor) -> list[str]:
    return [str(detection.pattern) for detection in detect(weight)]


@example(text="8:1:4:8", rows=2, cols=5, seed=0)
@given(text=st.sampled_from(FAMILY), rows=st.integers(1, 75), cols=st.integers(1, 41), seed=st.integers(0, 1000))
def test_what_was_projected_is_found(text: str, rows: int, cols: int, seed: int) -> None:
    pattern = Pattern.parse(text)
    weight = pattern.project(normal(rows, cols, seed))
    found = [detection.pattern for detection in detect(weight)]
    if (weight != 0).all():
        assert found == [Pattern("dense")]
    elif pattern.kind in ("nm", "vnm", "venom"):
        one = any(other.v == pattern.v and other.m == pattern.m and pattern.covers(other) for other in found)
        # Few rows may use so few columns that V:N:M of a panel and N:M of a row say it more tightly.
        alike = [other for other in found if other.m == pattern.m]
        panel = any(other.kind == "vnm" and other.v == pattern.v and other.n <= pattern.k for other in alike)
        row = any(other.kind == "nm" and other.n <= pattern.n for other in alike)
        assert one or (pattern.kind == "venom" and panel and row)
    elif (weight == 0).all():
        assert any(other.kind == pattern.kind and pattern.covers(other) for other in found)
    else:
        # A share is printed in as few digits as give the same count, so it may be another number that means the same.
        same = [
            other
            for other in found
            if (other.kind, other.rows, other.cols) == (pattern.kind, pattern.rows, pattern.cols)
        ]
        assert len(same) == 1
        assert pattern.check(weight)
        assert torch.equal(same[0].project(weight), weight)


@pytest.mark.parametrize("text", FAMILY)
def test_a_projection_is_found_by_its_name(text: str) -> None:
    assert text in texts(Pattern.parse(text).project(normal(128, 160, 0)))


@pytest.mark.parametrize("text", KERNELS)
def test_kernel_patterns_are_found_first(text: str) -> None:
    weight = normal(64, 450, 0)
    assert texts(Pattern.parse(text).project(weight))[0] == text
    assert not any("taps" in found for found in texts(Pattern.parse("unstructured@0.5").project(weight)))


@settings(max_examples=60)
@given(st.integers(0, 70), st.integers(0, 40), st.floats(0, 1), st.integers(0, 1000), st.sampled_from([1, 3, 8, 16]))
def test_every_detection_is_true(rows: int, cols: int, density: float, seed: int, height: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    bands = torch.rand(-(-rows // height), cols, generator=generator) < density
    weight = normal(rows, cols, seed) * bands.repeat_interleave(height, dim=0)[:rows]
    found = detect(weight)
    fills = [round(detection.fill, 2) for detection in found]
    assert fills == sorted(fills, reverse=True)
    assert len({detection.pattern for detection in found}) == len(found)
    for detection in found:
        fit = detection.pattern.measure(weight)
        assert fit.satisfied
        assert detection.fill == pytest.approx(fit.fill)
        assert detection.density == pytest.approx(fit.density)
        if detection.pattern.kind in ("nm", "vnm") and detection.pattern.n > 1:
            fields = {"n": detection.pattern.n - 1, "m": detection.pattern.m, "v": detection.pattern.v}
            assert not Pattern(detection.pattern.kind, **fields).check(weight)


def test_a_dense_weight_is_dense_alone() -> None:
    assert texts(torch.ones(8, 8)) == ["dense"]
    assert texts(torch.ones(0, 8)) == ["dense"]
    assert texts(torch.full((4, 4), float("nan"))) == ["dense"]


def test_few_zeros_are_only_unstructured() -> None:
    weight = torch.ones(64, 64)
    weight[0, 0] = 0
    assert texts(weight) == ["unstructured@0.0002"]


def test_shared_rows_come_first() -> None:
    found = texts(Pattern.parse("32:2:4").project(normal(128, 64, 0)))
    assert found[0] == "32:2:4"
    assert {"unstructured@0.5", "2:4", "4:2:4", "8:2:4", "16:2:4", "32x1@0.5", "8:4:8"} <= set(found)
    assert not any(text.startswith("64:2:4") for text in found)


def test_a_zero_among_the_kept_entries_changes_little() -> None:
    weight = Pattern.parse("32:2:4").project(normal(128, 256, 0))
    weight[tuple(weight.nonzero()[0])] = 0
    assert texts(weight)[0] == "32:2:4"


def test_masking_by_multiplication_leaves_a_pattern() -> None:
    weight = normal(32, 64, 0)
    masked = weight * Pattern.parse("2:4").mask(weight.abs())
    assert torch.signbit(masked[masked == 0]).any()
    assert "2:4" in texts(masked)
    assert "unstructured@0.5" in texts(masked)


def test_blocks_need_to_be_nearly_full() -> None:
    weight = Pattern.parse("4x4@0.5").project(normal(64, 64, 0))
    assert "4x4@0.5" in texts(weight)
    sparse = Pattern.parse("unstructured@0.6").project(weight)
    assert not any("x" in text for text in texts(sparse))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int8])
def test_other_types(dtype: torch.dtype) -> None:
    assert "2:4" in texts(torch.tensor([[1, 0, 2, 0, 0, 0, 3, 4]] * 8).to(dtype))


@given(st.integers(1, 2000), st.data())
def test_a_share_is_short_and_exact(total: int, data: st.DataObject) -> None:
    kept = data.draw(st.integers(0, total))
    share = shortest_share(kept, total)
    assert 0 <= share < 1
    assert keep_count(share, total) == kept
    assert len(str(share)) <= 8


@given(st.integers(0, 40), st.integers(0, 20), st.integers(0, 1000), st.sets(st.integers(1, 40)))
def test_kept_columns_is_the_length_of_the_packed_form(rows: int, cols: int, seed: int, sizes: set[int]) -> None:
    weight = normal(rows, cols, seed) * (torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)) < 0.2)
    columns = kept_columns(weight, sizes)
    assert list(columns) == sorted(sizes)
    for v, count in columns.items():
        assert count == PanelWeight.pack(weight, v, signed_zeros=False).cols.numel()


def test_a_panel_has_rows() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        kept_columns(torch.ones(4, 4), [0])
