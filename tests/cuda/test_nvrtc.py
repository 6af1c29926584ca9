"""Every kernel for every architecture, compiled without a card."""

import importlib.metadata
import importlib.util
from importlib.machinery import ModuleSpec

import cuda_tools
import pytest
from cuda_tools import need_nvrtc

from sparsecomp.cuda.library import FFN, KERNELS, MAX_SHARED
from sparsecomp.cuda.nvrtc import ARCHITECTURES, compile_kernel, resources

COMPILED = [
    *((kernel.name, kernel.source, kernel.defines, (kernel.entry,), kernel.mma_sp) for kernel in KERNELS),
    *((ffn.name, ffn.source, ffn.defines, (ffn.hidden_entry, ffn.down_entry), False) for ffn in FFN),
]
MOST_REGISTERS = 128
"""Of a thread, so that a multiprocessor has room for 512 threads (of 65536 registers)."""


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel_compiles_within_the_limits_and_without_spills(arch):
    need_nvrtc()
    for name, source, defines, entries, sparse in COMPILED:
        cubin, ptx, log = compile_kernel(source, arch, defines)
        assert cubin[:4] == b"\x7fELF", name
        assert ("mma.sp" in ptx) == sparse, name
        assert ("mma.sync" in ptx) == (source in ("panel_tensor", "panel_int8") and not sparse), name
        assert "dp4a" in ptx or not (name.startswith("two_four") and name.endswith("int8")), name
        assert ("cp.async" in ptx) == source.startswith("panel"), name
        for entry in entries:
            taken = resources(log, entry)
            assert taken.spilled == 0, log
            assert taken.registers <= MOST_REGISTERS, log
            assert taken.shared <= 48 * 1024 < MAX_SHARED, log


def test_what_cannot_be_compiled_says_why():
    with pytest.raises(ValueError, match="choose one of sm_80"):
        compile_kernel("rows", "sm_70")
    need_nvrtc()
    with pytest.raises(ValueError, match="refuses kernel 'panel_fma' for sm_80"):
        compile_kernel("panel_fma", "sm_80", ("F32",))
    with pytest.raises(ValueError, match="does not tell what 'other'"):
        resources(compile_kernel("rows", "sm_80", ("F32",))[2], "other")


@pytest.mark.parametrize("installed", [False, True])
def test_another_package_of_nvidia_is_no_nvrtc(installed, tmp_path, monkeypatch):
    other = ModuleSpec("nvidia", None, is_package=True)
    other.submodule_search_locations = [str(tmp_path)]
    (tmp_path / "cublas" / "lib").mkdir(parents=True)
    monkeypatch.setattr(importlib.util, "find_spec", {"nvidia": other}.get)
    with pytest.raises(ModuleNotFoundError, match="NVRTC is not installed: pip install"):
        compile_kernel("rows", "sm_80", ("F32",))
    here = list(importlib.metadata.distributions(name="pytest")) if installed else []
    monkeypatch.setattr(cuda_tools, "distributions", lambda name: here)
    # Where its package is installed, that it is not found is an error, and else what tests are skipped for.
    expected = ModuleNotFoundError if installed else pytest.skip.Exception
    with pytest.raises(expected, match="NVRTC is not installed"):
        need_nvrtc()
