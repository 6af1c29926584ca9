"""The row kernel against its reference and against the dense product."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    EPILOGUES,
    HERE,
    SOME_EPILOGUES,
    Inputs,
    assembly,
    close,
    dense,
    epilogue_name,
    needs_avx512,
    needs_x86,
    random_weight,
    run_kernel,
    tvm_target,
)

from sparsecomp.kernels import rows, tir
from sparsecomp.kernels.epilogue import Epilogue
from sparsecomp.kernels.quads import QuadShape
from sparsecomp.patterns.quads import QuadWeight
from sparsecomp.runtime.launch import KernelSource

USUAL = QuadShape(8, 2, "shuffle")
SCHEDULES = [
    QuadShape(4, 1, "load"),
    QuadShape(4, 4, "shuffle"),
    QuadShape(8, 1, "shuffle"),
    QuadShape(8, 3, "load"),
    QuadShape(16, 2, "load"),
    QuadShape(16, 4, "shuffle"),
]


def run(
    packed: QuadWeight,
    inputs: Inputs,
    schedule: QuadShape,
    epilogue: Epilogue,
    *,
    splits: int = 1,
    together: int = 2,
    threads: int = 1,
    target: dict[str, object] = HERE,
) -> torch.Tensor:
    tokens, width = inputs.x.shape
    source = KernelSource("rows", f"{schedule} {epilogue}", lambda: rows.build(schedule, epilogue), target)
    dims = [tokens, width, packed.shape[0], packed.blocks, packed.block, packed.block * schedule.tile]
    dims += [packed.chunk, together, splits]
    items = -(-tokens // schedule.tile) * splits
    scratch = rows.scratch_floats(packed.block, packed.chunk, together, schedule)
    arrays = rows.weights(packed)
    return run_kernel(source, arrays, dims, items, scratch, inputs, residual=epilogue.residual, threads=threads)


def check(
    weight: torch.Tensor,
    tokens: int,
    schedule: QuadShape = USUAL,
    epilogue: Epilogue = SOME_EPILOGUES[1],
    *,
    chunk: int = 8,
    block: int = 16,
    splits: int = 1,
    threads: int = 1,
) -> None:
    packed = QuadWeight.pack(weight, chunk=chunk, block=block)
    inputs = Inputs.random(tokens, *weight.shape)
    given = run(packed, inputs, schedule, epilogue, splits=splits, threads=threads)
    residual = inputs.residual.numpy() if epilogue.residual else None
    close(given, rows.reference(inputs.x.numpy(), packed, inputs.bias.numpy(), residual, epilogue))
    close(given, dense(weight, inputs, epilogue))


@needs_x86
class TestAgainstReferenceAndDense:
    @pytest.mark.parametrize("epilogue", EPILOGUES, ids=epilogue_name)
    def test_every_epilogue(self, epilogue: Epilogue) -> None:
        # 19 outputs: whole vectors of outputs, which are transposed, and single ones behind them.
        check(random_weight(19, 37), 21, USUAL, epilogue)

    @pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s.lanes}x{s.vectors}-{s.spread}")
    def test_every_schedule(self, schedule: QuadShape) -> None:
        for tokens in (schedule.tile - 1, schedule.tile, 2 * schedule.tile + 3):
            check(random_weight(41, 53), tokens, schedule, chunk=36)
            check(random_weight(41, 53), tokens, schedule, splits=2)

    @pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 33, 100])
    def test_tokens(self, tokens: int) -> None:
        check(random_weight(24, 32), tokens)

    @pytest.mark.parametrize("outputs", [1, 2, 3, 7, 8, 9, 16, 31, 65])
    def test_outputs(self, outputs: int) -> None:
        check(random_weight(outputs, 24), 9)
        check(random_weight(outputs, 24), 9, chunk=64)

    @pytest.mark.parametrize("inputs", [1, 3, 8, 9, 15, 17, 64, 131])
    def test_inputs(self, inputs: int) -> None:
        check(random_weight(10, inputs), 9)

    @pytest.mark.parametrize("block", [1, 5, 16, 40, 64])
    def test_blocks(self, block: int) -> None:
        check(random_weight(18, 40), 18, block=block)

    @pytest.mark.parametrize("chunk", [4, 8, 12, 48])
    @pytest.mark.parametrize("splits", [1, 2, 3, 7])
    def test_splits_of_the_chunks(self, chunk: int, splits: int) -> None:
        # With more splits than chunks some items have nothing to do.
        check(random_weight(29, 24), 35, chunk=chunk, splits=splits)

    @pytest.mark.parametrize("splits", [1, 3])
    def test_two_threads(self, splits: int) -> None:
        check(random_weight(40, 24), 70, splits=splits, threads=2)

    @pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
    def test_densities(self, density: float) -> None:
        check(random_weight(17, 48, density), 20)

    def test_an_empty_row_between_full_ones(self) -> None:
        weight = random_weight(9, 20, 0.9)
        weight[::2] = 0
        check(weight, 5)


@needs_x86
def test_nan_spreads_to_its_own_outputs_only() -> None:
    weight = random_weight(12, 24)
    weight[3, 5] = float("nan")
    inputs = Inputs.random(20, 12, 24)
    given = run(QuadWeight.pack(weight, chunk=4, block=7), inputs, USUAL, Epilogue())
    assert torch.isnan(given[:, 3]).all()
    weight[3] = 0
    keep = torch.arange(12) != 3
    close(given[:, keep], dense(weight, inputs, Epilogue())[:, keep])


@needs_x86
def test_a_token_that_is_nan_leaves_the_others_alone() -> None:
    # Tokens lie beside each other in the lanes, and those past the end repeat the last.
    weight = random_weight(12, 24)
    inputs = Inputs.random(21, 12, 24)
    inputs.x[4] = float("nan")
    given = run(QuadWeight.pack(weight, chunk=4, block=7), inputs, USUAL, Epilogue())
    keep = torch.arange(21) != 4
    assert torch.isnan(given[4, weight.count_nonzero(1) > 0]).all()
    close(given[keep], dense(weight, inputs, Epilogue())[keep])


def test_the_reference_needs_the_residual_that_it_adds() -> None:
    packed = QuadWeight.pack(random_weight(4, 4), chunk=4, block=4)
    inputs = Inputs.random(2, 4, 4)
    with pytest.raises(ValueError, match="adds a residual, and none was given"):
        rows.reference(inputs.x.numpy(), packed, inputs.bias.numpy(), None, Epilogue("none", True))


class TestGeneratedCode:
    def test_avx512_uses_whole_registers(self) -> None:
        text = assembly(rows.build(QuadShape(16, 4, "shuffle"), Epilogue()), "avx512")
        assert "zmm" in text
        assert "vfmadd" in text

    def test_avx2_fuses_multiply_and_add(self) -> None:
        text = assembly(rows.build(USUAL, Epilogue()), "avx2")
        assert "vfmadd" in text
        assert "ymm" in text
        assert "zmm" not in text

    def test_the_baseline_uses_nothing_newer(self) -> None:
        text = assembly(rows.build(QuadShape(4, 4, "load"), Epilogue("gelu")), "generic")
        assert "mulps" in text
        assert not any(word in text for word in ("ymm", "vfmadd", "roundps", "call"))

    def test_aarch64_fuses_multiply_and_add(self) -> None:
        target = {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["+neon"]}
        code, text = tir.compile_object(rows.build(QuadShape(4, 4, "load"), Epilogue("gelu", True)), "rows", target)
        assert code[:4] == b"\x7fELF"
        assert int.from_bytes(code[18:20], "little") == 183  # EM_AARCH64
        assert "fmla" in text
        assert "\tbl\t" not in text

    @needs_avx512
    def test_avx512_runs(self) -> None:
        weight, schedule = random_weight(70, 53), QuadShape(16, 4, "shuffle")
        inputs = Inputs.random(130, 70, 53)
        for epilogue in SOME_EPILOGUES:
            packed = QuadWeight.pack(weight, chunk=36, block=20)
            given = run(packed, inputs, schedule, epilogue, target=tvm_target("avx512"))
            close(given, dense(weight, inputs, epilogue))
