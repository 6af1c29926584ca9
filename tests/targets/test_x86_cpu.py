"""What CPU this is: levels by flags, tuning by vendor, cache sizes."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsecomp.targets.cpu import schedules
from sparsecomp.targets.cpu.level import Caches
from sparsecomp.targets.x86 import cpu, target

AVX2 = "avx2 fma f16c bmi1 bmi2 movbe"
AVX512 = AVX2 + " avx512f avx512bw avx512dq avx512vl avx512cd"


def pretend(monkeypatch: pytest.MonkeyPatch, **info: str) -> None:
    monkeypatch.setattr(cpu, "_cpuinfo", lambda: info)


@pytest.mark.parametrize(
    ("flags", "best"),
    [
        (AVX512, "avx512"),
        (AVX2, "avx2"),
        ("sse2", "generic"),
        ("", "generic"),
        (AVX512.replace("avx512vl", ""), "avx2"),
    ],
)
def test_the_best_level_follows_from_the_flags(flags: str, best: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, flags=flags)
    assert cpu.best_level() == best
    assert [name for name in cpu.LEVELS if cpu.supported(name)] == list(cpu.LEVELS[cpu.LEVELS.index(best) :])


def test_a_system_that_does_not_tell_is_generic(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    assert cpu.best_level() == "generic"
    assert cpu.cpu_name()


def test_a_level_that_this_cpu_lacks_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, flags=AVX2)
    with pytest.raises(ValueError, match=r"'x86:avx512' needs a CPU with avx512bw, .*; this one runs 'x86:avx2'"):
        target.create.__wrapped__("x86:avx512")


@pytest.mark.parametrize("name", cpu.LEVELS)
def test_levels_are_complete(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, vendor_id="somebody")
    level = cpu.level(name)
    assert level.name == name
    assert level.mcpu == cpu.facts()["levels"][name]["mcpu"]
    assert level.lanes in (4, 8, 16)
    assert level.vectors in schedules.ROW_VECTORS
    assert level.spread in ("", "pshufb", "expand")
    assert level.tvm_target["kind"] == "llvm"
    assert level.tvm_target.get("mattr", []) == list(level.mattr)


def test_tuning_by_vendor(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, vendor_id="AuthenticAMD")
    assert cpu.level("avx2").mcpu == "znver1"
    assert cpu.level("generic").mcpu == "x86-64"


def test_avx512_keeps_its_wide_vectors() -> None:
    assert cpu.level("avx512").tvm_target["mattr"] == ["-prefer-256-bit"]


def test_cache_sizes_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {
        "index0": ("Data", "1", "48K"),
        "index1": ("Instruction", "1", "64K"),
        "index2": ("Unified", "2", "1024K"),
        "index3": ("Unified", "4", "4096K"),
    }
    for index, values in found.items():
        (tmp_path / index).mkdir()
        for name, value in zip(("type", "level", "size"), values, strict=True):
            (tmp_path / index / name).write_text(value + "\n")
    (tmp_path / "index9").mkdir()  # says nothing
    monkeypatch.setattr(cpu, "_CACHES", tmp_path)
    assert cpu.caches.__wrapped__() == Caches(48 << 10, 1 << 20, cpu.facts()["caches"]["l3"])


def test_cache_sizes_where_the_system_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_CACHES", tmp_path / "nothing")
    assert cpu.caches.__wrapped__() == Caches(**cpu.facts()["caches"])
