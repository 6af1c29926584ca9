"""Packages for cards: their program is built and runs, on NVIDIA's driver as far as the emulator has it."""

from __future__ import annotations

import re
import shutil
import subprocess
import zlib
from collections.abc import Mapping
from pathlib import Path

import pytest
import tiny_models
import torch
from cuda_emulation import EMULATOR, compile_file
from cuda_tools import need_nvrtc
from torch import Tensor, nn
from typer.testing import CliRunner

import sparsecomp
from sparsecomp.cli import app
from sparsecomp.cuda import package
from sparsecomp.cuda.export import export_cuda
from sparsecomp.cuda.library import KERNELS
from sparsecomp.cuda.nvrtc import ARCHITECTURES
from sparsecomp.patterns import Pattern
from sparsecomp.planner import Plan, SiteChoice
from sparsecomp.targets.base import DENSE, Candidate

NAMED = {kernel.name: kernel for kernel in KERNELS}
CASES = {
    "panel_v16_f32": ("16:1:4", 11),
    "panel_sparse_v16_f16": ("2:4", 11),
    "block_v16_bf16": ("16x16@0.5", 8),
    "rows_f16": ("unstructured@0.7", 1),
    "rows_token_t4_bf16": ("unstructured@0.7", 3),
    "two_four_t1_f16": ("2:4", 1),
}
"""Kernels with the pattern of a weight, and the tokens of a call."""


class Layers(nn.Module):
    """Linears of several types and numbers of tokens, named as the kernels that a plan gives them."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for number, name in enumerate(names):
            layer = nn.Linear(96, 80, bias=number % 2 == 0)
            weight = torch.randn(80, 96, generator=generator) / 5
            layer.weight.data = Pattern.parse(CASES[name][0]).project(weight)
            self.add_module(name, layer.to(NAMED[name].dtype))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x[: CASES[name][1]].to(layer.weight.dtype)) for name, layer in self.named_children()]


def plan_for(*names: str) -> Plan:
    """A plan in which the layers get the kernels that they are called after."""
    plan = Plan("cuda:h100")
    for name in names:
        kernel = NAMED[name]
        sizes = {"v": kernel.rows if kernel.rows > 1 else 0, "tokens": kernel.tokens}
        params = tuple(sorted((key, value) for key, value in sizes.items() if value))
        pattern = CASES[name][0].partition("@")[0]
        chosen = Candidate(kernel.family, pattern, params)
        plan.add([SiteChoice(name, (80, 96), 0, 0.5, chosen, "")])
    return plan


X = torch.randn(11, 96, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Cubins that only name what they are of, but for a test of NVRTC; the emulator takes others."""
    if "nvrtc" not in request.node.name:
        monkeypatch.setattr(package, "cubin_of", lambda kernel, arch: f"{kernel.name} {arch}".encode())


def write(folder: Path, *names: str, arch: str | tuple[str, ...] = "sm_90") -> sparsecomp.Report:
    model = Layers(list(names)).eval()
    return export_cuda(model, [X], output=folder, arch=arch, options={"plan": plan_for(*names)})


def emulate(folder: Path) -> None:
    """Put what the emulator takes in the place of the cubins, made of the sources in the package as it says."""
    rules = re.findall(r"^ +kernel\((\S+) (\S+)(.*)\)$", (folder / "CMakeLists.txt").read_text(), re.MULTILINE)
    for name, source, rest in rules:
        defines = [part.removeprefix("-D") for part in rest.split()]
        library = folder / f"{name}.so"
        compile_file(folder / "kernels" / source, folder / "kernels", NAMED[name].entry, defines, library)
        for cubin in folder.glob(f"cubins/*/{name}.cubin"):
            cubin.write_bytes(f"{NAMED[name].entry}\n{library}\0".encode())


def build(folder: Path) -> None:
    """The package's program, with the emulated driver."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is missing")
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined", "-fno-sanitize-recover=all"]
    sources = [folder / "main.cpp", EMULATOR / "driver.cpp"]
    command = ["g++", *flags, f"-I{EMULATOR}", *map(str, sources), "-ldl", "-o", str(folder / "main")]
    subprocess.run(command, check=True)


def run(folder: Path, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [str(folder / "main"), str(folder), "1"]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=dict(environment or {}))


def test_the_program_finds_every_layer_right(tmp_path: Path) -> None:
    report = write(tmp_path, *CASES)
    assert [choice.name for choice in report.rewritten] == list(CASES)
    emulate(tmp_path)
    build(tmp_path)
    result = run(tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "the emulator, compute capability 9.0, code for sm_90"
    assert [line.split()[:2] for line in lines[1:-1]] == [[name, name] for name in CASES]
    assert all(line.endswith(": ok") for line in lines[1:-1])
    assert re.fullmatch(rf"{len(CASES)} layers, [\d.]+ us, 0 wrong", lines[-1])


def test_a_launch_may_take_more_shared_memory_than_is_there_without_asking(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8192, 8)).half()
    model[0].weight.data[:, 256:] = 0
    plan = Plan("cuda:h100")
    plan.add([SiteChoice("0", (8, 8192), 0, 0.5, Candidate("rows_token", "unstructured", (("tokens", 4),)), "")])
    export_cuda(model, [torch.ones(2, 8192).half()], output=tmp_path, arch="sm_90", options={"plan": plan})
    assert ", 65600,\n" in (tmp_path / "layers.h").read_text()  # 4 tokens of 8200 values, and more than 48 KiB
    emulate(tmp_path)
    build(tmp_path)
    result = run(tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_linear_of_a_transformer_is_right(tmp_path: Path) -> None:
    model = tiny_models.llama(layers=1)
    model.config.use_cache = False
    plan = Plan("cuda:a100")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.weight.data = Pattern.parse("unstructured@0.7").project(module.weight.data)
            plan.add([SiteChoice(name, (0, 0), 0, 0.3, Candidate("rows", "unstructured"), "")])
    export_cuda(model, [tiny_models.texts(1, 9)[0]], output=tmp_path, arch="sm_80", options={"plan": plan})
    emulate(tmp_path)
    build(tmp_path)
    result = run(tmp_path, {"EMULATED_CAPABILITY": "80"})
    assert result.returncode == 0, result.stdout + result.stderr
    assert [line.split()[0] for line in result.stdout.splitlines()[1:-1]] == [choice.name for choice in plan]


class Int8(nn.Module):
    """A product of int8, whose sums are int32."""

    def __init__(self) -> None:
        super().__init__()
        weight = Layers(["rows_f16"]).rows_f16.weight
        self.register_buffer("matrix", (100 * weight.detach()).clamp(-127, 127).to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return torch._int_mm((50 * x).to(torch.int8), self.matrix.t())


def test_integers_are_exact(tmp_path: Path) -> None:
    plan = Plan("cuda:h100")
    plan.add([SiteChoice("matrix", (80, 96), 0, 0.3, Candidate("rows", "unstructured"), "")])
    export_cuda(Int8(), [X], output=tmp_path, arch="sm_90", options={"plan": plan})
    emulate(tmp_path)
    build(tmp_path)
    result = run(tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "error 0 of what is allowed: ok" in result.stdout


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of one layer that can run."""
    folder = tmp_path_factory.mktemp("package")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(package, "cubin_of", lambda kernel, arch: b"")
        write(folder, "rows_token_t4_bf16", arch=("sm_80", "sm_90"))
    emulate(folder)
    build(folder)
    return folder


@pytest.fixture
def copied(ready: Path, tmp_path: Path) -> Path:
    return shutil.copytree(ready, tmp_path / "copy")


@pytest.mark.parametrize(("capability", "code"), [("80", "sm_80"), ("89", "sm_80"), ("90", "sm_90")])
def test_a_card_runs_the_newest_code_that_it_can(ready: Path, capability: str, code: str) -> None:
    result = run(ready, {"EMULATED_CAPABILITY": capability})
    assert result.returncode == 0, result.stderr
    assert f"code for {code}\n" in result.stdout


@pytest.mark.parametrize(("environment", "message"), [
    ({"EMULATED_CAPABILITY": "100"}, "card is of sm_100, and this package has code for sm_80 sm_90; export it"),
    ({"EMULATED_CAPABILITY": "75"}, "card is of sm_75"),
    ({"EMULATED_CARDS": "0"}, "there is no NVIDIA card here"),
])  # fmt: skip
def test_a_machine_without_a_card_for_it_says_so(ready: Path, environment: dict[str, str], message: str) -> None:
    result = run(ready, environment)
    assert result.returncode == 2
    assert message in result.stderr


@pytest.mark.parametrize("name", ["weights.bin", "recorded.bin"])
@pytest.mark.parametrize(("change", "message"), [
    (lambda path: path.unlink(), "cannot open"),
    (lambda path: path.write_bytes(path.read_bytes()[:-256]), "bytes, not"),
    (lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]), "is damaged"),
])  # fmt: skip
def test_broken_files_are_refused(copied: Path, name: str, change, message: str) -> None:
    change(copied / name)
    result = run(copied)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert name in result.stderr


def test_cubins_that_are_missing_or_no_code_are_refused(copied: Path) -> None:
    (cubin,) = copied.glob("cubins/sm_90/*")
    cubin.write_bytes(b"no code\0")
    result = run(copied)
    assert result.returncode == 2
    assert "loading rows_token_t4_bf16.cubin failed with code 200: invalid image" in result.stderr
    cubin.unlink()
    assert "cannot open" in run(copied).stderr


def test_a_wrong_weight_is_found(copied: Path) -> None:
    weights = bytearray((copied / "weights.bin").read_bytes())
    value = next(at for at in range(0, len(weights), 2) if weights[at + 1] & 0x7F)
    weights[value + 1] ^= 0x80  # the sign of the first weight, all else is as it should be
    (copied / "weights.bin").write_bytes(weights)
    header = copied / "layers.h"
    changed = re.sub(r'("weights.bin", \d+), \d+u', rf"\1, {zlib.crc32(weights)}u", header.read_text())
    header.write_text(changed)
    build(copied)
    result = run(copied)
    assert result.returncode == 1
    assert "WRONG" in result.stdout
    assert result.stdout.endswith(" 1 wrong\n")


def test_cmake_builds_the_program(copied: Path) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("cmake is missing")
    driver = copied / "libdriver.so"
    flags = ["-std=c++17", "-shared", "-fPIC", f"-I{EMULATOR}"]
    subprocess.run(["g++", *flags, str(EMULATOR / "driver.cpp"), "-o", str(driver), "-ldl"], check=True)
    places = [f"-DCUDA_INCLUDE_DIR={EMULATOR}", f"-DCUDA_DRIVER_LIBRARY={driver}"]
    subprocess.run(["cmake", "-S", ".", "-B", "build", *places], cwd=copied, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", "build"], cwd=copied, check=True, capture_output=True)
    result = subprocess.run(["build/main", ".", "1"], cwd=copied, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_nvcc_compiles_the_sources_again(copied: Path) -> None:
    for tool in ("cmake", "nvcc"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is missing")
    places = [f"-DCUDA_INCLUDE_DIR={EMULATOR}", f"-DCUDA_DRIVER_LIBRARY={copied / 'main'}"]
    subprocess.run(["cmake", "-S", ".", "-B", "build", *places], cwd=copied, check=True, capture_output=True)
    made = subprocess.run(
        ["cmake", "--build", "build", "--target", "cubins"], cwd=copied, capture_output=True, check=False
    )
    assert made.returncode == 0, made.stderr
    assert [path.read_bytes()[:4] for path in copied.glob("cubins/*/*.cubin")] == [b"\x7fELF"] * 2


def test_nvrtc_compiles_for_every_architecture_that_is_asked_for(tmp_path: Path) -> None:
    need_nvrtc()
    write(tmp_path, "rows_f16", arch=("sm_80", "sm_90"))
    for arch in ("sm_80", "sm_90"):
        assert (tmp_path / "cubins" / arch / "rows_f16.cubin").read_bytes()[:4] == b"\x7fELF"


def test_a_package_can_be_read_by_people(tmp_path: Path) -> None:
    write(tmp_path, "panel_v16_f32", "rows_f16")
    listed = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert listed == {
        *("CMakeLists.txt", "README.md", "layers.h", "main.cpp", "plan.json", "recorded.bin", "weights.bin"),
        *("kernels/device.cuh", "kernels/intrinsics.cuh", "kernels/panel_fma.cu", "kernels/rows.cu"),
        *("cubins/sm_90/panel_v16_f32.cubin", "cubins/sm_90/rows_f16.cubin"),
    }
    readme = (tmp_path / "README.md").read_text()
    assert "**No card ran this package" in readme
    assert "| panel_v16_f32 | 80 x 96 | 11 | panel_v16_f32 |" in readme
    assert "kernel(panel_v16_f32 panel_fma.cu -DF32 -DV=16)" in (tmp_path / "CMakeLists.txt").read_text()
    assert Plan.load(tmp_path / "plan.json").site("rows_f16").chosen.kernel == "rows"


def test_an_export_replaces_the_kernels_of_the_one_before(tmp_path: Path) -> None:
    write(tmp_path, "panel_v16_f32")
    (tmp_path / "notes.txt").write_text("mine")
    write(tmp_path, "rows_f16", arch="sm_80")
    assert {path.name for path in tmp_path.rglob("*.cu*")} == {
        "rows.cu",
        "device.cuh",
        "intrinsics.cuh",
        "rows_f16.cubin",
    }
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_sources_of_somebody_else_stay(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "mine.cu").write_text("mine")
    write(tmp_path, "rows_f16")
    assert (tmp_path / "kernels" / "mine.cu").read_text() == "mine"


class Mixed(nn.Module):
    """What gets kernels, and what does not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1)
        self.first, self.full = Layers(["rows_f16"]).rows_f16.float(), nn.Linear(80, 96)
        self.left = Layers(["rows_f16"]).rows_f16.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.left(self.full(self.first(self.conv(x[:, None])[:, 0])).double())


def test_layers_that_stay_dense_are_listed_with_their_reasons(tmp_path: Path) -> None:
    plan = Plan("cuda:h100")
    for name in ("first", "left"):
        plan.add([SiteChoice(name, (80, 96), 0, 0.3, Candidate("rows", "unstructured"), "")])
    report = sparsecomp.export(Mixed(), [X], target="cuda:l4", output=tmp_path, options={"plan": plan})
    assert [choice.name for choice in report.rewritten] == ["first"]
    readme = (tmp_path / "README.md").read_text()
    assert "- full: dense: the weight has no zeros" in readme
    assert "- left: dense: its weight is float64" in readme
    assert "- conv: " in readme
    assert (tmp_path / "cubins" / "sm_89" / "rows_f32.cubin").exists()


def test_what_follows_a_layer_in_place_does_not_change_what_is_recorded(tmp_path: Path) -> None:
    layer = Layers(["rows_f16"]).rows_f16.float()
    model = nn.Sequential(layer, nn.ReLU(inplace=True))
    plan = Plan("cuda:h100")
    plan.add([SiteChoice("0", (80, 96), 0, 0.3, Candidate("rows", "unstructured"), "")])
    export_cuda(model, [X], output=tmp_path, arch="sm_90", options={"plan": plan})
    (at, rows, columns) = re.search(
        r"Type::float32, \d+, \d+, (\d+), (\d+), (\d+),", (tmp_path / "layers.h").read_text()
    ).groups()
    recorded = torch.frombuffer(bytearray((tmp_path / "recorded.bin").read_bytes()), dtype=torch.float32)
    y = recorded[int(at) // 4 :][: int(rows) * int(columns)].view(int(rows), int(columns))
    with torch.no_grad():
        torch.testing.assert_close(y, layer(X).t())


def test_a_file_of_torch_export_gives_the_same_package_by_the_command_line(tmp_path: Path) -> None:
    model, plan = Layers(["rows_f16"]).eval(), plan_for("rows_f16")
    export_cuda(model, [X], output=tmp_path / "module", arch="sm_90", options={"plan": plan})
    torch.export.save(torch.export.export(model, (X,)), tmp_path / "model.pt2")
    plan.save(tmp_path / "plan.json")
    arguments = ["export", str(tmp_path / "model.pt2"), "--target", "cuda", "--arch", "sm_90"]
    arguments += ["--plan", str(tmp_path / "plan.json"), "-o", str(tmp_path / "file")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    for name in ("weights.bin", "recorded.bin", "CMakeLists.txt"):
        assert (tmp_path / "file" / name).read_bytes() == (tmp_path / "module" / name).read_bytes(), name
    assert "model.pt2" in (tmp_path / "file" / "layers.h").read_text()


def test_command_line_options_of_other_targets_are_refused(tmp_path: Path) -> None:
    for options, message in (
        (["--target", "cuda", "--threads", "2"], "--target cuda takes --arch"),
        (["--arch", "sm_90"], "--arch belongs to --target cuda"),
    ):
        result = CliRunner().invoke(app, ["export", "model.pt2", "-o", str(tmp_path), *options])
        assert result.exit_code == 1
        assert message in result.output


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_an_architecture_without_a_known_card_takes_the_prices_of_one_before(tmp_path: Path, arch: str) -> None:
    report = write(tmp_path, "rows_f16", arch=arch)
    assert report.rewritten
    assert f"({arch}) chose the kernels" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(("changes", "message"), [
    ({"arch": "sm_70"}, r"unknown architecture 'sm_70'; kernels are compiled for sm_80, .*sm_90"),
    ({"target": "cuda:h1000"}, "unknown target 'cuda:h1000' to export for; the targets are cuda, cuda:a100"),
    ({"arch": None}, "give an architecture, such as arch='sm_90'"),
    ({"inputs": None}, "with example inputs"),
    ({"model": "model.onnx", "inputs": None}, "programs of torch.export .*given model.onnx"),
    ({"model": "model.onnx"}, "has its own example inputs"),
    ({"threads": 2}, "threads and cpu_name belong to boards"),
    ({"target": "arm"}, "arch='sm_90' belongs to cards"),
])  # fmt: skip
def test_what_cannot_be_exported_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    given = {"model": Layers(["rows_f16"]), "inputs": [X], "target": "cuda", "arch": "sm_90", **changes}
    with pytest.raises(ValueError, match=message):
        sparsecomp.export(given.pop("model"), given.pop("inputs"), output=tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_a_model_without_sparse_kernels_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(96, 80), nn.Linear(80, 80), nn.Linear(80, 80), nn.Linear(80, 80))
    with pytest.raises(ValueError, match=r"no layer gets a sparse kernel on cuda:h100: 0 is dense: .* and 1 more"):
        export_cuda(model, [X], output=tmp_path / "out", arch="sm_90")
    with pytest.raises(ValueError, match="has no linear with a constant weight"):
        export_cuda(nn.ReLU(), [X], output=tmp_path / "out", arch="sm_90")
    assert not (tmp_path / "out").exists()


def test_a_model_whose_output_is_not_finite_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the output of rows_f16 is not finite"):
        export_cuda(
            Layers(["rows_f16"]), [X * torch.nan], output=tmp_path, arch="sm_90", options={"plan": plan_for("rows_f16")}
        )


def test_a_plan_may_leave_layers_dense(tmp_path: Path) -> None:
    plan = plan_for("rows_f16")
    plan.add([SiteChoice("panel_v16_f32", (80, 96), 0, 0.5, DENSE, "")])
    model = Layers(["rows_f16", "panel_v16_f32"])
    export_cuda(model, [X], output=tmp_path, arch="sm_90", options={"plan": plan})
    assert "- panel_v16_f32: dense: the plan says so" in (tmp_path / "README.md").read_text()
