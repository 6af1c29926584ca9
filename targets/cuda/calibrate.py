"""`sparsecomp calibrate` on a machine with a card: what products take there, over what is predicted, by kernel."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable

import torch
from torch import Tensor

from sparsecomp.patterns import Pattern
from sparsecomp.planner.measure import call_us, measure
from sparsecomp.targets.base import Problem, WeightFacts
from sparsecomp.targets.cuda.target import FFN_THRESHOLD, CudaTarget, scale_name, scales_of
from sparsecomp.targets.scales import save
from sparsecomp.targets.skip import SkipSpec

LINEARS = ((1024, 1024), (4096, 1024), (2048, 2048))
"""Inputs and outputs."""
TOKENS = (1, 4, 128, 2048)
DTYPES = (torch.float16, torch.int8, torch.float32)
_INT_MM = 17
"""Tokens that PyTorch's dense product of int8 takes at least on a card."""
_PATTERNS = ("2:4", "32:1:4", "64x64@0.8", "unstructured@0.9")


def calibrate(target: CudaTarget, linears: Iterable[tuple[int, int]] = LINEARS) -> dict[str, tuple[float, int]]:
    """Measure every kernel that is priced in float16, int8 and float32, and keep a factor for each.

    The FFN that skips is measured with half of its hidden units below their thresholds.

    Args:
        target: of this machine.
        linears: see `LINEARS`.

    Returns:
        By `scale_name` the factor, and from how many calls it is the median.

    Raises:
        ValueError: the target is of no card of this machine.
    """
    if (reason := target.why_not_here()) is not None:
        raise ValueError(f"target {target.name} cannot be measured here: {reason}")
    ratios: dict[str, list[float]] = {}
    plain = CudaTarget(target.card)
    generator = torch.Generator().manual_seed(0)
    for inputs, outputs in linears:
        for text in _PATTERNS:
            weight = Pattern.parse(text).project(torch.randn(outputs, inputs, generator=generator))
            facts = WeightFacts.of(weight)
            for dtype, tokens in itertools.product(DTYPES, TOKENS):
                if dtype == torch.int8 and tokens < _INT_MM:
                    continue
                typed = (127 * weight.sign() if dtype == torch.int8 else weight).to(dtype)
                problem = Problem(facts, tokens, threads=1, dtype=dtype)
                predicted = {found: plain.predict(found, problem) for found in plain.candidates(facts)}
                priced = {found: us for found, us in predicted.items() if us < math.inf}
                for candidate, us in measure(priced, typed.to(target.device), problem, target).items():
                    ratios.setdefault(scale_name(candidate.kernel, dtype), []).append(us / priced[candidate])
        for dtype in (torch.float16, torch.float32):
            ratio = _ffn_ratio(target, plain, inputs, outputs, dtype)
            ratios.setdefault(scale_name(FFN_THRESHOLD, dtype), []).append(ratio)
    found = {name: (statistics.median(values), len(values)) for name, values in ratios.items()}
    save(scales_of(target.card), {name: factor for name, (factor, _) in found.items()})
    return found


def _ffn_ratio(target: CudaTarget, plain: CudaTarget, inputs: int, hidden: int, dtype: torch.dtype) -> float:
    """What an FFN takes of which every other hidden unit is skipped, over what is predicted."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(target.device, dtype)

    gate, up, down, x = random(hidden, inputs), random(hidden, inputs), random(hidden, inputs), random(1, inputs)
    thresholds = torch.tensor([-1.0, math.inf]).repeat(-(-hidden // 2))[:hidden]
    spec = SkipSpec("units", (inputs, hidden, inputs), (thresholds,), "silu", gated=True)
    kernel = target.prepare_skip(spec, [target.skip_rows(rows) for rows in (gate, up, down)])
    us = call_us(lambda: kernel.run(x, (None, None, None)), on_gpu=x.is_cuda)
    shapes = ((hidden, inputs, 1.0, False), (hidden, inputs, 0.5, False), (inputs, hidden, 0.5, True))
    return us / sum(
        plain.predict_skip(WeightFacts.assumed(rows, columns, Pattern("dense")), kept, 1, 1, dtype, by_input)
        for rows, columns, kept, by_input in shapes
    )
