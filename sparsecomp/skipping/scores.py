"""What a site drops first, what dropping costs its output, and the thresholds for a rate; from a sample of rows.

A site compares scores `s = |v| c` with one number and drops what is not above it. `v` is the activated gate of an FFN
block or the input of linears, and `c` one of several scales:

- 1: CATS (Lee et al. 2024, arXiv:2404.08763, eq. 3 and 5) for gates, TEAL (Liu et al. 2024, arXiv:2408.14690, eq. 1 and
  2) for inputs: the quantile of `|v|` over the layer is its threshold;
- the mean of `|u|`, the up projection that the gate multiplies: the thresholds for every channel of CHESS (He et al.
  2024, arXiv:2409.01366, eq. 6 to 9);
- the norm of the column of the weight that `v` meets: WINA (Chen et al. 2025, arXiv:2505.19427, eq. 3).

Which of them is taken for a site, its output error on the sample says.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsecomp.planner.skips import SkipForm
from sparsecomp.skipping.forms import SkipChoice
from sparsecomp.skipping.sites import FFN, InputGroup

RATES = tuple(step / 20 for step in range(20))
"""Shares that a site may skip."""


@dataclass(frozen=True, eq=False)
class Scores:
    """A site with its sample.

    Attributes:
        names: of the FFN block, or of the linears that share an input.
        kind: `threshold` or `input`.
        values: `v`, float32 `[rows, width]`.
        effect: what is lost where it is dropped, float32 `[rows, width]`: the hidden layer, or the input.
        matrix: what the effect is multiplied with, float32 `[out, width]`.
        scale: float32 `[width]`; None means 1.
        weights: entries of weights that need not be read for the share of `v` that is dropped.
        heights: outputs of each of the linears that the matrix is made of.
    """

    names: tuple[str, ...]
    kind: str
    values: Tensor
    effect: Tensor
    matrix: Tensor
    scale: Tensor | None
    weights: int
    heights: tuple[int, ...] = ()

    def scores(self) -> Tensor:
        """What is compared, float32 `[rows, width]`."""
        size = self.values.abs()
        return size if self.scale is None else size * self.scale

    def threshold(self, rate: float) -> float:
        """The score that a share `rate` of the sample does not exceed; 0 for none."""
        scores = self.scores().flatten()
        count = int(rate * scores.numel())
        return float(scores.kthvalue(count).values) if count else 0.0

    def error(self, rate: float) -> float:
        """Relative squared error of the output, `||M (drop * effect)||^2 / ||M effect||^2`."""
        dropped = self.effect * (self.scores() <= self.threshold(rate))
        total = (self.effect @ self.matrix.T).square().sum(dtype=torch.float64)
        return float((dropped @ self.matrix.T).square().sum(dtype=torch.float64) / total.clamp_min(1e-30))

    def errors(self) -> list[float]:
        """The relative error at each of `RATES`, as if what is dropped were uncorrelated: from one sort."""
        each = (self.effect.square() * self.matrix.square().sum(dim=0)).flatten()
        ordered = each[self.scores().flatten().argsort()].double().cumsum(0)
        total = float(ordered[-1]) or 1.0
        counts = [int(rate * each.numel()) for rate in RATES]
        return [float(ordered[count - 1]) / total if count else 0.0 for count in counts]

    def choices(self, rate: float) -> list[SkipChoice]:
        """What the site skips at a rate, for each of its names."""
        threshold: float | Tensor = self.threshold(rate)
        form = SkipForm(self.kind, round(rate, 4))
        expected = float((self.scores() <= threshold).float().mean())
        scale = self.scale
        if self.kind == "threshold" and scale is not None:
            threshold, scale = threshold / scale, None
        return [SkipChoice(name, form, threshold, scale, expected) for name in self.names]


def ffn_scores(ffn: FFN, sample: tuple[Tensor, Tensor], rate: float) -> Scores:
    """The scores of an FFN block for `threshold`, by the scale of the least error at a rate."""
    gate, hidden = sample
    matrix = ffn.down_matrix().float()
    scales: list[Tensor | None] = [None, _positive(matrix.norm(dim=0))]
    if ffn.gated:
        # The hidden layer is the activated gate times up.
        up = _positive((hidden / gate.abs().clamp_min(1e-30)).abs().clamp_max(1e30).mean(dim=0))
        scales = [None, up]
    # Per hidden unit the entries of up (as long as an input, taken to be as long as an output) and of down.
    weights = matrix.numel() * (2 if ffn.gated else 1)
    found = [Scores((ffn.name,), "threshold", gate, hidden, matrix, scale, weights) for scale in scales]
    return min(found, key=lambda item: item.error(rate))


def input_scores(group: InputGroup, sample: Tensor, rate: float) -> Scores:
    """The scores of linears that share an input for `input`, by the scale of the least error at a rate."""
    matrix = torch.cat([module.weight.detach().float() for module in group.modules])
    scales = (None, _positive(matrix.norm(dim=0)))
    heights = tuple(module.out_features for module in group.modules)
    found = [Scores(group.names, "input", sample, sample, matrix, scale, matrix.numel(), heights) for scale in scales]
    return min(found, key=lambda item: item.error(rate))


def _positive(scale: Tensor) -> Tensor:
    """Scales without zeros, by which thresholds can be divided."""
    return scale.clamp_min(max(1e-6 * float(scale.max()), 1e-30))
