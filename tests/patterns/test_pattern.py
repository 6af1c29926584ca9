"""The grammar of patterns, the projection on them, and the measure."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecomp.patterns import Pattern

SHARES = st.floats(0, 1, exclude_max=True)


@st.composite
def patterns(draw: st.DrawFn, small: bool = False, shares: bool = False) -> Pattern:
    """Any valid pattern; `small` for sizes that meet small weights, `shares` for those that `mask` accepts."""
    limit = 8 if small else 256
    share = SHARES if shares else st.none() | SHARES
    kind = draw(st.sampled_from(["dense", "unstructured", "nm", "vnm", "venom", "block", "taps"]))
    if kind == "dense":
        return Pattern("dense")
    if kind == "unstructured":
        return Pattern("unstructured", sparsity=draw(share))
    if kind == "block":
        rows, cols = draw(st.tuples(st.integers(1, limit), st.integers(1, limit)).filter(lambda size: size != (1, 1)))
        return Pattern("block", rows=rows, cols=cols, sparsity=draw(share))
    if kind == "venom":
        n, k, m = sorted(draw(st.sets(st.integers(1, limit), min_size=3, max_size=3)))
        return Pattern("venom", n=n, k=k, m=m, v=draw(st.integers(2, limit)))
    m = draw(st.integers(2, limit))
    n = draw(st.integers(1, m))
    if kind == "taps":
        return Pattern("taps", n=n, m=m, v=draw(st.integers(1, limit)))
    return Pattern("nm", n=n, m=m) if kind == "nm" else Pattern("vnm", n=n, m=m, v=draw(st.integers(2, limit)))


@st.composite
def weights(draw: st.DrawFn, minimum: int = 1) -> torch.Tensor:
    """A small matrix of any size, its values with ties and zeros of both signs."""
    rows, cols = draw(st.integers(minimum, 19)), draw(st.integers(minimum, 19))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randint(-3, 4, (rows, cols), generator=generator) * 0.5
    return weight if draw(st.booleans()) else weight + torch.randn(rows, cols, generator=generator)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2:4", Pattern("nm", n=2, m=4)),
        ("32:2:4", Pattern("vnm", n=2, m=4, v=32)),
        ("64:2:4:8", Pattern("venom", n=2, m=8, v=64, k=4)),
        ("16x1", Pattern("block", rows=16, cols=1)),
        ("16x1@0.5", Pattern("block", rows=16, cols=1, sparsity=0.5)),
        ("unstructured", Pattern("unstructured")),
        ("unstructured@0.8", Pattern("unstructured", sparsity=0.8)),
        ("dense", Pattern("dense")),
        ("taps:4:9", Pattern("taps", n=4, m=9)),
        ("16:taps:4:9", Pattern("taps", n=4, m=9, v=16)),
    ],
)
def test_the_forms_of_the_grammar(text: str, expected: Pattern) -> None:
    assert Pattern.parse(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        (" Unstructured@.50 ", "unstructured@0.5"),
        ("1:2:4", "2:4"),
        ("1:TAPS:4:9", "taps:4:9"),
        ("02:04", "2:4"),
        ("1:2:4:8", "2:8"),
        ("32:2:8:8", "2:8"),
        ("32:2:2:8", "32:2:8"),
        ("32:8:8:8", "32:8:8"),
        ("1x1@0.5", "unstructured@0.5"),
        ("unstructured@1e-3", "unstructured@0.001"),
        ("unstructured@0", "unstructured@0.0"),
    ],
)
def test_other_spellings_become_canonical(text: str, canonical: str) -> None:
    assert str(Pattern.parse(text)) == canonical


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected 'dense'"),
        ("2-4", "expected 'dense'"),
        ("unstructurd@0.8", "did you mean 'unstructured@0.8'"),
        ("5:4", "N must be from 1 to M = 4, given 5"),
        ("0:4", "N must be from 1 to M = 4, given 0"),
        ("1:1", "M must be from 2 to 256"),
        ("2:999", "M must be from 2 to 256"),
        ("0:2:4", "V must be from 1"),
        ("512:2:4", "V must be from 2 to 256"),
        ("2:4@0.5", "without @0.5"),
        ("64:2:4:8@0.5", "without @0.5"),
        ("0:2:4:8", "V must be from 1"),
        ("64:4:2:8", "K must be from N = 4 to M = 8, given 2"),
        ("64:2:9:8", "K must be from N = 2 to M = 8, given 9"),
        ("64:0:4:8", "N must be from 1 to M = 8, given 0"),
        ("dense@0.5", "write 'dense'"),
        ("0x4", "R and C must be from 1 to 256"),
        ("16x257", "R and C must be from 1 to 256"),
        ("unstructured@1", "at least 0 and below 1"),
        ("unstructured@80", "for 80 % write @0.8"),
        ("unstructured@80%", "must be a number"),
        ("unstructured@-0.5", "must be a number"),
        ("unstructured@nan", "must be a number"),
        ("unstructured@", "must be a number"),
        ("16x1@0.5@0.5", "must be a number"),
    ],
)
def test_a_wrong_text_is_explained(text: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        Pattern.parse(text)
    assert message in str(error.value)


def test_only_texts_and_patterns_are_parsed() -> None:
    pattern = Pattern.parse("2:4")
    assert Pattern.parse(pattern) is pattern
    with pytest.raises(ValueError, match="a pattern is a text, not float"):
        Pattern.parse(0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "sparse"},
        {"kind": "dense", "n": 2},
        {"kind": "nm", "n": 2, "m": 4, "v": 8},
        {"kind": "nm", "n": 2.0, "m": 4},
        {"kind": "vnm", "n": 2, "m": 4, "v": 1},
        {"kind": "nm", "n": 2, "m": 4, "sparsity": 0.5},
        {"kind": "nm", "n": 2, "m": 8, "k": 4},
        {"kind": "venom", "n": 2, "m": 8, "k": 4},
        {"kind": "venom", "n": 2, "m": 8, "k": 2, "v": 16},
        {"kind": "venom", "n": 2, "m": 8, "k": 8, "v": 16},
        {"kind": "block"},
        {"kind": "unstructured", "sparsity": math.nan},
        {"kind": "unstructured", "sparsity": -0.1},
        {"kind": "unstructured", "sparsity": True},
    ],
)
def test_fields_are_validated(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        Pattern(**fields)  # type: ignore[arg-type]


@given(patterns())
def test_parse_and_print_are_inverse(pattern: Pattern) -> None:
    assert Pattern.parse(str(pattern)) == pattern
    assert hash(Pattern.parse(str(pattern))) == hash(pattern)
    assert copy.deepcopy(pattern) == pattern


@given(patterns(small=True, shares=True), weights(minimum=0))
def test_a_projection_satisfies_its_pattern_and_keeps_what_it_keeps(pattern: Pattern, weight: torch.Tensor) -> None:
    before = weight.clone()
    projected = pattern.project(weight)
    mask = pattern.mask(weight.abs())
    assert pattern.check(projected)
    assert torch.equal(projected.view(torch.int32), torch.where(mask, weight.view(torch.int32), 0))
    assert torch.equal(weight, before)
    assert torch.equal(pattern.mask(weight.abs()), mask)


@given(patterns(small=True, shares=True), weights())
def test_a_projection_is_idempotent_and_its_fill_is_a_share(pattern: Pattern, weight: torch.Tensor) -> None:
    projected = pattern.project(weight)
    assert torch.equal(pattern.project(projected), projected)
    fit = pattern.measure(projected)
    assert fit.violations == 0
    assert 0 <= fit.fill <= 1
    assert fit.nonzeros == int((projected != 0).sum()) <= fit.slots
    assert fit.density == pytest.approx(fit.nonzeros / weight.numel())


@given(weights(), st.sampled_from([Pattern.parse(text) for text in ("1:2", "2:4", "3:7", "2:3:4", "8:1:4", "3:2:5")]))
def test_groups_keep_their_best_entries(weight: torch.Tensor, pattern: Pattern) -> None:
    score = weight.abs().double()
    mask = pattern.mask(score)
    for top in range(0, weight.shape[0], pattern.v):
        for left in range(0, weight.shape[1], pattern.m):
            group = score[top : top + pattern.v, left : left + pattern.m].sum(0)
            chosen = mask[top : top + pattern.v, left : left + pattern.m]
            assert (chosen == chosen[0]).all()
            limit = math.ceil(pattern.n * len(group) / pattern.m)
            best = max(sum(group[list(columns)]) for columns in itertools.combinations(range(len(group)), limit))
            assert int(chosen[0].sum()) == limit
            assert float(group[chosen[0]].sum()) == pytest.approx(float(best))


@given(weights(), SHARES)
def test_unstructured_keeps_exactly_its_share_of_the_highest(weight: torch.Tensor, share: float) -> None:
    score = weight.abs()
    mask = Pattern("unstructured", sparsity=share).mask(score)
    kept = round((1 - share) * weight.numel())
    assert int(mask.sum()) == kept
    expected = torch.sort(score.flatten(), descending=True, stable=True).indices[:kept]
    assert torch.equal(mask.flatten().nonzero().squeeze(1), expected.sort().values)


@given(weights(), st.integers(1, 5), st.integers(2, 5), SHARES)
def test_blocks_keep_exactly_their_share_of_the_best(weight: torch.Tensor, rows: int, cols: int, share: float) -> None:
    score = weight.abs().double()
    mask = Pattern("block", rows=rows, cols=cols, sparsity=share).mask(score)
    blocks = [
        (float(score[top : top + rows, left : left + cols].sum()), mask[top : top + rows, left : left + cols])
        for top in range(0, weight.shape[0], rows)
        for left in range(0, weight.shape[1], cols)
    ]
    kept = [total for total, block in blocks if block.all()]
    dropped = [total for total, block in blocks if not block.any()]
    assert len(kept) == round((1 - share) * len(blocks))
    assert len(kept) + len(dropped) == len(blocks)
    assert not kept or not dropped or min(kept) >= max(dropped) - 1e-9


@pytest.mark.parametrize("m", [4, 16, 32, 64])
def test_ties_go_to_the_first(m: int) -> None:
    assert Pattern("nm", n=2, m=m).mask(torch.ones(3, m)).nonzero()[:, 1].tolist() == [0, 1] * 3
    assert Pattern("unstructured", sparsity=0.5).mask(torch.ones(2, m))[0].all()


@settings(max_examples=30)
@given(weights(), st.integers(33, 40), st.data())
def test_large_groups_are_ranked_like_small_ones(weight: torch.Tensor, m: int, data: st.DataObject) -> None:
    wide = torch.cat([weight.abs()] * 3, dim=1)
    n = data.draw(st.integers(1, m))
    mask = Pattern("nm", n=n, m=m).mask(wide)
    for left in range(0, wide.shape[1], m):
        group = wide[:, left : left + m]
        order = torch.sort(group, dim=1, descending=True, stable=True).indices[:, : math.ceil(n * group.shape[1] / m)]
        assert torch.equal(mask[:, left : left + m], torch.zeros_like(group, dtype=torch.bool).scatter_(1, order, True))


def test_ragged_tails_keep_their_share_rounded_up() -> None:
    mask = Pattern.parse("2:4").mask(torch.ones(1, 11))
    assert mask[0].tolist() == [True, True, False, False] * 2 + [True, True, False]
    mask = Pattern.parse("4:1:2").mask(torch.tensor([[0.0, 1.0]] * 4 + [[1.0, 0.0]] * 2))
    assert mask.tolist() == [[False, True]] * 4 + [[True, False]] * 2


@pytest.mark.parametrize("text", ["unstructured", "16x1"])
def test_a_pattern_without_share_cannot_choose(text: str) -> None:
    with pytest.raises(ValueError, match=f"give the share of zeros, such as '{text}@0.8'"):
        Pattern.parse(text).project(torch.ones(4, 4))


def test_bad_tensors_are_explained() -> None:
    pattern = Pattern.parse("2:4")
    with pytest.raises(ValueError, match="the score holds NaN"):
        pattern.mask(torch.tensor([[math.nan, 1.0]]))
    with pytest.raises(ValueError, match="infinities of both signs"):
        Pattern.parse("2:2:4").mask(torch.tensor([[math.inf], [-math.inf]]))
    with pytest.raises(ValueError, match=r"the weight has shape \(2, 3, 4\)"):
        pattern.check(torch.ones(2, 3, 4))
    with pytest.raises(ValueError, match=r"the score has shape \(2, 4\), the weight \(4, 4\)"):
        pattern.project(torch.ones(4, 4), torch.ones(2, 4))


def test_a_given_score_decides() -> None:
    weight = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    assert Pattern.parse("2:4").project(weight, -weight).tolist() == [[0, 0, 2, 1]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_projection_keeps_the_type_and_leaves_the_graph(dtype: torch.dtype) -> None:
    weight = torch.randn(8, 8, dtype=dtype, requires_grad=True)
    projected = Pattern.parse("4:2:4").project(weight)
    assert projected.dtype == dtype
    assert not projected.requires_grad


def test_measure_counts_values() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0, 0.0, -0.0, math.nan], [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    fit = Pattern.parse("2:4").measure(weight)
    assert (fit.satisfied, fit.violations, fit.nonzeros, fit.slots) == (False, 1, 5, 6)
    assert Pattern.parse("3:4").check(weight)
    assert Pattern.parse("2x3").measure(weight).slots == 12
    assert Pattern.parse("1x3@0.25").check(weight)
    assert Pattern.parse("1x3@0.5").measure(weight).violations == 1
    assert Pattern.parse("unstructured@0.5").check(weight)
    assert Pattern.parse("unstructured@0.75").measure(weight).violations == 2
    assert Pattern.parse("dense").measure(weight).fill == pytest.approx(5 / 12)


@given(patterns(small=True), patterns(small=True, shares=True), weights())
def test_what_covers_holds_for_every_weight(wide: Pattern, tight: Pattern, weight: torch.Tensor) -> None:
    assert tight.covers(tight)
    if wide.covers(tight):
        assert wide.check(tight.project(weight))


def test_covers_knows_the_usual_cases() -> None:
    wide = Pattern.parse("4:8")
    assert all(wide.covers(Pattern.parse(text)) for text in ("2:4", "32:2:4", "1:4", "8:3:8"))
    assert not any(
        wide.covers(Pattern.parse(text)) for text in ("3:4", "8:16", "dense", "unstructured@0.9", "16x1@0.5")
    )
    assert Pattern.parse("8:2:4").covers(Pattern.parse("16:2:4"))
    assert not Pattern.parse("16:2:4").covers(Pattern.parse("8:2:4"))
    assert all(Pattern.parse(text).covers(Pattern.parse("64:2:4:8")) for text in ("2:8", "16:2:4:8", "64:4:8", "4:16"))
    assert not any(Pattern.parse(text).covers(Pattern.parse("64:2:4:8")) for text in ("1:8", "64:2:8", "64:2:3:8"))
    assert Pattern.parse("64:2:4:8").covers(Pattern.parse("64:2:8"))
    assert not Pattern.parse("64:2:4:8").covers(Pattern.parse("2:8"))
    assert Pattern.parse("unstructured@0.5").covers(Pattern.parse("unstructured@0.8"))


def test_what_a_pattern_fixes() -> None:
    assert [Pattern.parse(text).shared_rows for text in ("2:4", "32:2:4", "64:2:4:8", "16x1")] == [1, 32, 1, 16]
    texts = ("2:4", "64:2:4:16", "16x1", "16x1@0.75", "unstructured", "dense")
    assert [Pattern.parse(text).nominal_density for text in texts] == [0.5, 0.125, None, 0.25, None, 1.0]


@given(st.data())
def test_kernel_patterns_keep_the_best_taps_of_every_panel(data: st.DataObject) -> None:
    taps, channels, rows = data.draw(st.integers(2, 9)), data.draw(st.integers(1, 5)), data.draw(st.integers(1, 12))
    n, v = data.draw(st.integers(1, taps)), data.draw(st.integers(1, 5))
    weight = torch.randn(rows, channels, taps, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    pattern = Pattern("taps", n=n, m=taps, v=v)
    kept = pattern.mask(weight.abs().flatten(1)).reshape(weight.shape)
    for start in range(0, rows, v):
        panel = kept[start : start + v]
        assert (panel == panel[0, 0]).all()
        sizes = weight[start : start + v].abs().sum((0, 1))
        assert set(torch.nonzero(panel[0, 0]).flatten().tolist()) == set(sizes.topk(n).indices.tolist())
    fit = pattern.measure(pattern.project(weight.flatten(1)))
    assert (fit.satisfied, fit.fill, fit.density) == (True, 1.0, pytest.approx(n / taps))
    broken = pattern.project(weight.flatten(1))
    if n < taps:
        broken[0, int(torch.nonzero(~kept[0, 0])[0])] = 1.0
        assert pattern.measure(broken).violations == 1
