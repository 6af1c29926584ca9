"""ARM CPUs that PyTorch runs on: found by their part numbers, with kernels that are called through the launcher.

The kernels run here too, built for this machine; those for AArch64 run under QEMU, through the same launcher.
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import arm_tools
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import sparsecomp
from sparsecomp.backend import compilations
from sparsecomp.kernels import tir
from sparsecomp.patterns import Pattern
from sparsecomp.runtime import launch
from sparsecomp.runtime.facts import facts_of
from sparsecomp.runtime.launch import KernelSource, Weights
from sparsecomp.targets.arm import cpu as cpus
from sparsecomp.targets.arm import machine
from sparsecomp.targets.arm.calibrate import calibrate
from sparsecomp.targets.arm.cpu import FALLBACK, MACHINES, cpu, cpu_names, features, host_level, this_cpu, unfit
from sparsecomp.targets.arm.machine import ArmMachine
from sparsecomp.targets.arm.target import ArmTarget
from sparsecomp.targets.base import DEPTHWISE, Candidate, ConvEpilogue
from sparsecomp.window import Window

A76 = cpu("cortex-a76")
LEVEL = this_cpu().level if platform.machine() in MACHINES else host_level()
ROWS = Candidate("rows", "unstructured")
CORE = "processor : {}\nFeatures : {}\nCPU implementer : {}\nCPU architecture: 8\nCPU variant : 0x1\nCPU part : {}\n\n"
V8_2 = "fp asimd asimdhp asimddp"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ArmMachine:
    """A machine without measurements, whose kernels are built for the CPU that the tests run on."""
    monkeypatch.setenv("SPARSECOMP_CACHE_DIR", str(tmp_path))
    return ArmMachine(A76, LEVEL)


def close(given: Tensor, expected: Tensor) -> None:
    assert (given - expected).abs().max() <= 1e-5 * expected.abs().max()


class TestFinding:
    def be(self, monkeypatch: pytest.MonkeyPatch, *cores: tuple[str, str], flags: str = V8_2) -> None:
        text = "".join(CORE.format(number, flags, *core) for number, core in enumerate(cores))
        monkeypatch.setattr(cpus, "_cpuinfo", lambda: text)
        monkeypatch.setattr(platform, "machine", lambda: "aarch64")

    @pytest.mark.parametrize("name", cpu_names())
    def test_every_known_part_is_found(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        for part in cpus._facts()[name]["parts"]:
            self.be(monkeypatch, tuple(part.split("/")), flags=f"{V8_2} sve")
            assert this_cpu().name == name
            found = machine.create("arm")
            assert isinstance(found, ArmMachine)
            assert found.name == f"arm:{name}"
            assert found.why_not_here() is None

    def test_of_big_and_little_cores_the_big_ones_count(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.be(monkeypatch, ("0x41", "0xd05"), ("0x41", "0xd0b"), ("0x41", "0xd05"))
        assert this_cpu().name == "cortex-a76"

    def test_an_unknown_cpu_is_taken_for_a_plain_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.be(monkeypatch, ("0x51", "0x001"))
        assert this_cpu().name == FALLBACK
        assert not cpu(FALLBACK).needs
        self.be(monkeypatch)
        assert this_cpu().name == FALLBACK

    def test_code_for_another_cpu_runs_where_its_instructions_are_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.be(monkeypatch, ("0x41", "0xd0b"))
        assert features() == set(V8_2.split())
        assert isinstance(machine.create("arm:cortex-a53"), ArmMachine)
        other = machine.create("arm:neoverse-v1")
        assert not isinstance(other, ArmMachine)
        assert other.why_not_here() == unfit(cpu("neoverse-v1")) == "this CPU has no sve"
        self.be(monkeypatch, ("0x41", "0xd4f"), flags=f"{V8_2} sve")  # Neoverse V2: SVE of 128 bits
        assert "256 bits" in str(machine.create("arm:neoverse-v1").why_not_here())

    def test_elsewhere_a_cpu_is_exported_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(platform, "machine", lambda: "x86_64")
        reason = machine.create("arm:cortex-a76").why_not_here()
        assert reason is not None
        assert "x86_64" in reason
        assert "export" in reason


class TestKernels:
    @pytest.mark.parametrize("pattern", ["unstructured@0.8", "2:4", "8:2:4", "16x1@0.5"])
    @pytest.mark.parametrize("tokens", [1, 7, 64])
    def test_of_linears_compute_the_linear(self, here: ArmMachine, pattern: str, tokens: int) -> None:
        weight = Pattern.parse(pattern).project(torch.randn(40, 72))
        x, bias, residual = torch.randn(tokens, 72), torch.randn(40), torch.randn(tokens, 40)
        facts = facts_of(weight, False)
        for candidate in here.candidates(facts)[1:]:
            kernel, out = here.prepare(candidate, weight), torch.empty(tokens, 40)
            kernel.build(tokens, "gelu", True)
            kernel.run(x, bias, residual, "gelu", out)
            close(out, functional.gelu(functional.linear(x, weight, bias)) + residual)
            kernel.run(x, None, None, "none", out)
            close(out, functional.linear(x, weight))
            assert kernel.nbytes > 0

    @pytest.mark.parametrize(
        "window",
        [
            Window((1, 1)),
            Window((3, 3), padding=(1, 1)),
            Window((3, 3), stride=(2, 2), padding=(1, 1)),
            Window((3, 3), padding=(1, 1), groups=4),
            Window((5, 5), padding=(2, 2), groups=16),
        ],
        ids=str,
    )
    def test_of_convolutions_compute_the_convolution(self, here: ArmMachine, window: Window) -> None:
        weight = torch.randn(16, 16 // window.groups, *window.kernel)
        if window.groups < 16:
            weight = Pattern.parse("unstructured@0.6").project(weight.flatten(1)).reshape(weight.shape)
        facts = facts_of(weight, False)
        (candidate,) = here.conv_candidates(facts, window)[1:]
        assert candidate == (DEPTHWISE if window.groups == 16 else Candidate("conv", "unstructured"))
        kernel, x = here.prepare_conv(candidate, weight, window), torch.randn(2, 16, 11, 11)
        terms = torch.randn(32)
        sums = functional.conv2d(x, weight, None, window.stride, window.padding, window.dilation, window.groups)
        shift, scale = terms.reshape(2, 16, 1, 1)
        expected, residual = torch.relu(sums * scale + shift), torch.randn(sums.shape)
        out = torch.empty(sums.shape)
        kernel.run(x, terms, residual, ConvEpilogue("relu"), out)
        close(out, expected + residual)

    def test_a_weight_has_to_satisfy_the_pattern(self, here: ArmMachine) -> None:
        with pytest.raises(ValueError, match="does not satisfy the pattern of rows"):
            here.prepare(Candidate("rows", "2:4"), torch.ones(4, 8))

    def test_their_assembly_can_be_read(self, here: ArmMachine) -> None:
        kernel = here.prepare(ROWS, torch.eye(8))
        kernel.build(16, "none", False)
        assert "ret" in kernel.source


def test_without_measurements_kernels_must_beat_pytorch_clearly(here: ArmMachine) -> None:
    assert {here.scale(family) for family in ("rows", "panel", "conv", "depthwise")} == {1.25}
    assert {here.scale(family) for family in ("dense", "dense_conv", "dense_depthwise")} == {1.0}


def test_calibration_keeps_what_was_measured(here: ArmMachine) -> None:
    found = calibrate(here, linears=((32, 32),), convs=((8, 8, 7, 1),))
    assert set(found) == {"dense", "rows", "panel", "dense_conv", "conv", "dense_depthwise", "depthwise"}
    after = ArmMachine(A76, LEVEL)
    assert {family: after.scale(family) for family in found} == {name: factor for name, (factor, _) in found.items()}
    assert "measured" in after.description
    # Packages have dense kernels of their own: what PyTorch takes says nothing about them.
    assert ArmTarget(A76).scale("dense") == 1.0


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 32, 3, stride=2, padding=1)
        self.up, self.down = nn.Linear(32, 96), nn.Linear(96, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x)).flatten(2).transpose(1, 2)
        return x + self.down(functional.gelu(self.up(x)))


def compile_network(target: ArmMachine) -> None:
    model, x = Network().eval(), torch.randn(1, 8, 31, 31)
    sparsecomp.sparsify_(model, "unstructured@0.8")
    with torch.no_grad():
        close(torch.compile(model, backend="sparse", options={"target": target})(x), model(x))
    assert compilations()[-1].rewritten == ["conv", "up", "down"], compilations()[-1].plan


def test_models_compile_to_them(here: ArmMachine) -> None:
    compile_network(here)


class EmulatedLaunch:
    """What `Launch` does, for code for AArch64: `native.c` and the kernel are cross-built and run under QEMU."""

    folder: Path
    runs = 0

    def __init__(
        self, source: KernelSource, weights: Weights, dims: Sequence[int], items: int, threads: int, scratch: int
    ) -> None:
        self._folder = self.folder / source.name
        self._numbers = [str(items), str(threads), str(4 * scratch)]
        self._weights, self._dims = weights, torch.tensor(dims, dtype=torch.int32).numpy().tobytes()
        if not self._folder.exists():
            self._build(source)

    def _build(self, source: KernelSource) -> None:
        self._folder.mkdir()
        (self._folder / "kernel.o").write_bytes(tir.compile_object(source.build(), source.name, dict(source.target))[0])
        sources = [f"-DKERNEL={source.name}", "kernel.o", str(Path(__file__).with_name("launch.c"))]
        command = [*arm_tools.threaded_compiler(), "-O2", *sources, str(launch._NATIVE), "-lm", "-o", "launch"]
        subprocess.run(command, cwd=self._folder, check=True, timeout=300)
        # The launcher of PyTorch loads kernels as shared objects.
        shared = [*arm_tools.cross_compiler(), "-shared", *sources, "-o", "kernel.so"]
        subprocess.run(shared, cwd=self._folder, check=True, timeout=300)

    def run(self, x: Tensor, bias: Tensor, residual: Tensor | None, out: Tensor) -> None:
        EmulatedLaunch.runs += 1
        contents = {"x": x, "bias": bias, **({} if residual is None else {"residual": residual})}
        (self._folder / "residual").unlink(missing_ok=True)
        for name, tensor in contents.items():
            (self._folder / name).write_bytes(tensor.numpy().tobytes())
        for number, array in enumerate(self._weights._arrays):
            (self._folder / f"w{number}").write_bytes(array.tobytes())
        (self._folder / "dims").write_bytes(self._dims)
        command = [arm_tools.emulator(), "./launch", str(out.numel()), *self._numbers]
        subprocess.run(command, cwd=self._folder, check=True, timeout=300)
        content: Any = bytearray((self._folder / "y").read_bytes())
        out.copy_(torch.frombuffer(content, dtype=torch.float32).reshape(out.shape))


@pytest.mark.arm
@pytest.mark.usefixtures("here", "threads")
def test_models_compile_to_code_for_aarch64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arm_tools.emulator()
    torch.set_num_threads(2)
    monkeypatch.setattr(EmulatedLaunch, "folder", tmp_path, raising=False)
    monkeypatch.setattr(EmulatedLaunch, "runs", 0)
    monkeypatch.setattr(machine, "function_of", lambda source: source)
    monkeypatch.setattr(machine, "Launch", EmulatedLaunch)
    compile_network(ArmMachine(A76, A76.level))
    assert EmulatedLaunch.runs >= 4  # the maps are taken apart for the window's stride, and three sites
