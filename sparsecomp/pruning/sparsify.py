"""Pruning of a model in place: dense tensors that hold zeros, which any other tool can take over.

All modules are examined and all masks computed before the first weight changes, so a call completes or changes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsecomp.patterns import Pattern
from sparsecomp.pruning.magnitude import magnitude
from sparsecomp.pruning.sites import FilterFn, Site, choose_sites


def sparsify_(model: nn.Module, pattern: str | Pattern, *, filter_fn: FilterFn | None = None) -> list[str]:
    """Prune the weights of a model in place, by magnitude.

    A weight that several modules share is pruned once, also where the other module is no linear (a tied embedding
    changes too: leave its head out with `filter_fn` if that is not wanted). Gradients, hooks and the `requires_grad` of
    the parameters stay; their version counters advance, so a compiled model notices.

    Args:
        model: any module; its `nn.Linear` modules are pruned (the model itself, if it is one).
        pattern: what to prune to, such as `"unstructured@0.8"`, `"2:4"`, `"32:2:4"` or `"16x1@0.5"`; `"dense"` drops
            nothing.
        filter_fn: `(module, qualified_name) -> bool`, called for every module that can be pruned; all of them if None.

    Returns:
        Qualified names of the modules whose weights were pruned, in the order of `model.named_modules()`; a shared
        weight gives every accepted module that holds it, the empty name is the model itself. Empty for `"dense"`.

    Raises:
        ValueError: the pattern is wrong or has no share, no module can be pruned, `filter_fn` rejects all of them, or a
            weight cannot be pruned. The model is then as it was.
    """
    pattern = Pattern.parse(pattern)
    if pattern.kind in ("unstructured", "block") and pattern.sparsity is None:
        raise ValueError(
            f"pattern '{pattern}' does not say how much to prune: give the share of zeros, such as '{pattern}@0.8'"
        )
    sites = choose_sites(model, filter_fn)
    if pattern.kind == "dense":
        return []
    with torch.no_grad():
        unique = {id(site.weight): site for site in sites}.values()
        drops = [(site.weight, _entries_to_drop(site, pattern)) for site in unique]
        for weight, drop in drops:
            weight.masked_fill_(drop, 0)
    return [site.name for site in sites]


def _entries_to_drop(site: Site, pattern: Pattern) -> Tensor:
    try:
        keep = pattern.mask(site.kind.to_matrix(magnitude(site.weight)))
    except ValueError as error:
        raise ValueError(f"{site.where} cannot be pruned to {pattern}: {error}") from error
    return ~site.kind.from_matrix(keep, site.weight)
