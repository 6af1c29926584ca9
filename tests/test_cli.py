"""The command line: what it prints, what it writes, and how it says that something is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import models
import numpy as np
import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from sparsecomp import Pattern, Plan
from sparsecomp.checkpoints import read_weights
from sparsecomp.cli import app

runner = CliRunner()


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT as transformers saves it."""
    folder = tmp_path_factory.mktemp("bert")
    model = models.bert(layers=1, width=64, heads=4, vocab_size=100, max_position_embeddings=32)
    model.save_pretrained(folder)  # type: ignore[operator]
    return folder


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys; sys.argv = ['sparsecomp', '--help']\n"
        "from sparsecomp.cli import app\n"
        "try: app()\n"
        "except SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules and 'tvm' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for command in ("info", "calibrate", "explain", "plan", "prune"):
        assert command in result.stdout


def test_version() -> None:
    result = runner.invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.stdout.startswith("sparsecomp 0.")


def test_info_names_machine_target_and_cache() -> None:
    result = runner.invoke(app, ["info"])
    assert result.exit_code == 0, result.output
    for label in ("machine", "torch", "target", "cache"):
        assert f"\n{label}" in "\n" + result.stdout
    assert "x86" in result.stdout


def test_info_of_an_unknown_target() -> None:
    result = runner.invoke(app, ["info", "--target", "x86:avx521"])
    assert result.exit_code == 1
    assert "x86:avx512" in result.stderr


def test_explain_prints_and_writes(bert_folder: Path, tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("plan.json", "report.json", "report.html")}
    result = runner.invoke(
        app,
        [
            *("explain", str(bert_folder), "--tokens", "16", "--batch", "2", "--sparsify", "unstructured@0.8"),
            *("--plan", str(files["plan.json"]), "--json", str(files["report.json"])),
            *("--html", str(files["report.html"])),
        ],
    )
    assert result.exit_code == 0, result.output
    report = json.loads(files["report.json"].read_text())
    names = [site["name"] for site in report["plan"]["sites"]]
    assert "encoder.layer.0.attention.self.query" in names
    assert "6 sites" in result.stdout or "7 sites" in result.stdout
    assert json.loads(files["plan.json"].read_text()) == report["plan"]
    assert "<table" in files["report.html"].read_text()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--sparsify", "unstructred@0.8"], "unstructured@0.8"),
        (["--sparsify", "unstructured"], "unstructured@0.8"),
        (["--target", "x68"], "x86"),
        (["--tokens", "33"], "at most 32 tokens"),
    ],
)
def test_explain_says_what_is_wrong(bert_folder: Path, arguments: list[str], expected: str) -> None:
    result = runner.invoke(app, ["explain", str(bert_folder), *arguments])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert expected in result.stderr


def test_calibrate_on_an_arm_machine_measures_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsecomp import targets
    from sparsecomp.targets.arm import calibrate, machine
    from sparsecomp.targets.arm.cpu import cpu, host_level

    target = machine.ArmMachine(cpu("cortex-a76"), host_level())
    monkeypatch.setattr(targets, "get_target", lambda: target)
    monkeypatch.setattr(calibrate, "calibrate", lambda given: {"rows": (1.5, 3)} if given is target else {})
    result = runner.invoke(app, ["calibrate"])
    assert result.exit_code == 0, result.output
    assert "rows            takes 1.50 times what was counted (median of 3 calls)" in result.stdout
    assert "no dense linear was measured" in result.stdout


@pytest.mark.parametrize("machine", ["x86_64", "aarch64", "another ARM CPU"])
def test_calibrate_measures_the_card_beside_any_cpu(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import sparsecomp.targets.arm.calibrate
    import sparsecomp.targets.cuda.calibrate
    import sparsecomp.targets.x86.calibrate
    import sparsecomp.targets.x86.ort_calibrate
    from sparsecomp import targets
    from sparsecomp.targets.arm.cpu import cpu, host_level
    from sparsecomp.targets.arm.machine import ArmMachine
    from sparsecomp.targets.arm.target import ArmTarget
    from sparsecomp.targets.cuda.cards import card

    found = {
        "x86_64": targets.get_target("x86"),
        "aarch64": ArmMachine(cpu("cortex-a76"), host_level()),
        "another ARM CPU": ArmTarget(cpu("cortex-a76")),
    }[machine]
    monkeypatch.setattr(targets, "get_target", lambda: found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    monkeypatch.setattr("sparsecomp.targets.cuda.cards.card_here", lambda: card("l4"))
    monkeypatch.setattr(sparsecomp.targets.x86.calibrate, "calibrate", lambda: "the x86 CPU")
    monkeypatch.setattr(sparsecomp.targets.x86.ort_calibrate, "calibrate", lambda: "as well")
    monkeypatch.setattr(sparsecomp.targets.arm.calibrate, "calibrate", lambda given: {"dense": (1.5, 3)})
    monkeypatch.setattr(
        sparsecomp.targets.cuda.calibrate, "calibrate", lambda given: {f"rows of {given.name}": (2.0, 4)}
    )
    result = runner.invoke(app, ["calibrate"])
    assert result.exit_code == 0, result.output
    cpu_says = {"x86_64": "the x86 CPU", "aarch64": "dense           takes 1.50", "another ARM CPU": "is not measured"}
    for name, text in cpu_says.items():
        assert (text in result.stdout) is (name == machine)
    assert result.stdout.index("rows of cuda:l4 takes 2.00") > result.stdout.index(cpu_says[machine])


def test_calibrate_says_why_a_card_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsecomp.cli import machine
    from sparsecomp.targets.cuda.cards import matched

    monkeypatch.setattr(machine, "_measure_cpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("sparsecomp.targets.cuda.cards.card_here", lambda: matched("Tesla V100", 70, 80, 6 << 20))
    result = runner.invoke(app, ["calibrate"])
    assert result.exit_code == 0, result.output
    assert "the GPU is not measured: Tesla V100 has compute capability 7.0" in result.stdout


def test_explain_for_a_board(bert_folder: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    arguments = ["--sparsify", "unstructured@0.9", "--tokens", "16", "--target", "arm:cortex-a53"]
    result = runner.invoke(app, ["explain", str(bert_folder), *arguments, "--json", str(report)])
    assert result.exit_code == 0, result.output
    assert json.loads(report.read_text())["plan"]["target"] == "arm:cortex-a53"


def test_explain_of_no_model(tmp_path: Path) -> None:
    missing = runner.invoke(app, ["explain", str(tmp_path / "nothing")])
    assert missing.exit_code == 1
    assert "is not a folder" in missing.stderr
    empty = runner.invoke(app, ["explain", str(tmp_path)])
    assert empty.exit_code == 1
    assert "config.json" in empty.stderr
    (tmp_path / "config.json").write_text("{}")
    unreadable = runner.invoke(app, ["explain", str(tmp_path)])
    assert unreadable.exit_code == 1
    assert "transformers cannot read" in unreadable.stderr


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT with the tokenizer of MiniLM, and a text beside it."""
    folder = tmp_path_factory.mktemp("text")
    model = models.bert(layers=2, width=128, heads=2, max_position_embeddings=64)
    model.save_pretrained(folder)  # type: ignore[operator]
    models.minilm()[1].save_pretrained(folder)
    (folder / "text.txt").write_text("\n".join(models.SENTENCES * 8), encoding="utf-8")
    return folder


def _pruned(folder: Path) -> dict[str, torch.Tensor]:
    weights = read_weights(folder)
    return {name: value for name, value in weights.items() if value.dim() == 2 and "embeddings" not in name}


@pytest.mark.parametrize(
    "options",
    [
        ["--criterion", "magnitude"],
        ["--calibration", "text.txt", "--tokens", "32"],
        [
            "--calibration",
            "text.txt",
            "--criterion",
            "wanda",
            "--refine",
            "dsnot",
            "--tokens",
            "32",
            "--sequences",
            "4",
        ],
    ],
)
def test_prune_writes_a_model_that_transformers_reads(text_model: Path, options: list[str], tmp_path: Path) -> None:
    options = [str(text_model / "text.txt") if option == "text.txt" else option for option in options]
    output = tmp_path / "pruned"
    result = runner.invoke(app, ["prune", str(text_model), "2:4", "-o", str(output), *options])
    assert result.exit_code == 0, result.output
    assert "layers pruned, 50.0% of their" in result.stdout
    weights = _pruned(output)
    assert len(weights) > 10
    assert all(Pattern.parse("2:4").check(weight) for weight in weights.values())
    import transformers

    model = transformers.AutoModel.from_pretrained(output)
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    assert model(**tokenizer("a text", return_tensors="pt")).last_hidden_state.shape[-1] == 128


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "give either a pattern"),
        (["2:4", "--plan", "plan.json"], "give either a pattern"),
        (["2;4"], "2;4"),
        (["2:4", "--criterion", "wanda"], "needs calibration"),
        (["2:4", "--calibration", "nothing.txt", "--tokens", "32"], "nothing.txt is not a file"),
        (["2:4", "--calibration", "text.txt", "--tokens", "65"], "at most 64 tokens"),
        (["2:4", "-o", "."], "exists already"),
    ],
)
def test_prune_says_what_is_wrong_and_writes_nothing(
    text_model: Path, arguments: list[str], expected: str, tmp_path: Path
) -> None:
    output = tmp_path / "pruned"
    result = runner.invoke(app, ["prune", str(text_model), "-o", str(output), *arguments])
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: ")
    assert expected in result.stderr
    assert not output.exists()


@pytest.mark.parametrize(("content", "expected"), [(b"short", "shorter than one sequence"), (b"\xff\xfe\x00", "UTF-8")])
def test_prune_needs_a_text_of_some_length(text_model: Path, content: bytes, expected: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    options = ["-o", str(tmp_path / "out"), "--calibration", str(text), "--tokens", "32"]
    result = runner.invoke(app, ["prune", str(text_model), "2:4", *options])
    assert result.exit_code == 1
    assert expected in result.stderr


def test_a_sparse_checkpoint_of_compressed_tensors_is_explained(text_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "compressed"
    folder.mkdir()
    weights = read_weights(text_model)
    name = "encoder.layer.0.output.dense.weight"
    pruned = Pattern.parse("2:4").project(weights.pop(name))
    mask = Pattern.parse("2:4").mask(pruned.abs())
    weights[name.replace("weight", "shape")] = torch.tensor(pruned.shape).reshape(-1, 1)
    weights[name.replace("weight", "compressed")] = pruned[mask].reshape(len(pruned), -1)
    weights[name.replace("weight", "bitmask")] = torch.from_numpy(np.packbits(mask.numpy(), axis=1, bitorder="little"))
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    config = json.loads((text_model / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "sparsity_config": {"format": "sparse-24-bitmask", "sparsity_structure": "2:4"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    result = runner.invoke(app, ["explain", str(folder), "--tokens", "16", "--json", str(tmp_path / "report.json")])
    assert result.exit_code == 0, result.output
    sites = {site["name"]: site for site in json.loads((tmp_path / "report.json").read_text())["plan"]["sites"]}
    assert sites["encoder.layer.0.output.dense"]["density"] == pytest.approx(0.5)


@pytest.mark.slow
def test_a_plan_is_what_prune_prunes_to(text_model: Path, tmp_path: Path) -> None:
    plan, output = tmp_path / "plan.json", tmp_path / "pruned"
    shared = ["--calibration", str(text_model / "text.txt"), "--tokens", "32", "--sequences", "8"]
    budget = ["--max-quality-loss", "0.5", "--pattern", "unstructured@0.8", "--criterion", "magnitude"]
    result = runner.invoke(app, ["plan", str(text_model), "-o", str(plan), *shared, *budget])
    assert result.exit_code == 0, result.output
    result = runner.invoke(app, ["prune", str(text_model), "--plan", str(plan), "-o", str(output), *shared])
    assert result.exit_code == 0, result.output
    assert Plan.load(output / "plan.json") == Plan.load(plan)
    wanted = {f"{choice.name}.weight": choice.prune for choice in Plan.load(plan)}
    assert any(wanted.values())
    for name, weight in _pruned(output).items():
        zeros = 1 - weight.count_nonzero() / weight.numel()
        assert zeros == pytest.approx(0.8 if wanted.get(name) else 0.0, abs=0.01)


def test_plan_says_what_is_wrong(text_model: Path) -> None:
    command = ["plan", str(text_model), "--calibration", str(text_model / "text.txt"), "--tokens", "32"]
    none = runner.invoke(app, command)
    assert none.exit_code == 1
    assert "give exactly one of" in none.stderr
    bad = runner.invoke(app, [*command, "--max-latency", "8 minutes"])
    assert bad.exit_code == 1
    assert "'8 ms'" in bad.stderr
