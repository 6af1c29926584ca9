"""The command line: what it prints, what it writes, and how it says that something is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import models
import pytest
from typer.testing import CliRunner

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
    for command in ("info", "calibrate", "explain"):
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
