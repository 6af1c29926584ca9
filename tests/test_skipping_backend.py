"""Models compiled with a skip plan do what its emulation does in eager mode, in one graph, and say what they skip."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from kernel_cases import close, needs_x86
from torch import Tensor, nn

import sparsecomp
from sparsecomp.backend import Compilation, compilations
from sparsecomp.skipping import SkipChoice, SkipForm, SkipPlan, emulate
from sparsecomp.targets.skip import FEW_TOKENS

pytestmark = needs_x86


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def last() -> Compilation:
    return compilations()[-1]


class Mlp(nn.Module):
    def __init__(self, act: nn.Module, gated: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(32, 96)
        self.up_proj = nn.Linear(32, 96) if gated else None
        self.down_proj = nn.Linear(96, 32, bias=False)
        self.act_fn = act

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act_fn(self.gate_proj(x))
        return self.down_proj(hidden if self.up_proj is None else hidden * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, act: nn.Module, gated: bool) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(32), Mlp(act, gated)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


def model(act: Callable[[], nn.Module] = nn.SiLU, gated: bool = True, layers: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Layer(act(), gated) for _ in range(layers))).eval()


def plan(form: str, threshold: float | Tensor, sites: list[str], **fields: Any) -> SkipPlan:
    parsed = SkipForm.parse(form)
    return SkipPlan.of([SkipChoice(site, parsed, threshold, **fields) for site in sites], warmup=0)


BLOCKS = ["0.mlp", "1.mlp"]
LINEARS = [f"{block}.{part}" for block in BLOCKS for part in ("gate_proj", "up_proj", "down_proj")]


def compiled(module: nn.Module, skip: SkipPlan | str | None = None, **options: Any) -> Any:
    return torch.compile(module, backend="sparse", fullgraph=True, options={"skip": skip, "verify": True, **options})


CASES = {
    "threshold": plan("threshold:0.5", 0.2, BLOCKS),
    "threshold of every unit": plan("threshold:0.5", torch.linspace(0, 0.4, 96), BLOCKS),
    "input": plan("input:0.5", 0.4, LINEARS),
    "input scaled": plan("input:0.5", 0.4, [name for name in LINEARS if "down" not in name], scale=torch.rand(32)),
    "input of some": plan("input:0.5", 0.4, LINEARS[1:4]),
}


@pytest.mark.parametrize("case", CASES)
def test_as_emulated(case: str) -> None:
    module, skip = model(), CASES[case]
    fast, x = compiled(module, skip), torch.randn(1, 3, 32)
    with emulate(module, skip) as rates:
        expected = module(x)
    close(fast(x), expected)
    assert 0.02 < rates.rate(next(iter(skip))) < 0.98
    # One op for each block, or for each linear where only some skip.
    assert last().rewritten == BLOCKS
    assert last().reasons == []


def test_low_rank() -> None:
    module = model()
    factors = torch.randn(96, 2) * 0.1, torch.randn(2, 32) * 0.1
    skip = plan("rsparse:0.5", 0.4, ["0.mlp.up_proj", "1.mlp.gate_proj"], low_rank=factors)
    fast, x = compiled(module, skip), torch.randn(2, 32)
    with emulate(module, skip):
        expected = module(x)
    close(fast(x), expected)
    assert last().rewritten == ["0.mlp.up_proj", "1.mlp.gate_proj"]


def test_blocks_as_emulated() -> None:
    module = model(layers=4)
    with torch.no_grad():
        for layer in module:
            layer.mlp.down_proj.weight.mul_(0.3)
    skip = plan("block:0.9", 0.9, [f"{number}.mlp" for number in range(1, 4)])
    fast = compiled(module, skip)
    x = torch.randn(5, 1, 32)
    with emulate(module, skip) as rates:
        expected = module(x)
    assert rates.rate("2.mlp") > 0
    close(fast(x), expected)
    assert not torch.allclose(expected, module(x), atol=1e-4)


@pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6])
@pytest.mark.parametrize("gated", [False, True])
def test_exact_zeros_are_lossless(act: Callable[[], nn.Module], gated: bool) -> None:
    module = model(act, gated)
    fast, x = compiled(module, plan("relu", 0.0, BLOCKS)), torch.randn(3, 32)
    close(fast(x), module(x))
    assert last().rewritten == BLOCKS
    report = sparsecomp.explain(fast, x)
    reason = report.plan.sites[0].reason
    assert reason.startswith("skips relu of 0.mlp, ")
    assert 0.2 < float(reason.split()[-4].rstrip("%")) / 100 < 0.8


def test_exact_zeros_without_a_plan_where_they_pay() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(768, 3072), nn.Linear(3072, 768)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(torch.relu(self.up(x)))

    module = Wide().eval()
    fast, x = torch.compile(module, backend="sparse"), torch.randn(1, 768)
    close(fast(x), module(x))
    paid = [site for site in last().plan if not site.chosen.is_dense]
    assert [site.chosen.kernel for site in paid] in ([], ["skip_relu", "skip_relu"])
    for site in paid:
        assert site.chosen_us is not None


def test_many_tokens_stay_in_inductors_graph() -> None:
    module = model()
    fast, x = compiled(module, CASES["threshold"]), torch.randn(FEW_TOKENS + 1, 32)
    close(fast(x), module(x))
    assert last().rewritten == []
    assert "together keep nearly everything" in last().plan.sites[0].reason


def test_one_graph_for_few_tokens_and_many() -> None:
    module, skip = model(), CASES["threshold"]
    fast = torch.compile(module, backend="sparse", dynamic=True, options={"skip": skip})
    before = len(compilations())
    for tokens in (3, 20, 5):
        x = torch.randn(tokens, 32)
        with emulate(module, skip if tokens <= FEW_TOKENS else SkipPlan()):
            expected = module(x)
        close(fast(x), expected)
    assert len(compilations()) - before == 1


def test_weights_with_zeros() -> None:
    module, skip = model(), CASES["threshold"]
    sparsecomp.sparsify_(module, "unstructured@0.6")
    fast, x = compiled(module, skip), torch.randn(1, 32)
    with emulate(module, skip):
        expected = module(x)
    close(fast(x), expected)
    assert last().rewritten == BLOCKS


def test_weights_may_change() -> None:
    module, skip = model(), CASES["input"]
    fast, x = compiled(module, skip), torch.randn(1, 32)
    fast(x)
    before = len(compilations())
    for parameter in module.parameters():
        parameter.mul_(1.3)
    with emulate(module, skip):
        expected = module(x)
    close(fast(x), expected)
    assert len(compilations()) == before


def test_a_plan_from_a_file(tmp_path: Path) -> None:
    module, skip = model(), CASES["threshold of every unit"]
    skip.save(tmp_path / "skip.json")
    fast, x = compiled(module, str(tmp_path / "skip.json")), torch.randn(1, 32)
    with emulate(module, skip):
        expected = module(x)
    close(fast(x), expected)


@pytest.mark.parametrize(
    ("skip", "act", "reason"),
    [
        (plan("relu", 0.0, BLOCKS), nn.SiLU, "its activation silu gives no exact zeros"),
        (plan("threshold:0.5", torch.zeros(7), BLOCKS), nn.SiLU, r"the plan has \(7,\) thresholds"),
        (plan("input:0.5", 0.1, BLOCKS), nn.SiLU, "input:0.5 is for linears, and 0.mlp is a block"),
        (plan("threshold:0.5", 0.1, LINEARS[:1]), nn.SiLU, "threshold:0.5 is for blocks"),
    ],
)
def test_what_cannot_be_says_why(skip: SkipPlan, act: Callable[[], nn.Module], reason: str) -> None:
    module, x = model(act), torch.randn(1, 32)
    close(compiled(module, skip)(x), module(x))
    assert last().rewritten == []
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(last().plan.sites[0].reason)


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_as_emulated(case: str) -> None:
    module, skip = model().bfloat16(), CASES[case]
    x = torch.randn(1, 3, 32).bfloat16()
    with emulate(module.float(), skip):
        expected = module(x.float())
    given = compiled(module.bfloat16(), skip)(x)
    assert given.dtype == torch.bfloat16
    # Units whose size rounds to another side of the threshold make a difference of about a threshold.
    assert (given.float() - expected).abs().max() < 0.1 * expected.abs().max()
    assert (given.float() - expected).norm() < 0.02 * expected.norm()
    assert last().rewritten == BLOCKS


def test_float64_is_left_alone() -> None:
    module, x = model().double(), torch.randn(1, 32).double()
    torch.testing.assert_close(compiled(module, CASES["threshold"])(x), module(x))
    assert last().rewritten == []
    assert "float64" in last().plan.sites[0].reason


def test_excluded() -> None:
    module, x = model(), torch.randn(1, 32)
    compiled(module, CASES["threshold"], exclude=["^0"])(x)
    assert last().rewritten == ["1.mlp"]
    assert "excluded by '^0'" in last().plan.sites[0].reason


def test_explain_names_what_the_model_does_not_have() -> None:
    report = sparsecomp.explain(model(), torch.randn(1, 32), options={"skip": plan("threshold:0.5", 0.1, ["9.mlp"])})
    assert "the skip plan is also for 9.mlp, which the model does not have" in report.notes


def test_a_bad_option() -> None:
    with pytest.raises(ValueError, match=r"option skip: expected a sparsecomp\.skipping\.SkipPlan"):
        compiled(model(), 5)(torch.randn(1, 32))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_generate(cache: str) -> None:
    """Hugging Face's `generate` writes what the emulated model writes; prompts of many tokens are not skipped in."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, intermediate_size=64)).eval()
    llama.generation_config.eos_token_id = None
    blocks = [f"model.layers.{number}.mlp" for number in range(2)]
    skip = plan("threshold:0.5", 0.005, blocks)
    prompt = torch.randint(50, (1, 4), generator=torch.Generator().manual_seed(1))
    extra = {"cache_implementation": "static"} if cache == "static" else {}

    def write() -> Tensor:
        given: Tensor = llama.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0, **extra)
        return given

    with emulate(llama, skip):
        expected = write()
    plain, before = llama.forward, len(compilations())
    try:
        llama.forward = torch.compile(plain, backend="sparse", options={"skip": skip})
        given = write()
        # One graph for the prompt and one for a token; the first token behind a prompt finds a dynamic cache with other
        # strides, so that Dynamo compiles that for itself.
        assert len(compilations()) - before == (2 if cache == "static" else 3)
        assert torch.equal(write(), given)
        assert len(compilations()) - before == (2 if cache == "static" else 3)
    finally:
        llama.forward = plain
    assert torch.equal(given, expected)
    assert last().rewritten == blocks


@pytest.mark.slow
def test_explain_shows_what_a_real_model_skipped() -> None:
    """MiniLM on eight tokens: the share that `explain` prints is that of the emulation."""
    module, _ = models.minilm()
    texts = models.token_ids(8, 8)
    skip = sparsecomp.calibrate_skips(module, list(texts[:, None]), "threshold:0.4", layerwise=False)
    ids = texts[:1]
    with emulate(module, skip) as rates:
        expected = module(ids).last_hidden_state
    fast = torch.compile(module, backend="sparse", options={"skip": skip})
    assert "not run yet" in sparsecomp.explain(fast, ids).plan.sites[-1].reason
    assert (fast(ids).last_hidden_state - expected).norm() < 1e-2 * expected.norm()
    report = sparsecomp.explain(fast, ids)
    for block in skip:
        reasons = [site.reason for site in report if site.block == block]
        assert len(reasons) == 2
        for reason in reasons:
            shown = re.search(r"(\d+)% skipped so far", reason)
            assert shown is not None
            assert float(shown[1]) == pytest.approx(100 * rates.rate(block), abs=1.0)
