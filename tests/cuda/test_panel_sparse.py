"""The kernel of the sparse tensor cores: compiled by NVRTC, and run on the CPU under the emulator."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from sparsecomp.cuda.nvrtc import ARCHITECTURES, KERNELS, compile_kernel
from sparsecomp.cuda.panels import SparsePanels

EMULATOR = Path(__file__).parent / "emulator"
TYPES = {torch.float16: (), torch.bfloat16: ("BFLOAT16",)}


def build(folder, source, defines):
    if shutil.which("g++") is None:
        pytest.skip("g++ is missing")
    kernel = folder / "kernel.cu"
    kernel.write_text(source)
    flags = ["-O1", "-w", "-std=c++17", "-shared", "-fPIC", f"-I{EMULATOR}", f'-DKERNEL="{kernel}"']
    flags += [f"-D{define}" for define in defines]
    subprocess.run(["g++", *flags, str(EMULATOR / "panel_sparse.cpp"), "-o", str(folder / "k.so")], check=True)
    return ctypes.CDLL(str(folder / "k.so"))


def run(lib, weight, x, seed):
    packed = SparsePanels.pack(weight)
    y = torch.full((len(weight), x.shape[1]), torch.nan)
    given = (packed.values.contiguous(), packed.places.contiguous(), packed.columns, packed.starts, x, y)
    failure = lib.go(*(ctypes.c_void_p(t.data_ptr()) for t in given), len(weight), x.shape[1], seed)
    return y, chr(failure) if failure else ""


@pytest.mark.parametrize("dtype", TYPES)
def test_products_agree_at_ragged_sizes_in_any_order_of_threads(tmp_path, dtype):
    lib = build(tmp_path, (KERNELS / "panel_sparse.cu").read_text(), TYPES[dtype])
    generator = torch.Generator().manual_seed(0)
    for rows, columns, tokens in ((16, 64, 8), (33, 70, 11), (7, 45, 1)):
        weight = torch.randn(rows, columns, generator=generator)
        weight = (weight * (torch.rand(rows, columns, generator=generator) < 0.3)).to(dtype)
        x = torch.randn(columns, tokens, generator=generator).to(dtype)
        weight[:16] *= rows != 33  # a panel may be empty
        for seed in range(3):
            y, failure = run(lib, weight, x, seed)
            assert failure == ""
            torch.testing.assert_close(y, weight.float() @ x.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("which", [0, 1])
def test_a_missing_barrier_fails(tmp_path, which):
    parts = (KERNELS / "panel_sparse.cu").read_text().split("__syncthreads();")
    assert len(parts) == 3
    source = parts[0] + ("" if which == 0 else "__syncthreads();") + parts[1]
    source += ("__syncthreads();" if which == 0 else "") + parts[2]
    lib = build(tmp_path, source, ())
    assert run(lib, torch.ones(16, 64, dtype=torch.float16), torch.ones(64, 8, dtype=torch.float16), 0)[1] == "r"


def test_wrong_weights_are_refused():
    with pytest.raises(ValueError, match="float16 or bfloat16 matrix"):
        SparsePanels.pack(torch.ones(4, 4))
    with pytest.raises(ValueError, match="non-empty"):
        SparsePanels.pack(torch.ones(0, 4, dtype=torch.float16))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", TYPES)
def test_it_compiles_without_spills_to_sparse_products(arch, dtype):
    pytest.importorskip("nvidia", reason="nvidia-cuda-nvrtc is missing")
    cubin, ptx, log = compile_kernel("panel_sparse", arch, TYPES[dtype])
    assert cubin[:4] == b"\x7fELF"
    assert "mma.sp" in ptx
    assert "0 bytes spill stores, 0 bytes spill loads" in log, log
