"""Tensors that were seen, told from others and from themselves after a change."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparsecomp.runtime.weight_site import Seen


def test_the_same_are_known_and_not_kept_alive() -> None:
    tensors = [torch.rand(3), torch.rand(2, 2)]
    seen = Seen(tensors)
    assert seen.are(tensors)
    assert not seen.are(tensors[::-1])
    alive = weakref.ref(tensors[0])
    del tensors[0]
    gc.collect()
    assert alive() is None
    assert not seen.are([torch.rand(3), tensors[0]])


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors[1].add_(1),
        lambda tensors: setattr(tensors[1], "data", torch.rand(3)),
        lambda tensors: tensors.__setitem__(1, tensors[1].clone()),
        lambda tensors: tensors.__setitem__(1, tensors[1].view(3)),
    ],
    ids=["in place", "another storage", "another tensor", "a view"],
)
def test_any_change_is_seen(change: Callable[[list[Tensor]], object]) -> None:
    tensors = [torch.rand(3) for _ in range(3)]
    seen = Seen(tensors)
    change(tensors)
    assert not seen.are(tensors)
    assert Seen(tensors).are(tensors)
