"""Timing `generate` changes neither the model nor what it writes; compiled skips write as emulated ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
from torch import Tensor
from typer.testing import CliRunner

from sparsecomp.cli import app
from sparsecomp.planner import Plan, SiteChoice
from sparsecomp.skipping import SkipForm, SkipPlan, calibrate_skips, emulate
from sparsecomp.skipping.generate import Candidate, compiled_forward, perplexity, time_generation
from sparsecomp.targets.base import DENSE


def _written(model: Any, prompt: Tensor, count: int, cache: str = "dynamic") -> Tensor:
    with torch.inference_mode():
        ids = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            **({"cache_implementation": "static"} if cache == "static" else {}),
        )
    return ids[:, prompt.shape[1] :]


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_candidates_write_what_the_model_writes(cache: str) -> None:
    model, other = tiny.llama(2), tiny.llama(2, seed=1)
    prompt = tiny.texts(1, tokens=7)[0]
    candidates = {"first": Candidate(model, "eager"), "second": Candidate(other, "eager")}
    rows = time_generation(candidates, prompt, new_tokens=5, rounds=2, cache=cache)
    assert [row.name for row in rows] == ["first", "second"]
    assert rows[0].speedup == 1.0
    assert all(row.tokens_per_s > 0 for row in rows)
    assert rows[0].tokens.equal(_written(model, prompt, 5))
    assert rows[1].tokens.equal(_written(other, prompt, 5))
    assert "forward" not in vars(model)


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_one_graph_for_the_prompt_and_one_for_a_token(cache: str) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(gm: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    model = tiny.llama(2)
    prompts = tiny.texts(3, tokens=7)
    want = [_written(model, prompt, 6) for prompt in prompts]
    model.forward = compiled_forward(model, backend)
    for prompt, expected in zip(prompts, want, strict=True):
        assert _written(model, prompt, 6, cache).equal(expected)
        assert len(graphs) == 2


def test_bad_arguments() -> None:
    candidate = {"a": Candidate(tiny.llama(1), "eager")}
    prompt = tiny.texts(1)[0]
    with pytest.raises(ValueError, match="at least 2 new tokens"):
        time_generation(candidate, prompt, new_tokens=1)
    with pytest.raises(ValueError, match="expected one of static, dynamic"):
        time_generation(candidate, prompt, cache="statik")


def test_perplexity_is_that_of_the_mean_loss() -> None:
    model = tiny.llama(1)
    windows = tiny.texts(3)
    with torch.no_grad():
        losses = [float(model(ids, labels=ids).loss) for ids in windows]
    assert perplexity(model, windows) == pytest.approx(float(torch.tensor(losses).mean().exp()), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["threshold:0.5", "input:0.5", "block:0.5"])
def test_compiled_skips_write_as_emulated_ones(form: str) -> None:
    model = tiny.llama(5)
    plan = calibrate_skips(model, tiny.texts(), form, layerwise=False)
    plan.warmup = 0
    # A single token: of more the compiled model skips nothing.
    prompt = torch.tensor([[5]])
    with emulate(model, plan) as rates:
        want = _written(model, prompt, 12)
    assert rates.mean() > 0.1
    (row,) = time_generation({"sparse": Candidate(model, "sparse", {"skip": plan})}, prompt, new_tokens=12, rounds=1)
    assert row.tokens.equal(want)
    assert not _written(model, prompt, 12).equal(want)


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LLaMA as transformers saves it, with a tokenizer of one letter a token."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("llama")
    tiny.llama(2).save_pretrained(folder)
    letters = ["<pad>", "<s>", "</s>", *(chr(code) for code in range(33, 127))]
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({letter: number for number, letter in enumerate(letters)}, unk_token="<pad>")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>").save_pretrained(folder)
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog and runs " * 40)
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--skip", "treshold:0.4"], "did you mean 'threshold'"),
        (["--skip", "missing.json"], "missing.json does not exist"),
        (["--save", "skips.json"], "--save writes one skip plan"),
        (["--only", "("], "no regular expression"),
        (["--tokens", "5000"], "at most 256 tokens"),
        (["--skip", "input:0.4", "--cache", "none"], "expected one of static, dynamic"),
    ],
)
def test_bench_generate_says_what_is_wrong(llama_folder: Path, arguments: list[str], message: str) -> None:
    text = str(llama_folder / "text.txt")
    result = CliRunner().invoke(app, ["bench", "generate", str(llama_folder), "--calibration", text, *arguments])
    assert result.exit_code == 1
    assert message in result.stderr


@pytest.mark.slow
def test_bench_generate_prints_a_line_for_every_form(llama_folder: Path, tmp_path: Path) -> None:
    block = [f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")]
    skips = dict.fromkeys(block, "threshold:0.4") | {"model.layers.1.self_attn.q_proj": "input:0.5"}
    sites = [
        SiteChoice(
            name, (0, 0), 1, 1.0, DENSE, "", skip=SkipForm.parse(form), block="model.layers.0.mlp" * (name in block)
        )
        for name, form in skips.items()
    ]
    Plan("x86", sites).save(tmp_path / "plan.json")
    result = CliRunner().invoke(
        app,
        [
            *("bench", "generate", str(llama_folder), "--calibration", str(llama_folder / "text.txt")),
            *("--skip", str(tmp_path / "plan.json"), "--save", str(tmp_path / "skips.json")),
            *("--tokens", "32", "--sequences", "4", "--new-tokens", "4", "--rounds", "1"),
        ],
    )
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line[:8].strip() for line in lines[1:]] == ["Inductor", "sparse", "sparse,"]
    assert {name: str(choice.form) for name, choice in SkipPlan.load(tmp_path / "skips.json").items()} == {
        "model.layers.0.mlp": "threshold:0.4",
        "model.layers.1.self_attn.q_proj": "input:0.5",
    }


def test_bench_of_an_onnx_model_is_told_from_generate() -> None:
    result = CliRunner().invoke(app, ["bench", "nothing.onnx"])
    assert result.exit_code == 1
    assert "nothing.onnx is not a file" in result.stderr
