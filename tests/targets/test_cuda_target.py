"""NVIDIA cards as targets of `explain` and `plan` on machines without one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

import sparsecomp
from sparsecomp.patterns import Pattern
from sparsecomp.targets import get_target, target_names
from sparsecomp.targets.base import DENSE, WeightFacts
from sparsecomp.targets.cuda.target import SEMI


class Ffn(nn.Module):
    """An FFN block."""

    def __init__(self, width: int = 1024, inner: int = 4096) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., width]` to the same."""
        down: Tensor = self.down(functional.gelu(self.up(x)))
        return down


@pytest.mark.parametrize("name", [name for name in target_names() if name.startswith("cuda:")])
def test_a_model_on_the_meta_device_is_explained_for_every_card(name: str) -> None:
    with torch.device("meta"):
        model, x = Ffn(2048, 8192).half(), torch.empty(2048, 2048, dtype=torch.half)
    report = sparsecomp.explain(model, x, target=name, assume="2:4")
    assert [choice.chosen for choice in report] == [SEMI, SEMI]
    assert name in str(report)
    unknown = sparsecomp.explain(model, x, target=name)
    assert all(choice.chosen.is_dense and "zeros are not known" in choice.reason for choice in unknown)


def test_fake_tensors_of_a_gpu_are_explained_without_one() -> None:
    with FakeTensorMode():
        model = Ffn()
        for linear in (model.up, model.down):  # to("cuda") needs a PyTorch with CUDA even for fake tensors
            linear.weight, linear.bias = (
                nn.Parameter(torch.empty(tuple(value.shape), dtype=torch.bfloat16, device="cuda"))
                for value in (linear.weight, linear.bias)
            )
        x = torch.empty(2048, 1024, dtype=torch.bfloat16, device="cuda")
    report = sparsecomp.explain(model, x, target="cuda:a100", assume="2:4")
    assert [choice.chosen for choice in report] == [SEMI, SEMI]


def test_weights_with_values_count_as_they_are() -> None:
    model = Ffn(256, 512).half()
    sparsecomp.sparsify_(model, "2:4", filter_fn=lambda _, name: name == "up")
    report = sparsecomp.explain(model, torch.randn(64, 256).half(), target="cuda:l4")
    up, down = report
    assert [item.candidate for item in up.predictions][:2] == [DENSE, SEMI]
    assert "no card has run them" in " ".join(str(report).split())  # which wraps at the width of the terminal
    assert down.reason == "dense: the weight has no zeros"


def test_convolutions_are_priced_and_stay_dense() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(64, 64, 3, groups=64), nn.Conv2d(64, 512, 1)).half()
        x = torch.empty(2, 64, 16, 16, dtype=torch.half)
    report = sparsecomp.explain(model, x, target="cuda:a100", assume="2:4")
    assert all(choice.chosen.is_dense and (choice.dense_us or 0) > 0 for choice in report)


def test_a_plan_is_made_for_a_card_that_is_not_here() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 2048), nn.ReLU(), nn.Linear(2048, 1024)).bfloat16()
    batches = [torch.randn(256, 1024).bfloat16() for _ in range(3)]
    plan = sparsecomp.plan(model, batches, speedup=1.05, patterns=["2:4"], target="cuda:l4")
    assert plan.target == "cuda:l4"
    assert SEMI in [choice.chosen for choice in plan.sites]


def test_a_card_is_refused_where_it_has_to_run() -> None:
    compiled = torch.compile(nn.Linear(8, 8), backend="sparse", options={"target": "cuda:h100"})
    with torch.no_grad(), pytest.raises(Exception, match="target cuda:h100 cannot run here"):
        compiled(torch.randn(2, 8))


@pytest.mark.parametrize(("pattern", "allowed", "offered"), [
    ("2:4", None, True), ("1:4", None, True), ("32:2:4", None, True), ("unstructured@0.5", None, False),
    ("2:4", ["2:4"], True), ("2:4", ["unstructured"], True), ("2:4", ["32:2:4"], False), ("dense", None, False),
])  # fmt: skip
def test_what_is_offered_for_a_pattern(pattern: str, allowed: list[str] | None, offered: bool) -> None:
    facts = WeightFacts.assumed(512, 512, Pattern.parse(pattern))
    assert (SEMI in get_target("cuda:h100").candidates(facts, allowed)) is offered


def test_packed_bytes_are_half_and_two_bits_for_each_kept_entry() -> None:
    facts = WeightFacts.assumed(512, 1024, Pattern.parse("2:4"))
    target = get_target("cuda:h100")
    assert target.packed_bytes(SEMI, facts, torch.float16) == 512 * 1024 * 9 // 8
    assert target.packed_bytes(SEMI, facts, torch.int8) == 512 * 1024 * 5 // 8
