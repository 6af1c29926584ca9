"""The kernels for few tokens against their reference and against the dense product."""

from __future__ import annotations

import numpy as np
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
    needs_avx2,
    needs_avx512,
    needs_x86,
    random_weight,
    run_kernel,
    tvm_target,
)

from sparsecomp.kernels import gathered
from sparsecomp.kernels.epilogue import Epilogue
from sparsecomp.kernels.gathered import GatherSchedule, MaskSchedule
from sparsecomp.patterns.gathered import GatherWeight, MaskWeight
from sparsecomp.runtime.launch import KernelSource

USUAL = GatherSchedule(8, 2)
SCHEDULES = [GatherSchedule(4, 1), GatherSchedule(4, 4), GatherSchedule(8, 1), GatherSchedule(16, 1)]
PSHUFB, EXPAND = MaskSchedule("pshufb"), MaskSchedule("expand")


def run_gather(
    weight: torch.Tensor,
    inputs: Inputs,
    schedule: GatherSchedule,
    epilogue: Epilogue,
    threads: int = 1,
    target: dict[str, object] = HERE,
) -> torch.Tensor:
    packed = GatherWeight.pack(weight, group=schedule.group)
    build = lambda: gathered.build_gather(schedule, epilogue)  # noqa: E731 -- called if it is not cached
    source = KernelSource("gather", f"{schedule} {epilogue}", build, target)
    return _run(source, gathered.gather_weights(packed), weight, inputs, epilogue, threads)


def run_mask(
    weight: torch.Tensor,
    inputs: Inputs,
    schedule: MaskSchedule,
    epilogue: Epilogue,
    threads: int = 1,
    target: dict[str, object] = HERE,
) -> torch.Tensor:
    build = lambda: gathered.build_mask(schedule, epilogue)  # noqa: E731 -- called if it is not cached
    source = KernelSource("mask", f"{schedule} {epilogue}", build, target)
    return _run(source, gathered.mask_weights(MaskWeight.pack(weight)), weight, inputs, epilogue, threads)


def _run(source, arrays, weight, inputs, epilogue, threads):  # type: ignore[no-untyped-def]
    outputs, width = weight.shape
    dims = [inputs.x.shape[0], width, outputs]
    return run_kernel(source, arrays, dims, outputs, 0, inputs, residual=epilogue.residual, threads=threads)


def check_gather(
    weight: torch.Tensor,
    tokens: int,
    schedule: GatherSchedule = USUAL,
    epilogue: Epilogue = SOME_EPILOGUES[1],
    threads: int = 1,
) -> None:
    inputs = Inputs.random(tokens, *weight.shape)
    given = run_gather(weight, inputs, schedule, epilogue, threads)
    packed = GatherWeight.pack(weight, group=schedule.group)
    residual = inputs.residual.numpy() if epilogue.residual else None
    close(given, gathered.reference(inputs.x.numpy(), packed, inputs.bias.numpy(), residual, epilogue))
    close(given, dense(weight, inputs, epilogue))


def check_mask(weight: torch.Tensor, tokens: int, epilogue: Epilogue = SOME_EPILOGUES[1], threads: int = 1) -> None:
    inputs = Inputs.random(tokens, *weight.shape)
    given = run_mask(weight, inputs, PSHUFB, epilogue, threads)
    residual = inputs.residual.numpy() if epilogue.residual else None
    packed = MaskWeight.pack(weight)
    close(given, gathered.reference(inputs.x.numpy(), packed, inputs.bias.numpy(), residual, epilogue))
    close(given, dense(weight, inputs, epilogue))


@needs_x86
class TestGather:
    @pytest.mark.parametrize("epilogue", EPILOGUES, ids=epilogue_name)
    def test_every_epilogue(self, epilogue: Epilogue) -> None:
        check_gather(random_weight(19, 45), 3, USUAL, epilogue)

    @pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s.lanes}x{s.sums}")
    def test_every_schedule(self, schedule: GatherSchedule) -> None:
        for inputs in (schedule.group - 1, 3 * schedule.group + 1):
            check_gather(random_weight(13, inputs, 0.6), 2, schedule)

    @pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
    @pytest.mark.parametrize("tokens", [1, 2, 8])
    def test_densities_and_tokens(self, density: float, tokens: int) -> None:
        check_gather(random_weight(17, 70, density), tokens)

    @pytest.mark.parametrize("shape", [(1, 1), (1, 100), (100, 1), (3, 16), (5, 17)])
    def test_shapes(self, shape: tuple[int, int]) -> None:
        check_gather(random_weight(*shape, density=0.7), 2)

    def test_the_widest_weight_reaches_its_last_column(self) -> None:
        weight = torch.zeros(2, 65536)
        weight[0, 65535], weight[1, 40000] = 2.0, -1.0
        check_gather(weight, 2)

    def test_two_threads(self) -> None:
        check_gather(random_weight(33, 40), 3, threads=2)


@needs_avx2
class TestMask:
    @pytest.mark.parametrize("epilogue", EPILOGUES, ids=epilogue_name)
    def test_every_epilogue(self, epilogue: Epilogue) -> None:
        check_mask(random_weight(19, 45, 0.5), 3, epilogue)

    @pytest.mark.parametrize("inputs", [1, 3, 15, 16, 17, 31, 32, 100])
    def test_inputs_that_fill_no_word(self, inputs: int) -> None:
        check_mask(random_weight(9, inputs, 0.5), 2)

    @pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
    @pytest.mark.parametrize("tokens", [1, 2, 8])
    def test_densities_and_tokens(self, density: float, tokens: int) -> None:
        check_mask(random_weight(17, 72, density), tokens)

    def test_every_four_bits(self) -> None:
        # Row r keeps the columns of the bits of r, in each of the four parts of a word.
        bits = torch.tensor([[float(row >> bit & 1) for bit in range(4)] for row in range(16)])
        check_mask(torch.cat([bits, bits.flip(0), bits.roll(5, 0), bits.roll(9, 0)], dim=1) * torch.randn(16, 16), 1)

    def test_two_threads(self) -> None:
        check_mask(random_weight(33, 40, 0.5), 3, threads=2)


@needs_avx2
@pytest.mark.parametrize("family", ["gather", "mask"])
def test_nan_spreads_to_its_own_outputs_only(family: str) -> None:
    weight = random_weight(12, 36, 0.5)
    weight[3, 5] = float("nan")
    inputs = Inputs.random(2, 12, 36)
    run = (
        run_gather(weight, inputs, USUAL, Epilogue())
        if family == "gather"
        else run_mask(weight, inputs, PSHUFB, Epilogue())
    )
    assert torch.isnan(run[:, 3]).all()
    keep = torch.arange(12) != 3
    close(run[:, keep], dense(torch.nan_to_num(weight), inputs, Epilogue())[:, keep])


def test_shuffle_controls_move_packed_floats_to_kept_lanes() -> None:
    packed = np.arange(1, 5, dtype=np.float32)
    source = packed.view(np.uint8)
    for mask, control in enumerate(gathered.shuffle_controls()):
        moved = np.where(control & 0x80, 0, source[control & 0x0F]).astype(np.uint8).view(np.float32)
        expected, taken = np.zeros(4, np.float32), 0
        for lane in range(4):
            if mask >> lane & 1:
                expected[lane] = packed[taken]
                taken += 1
        assert np.array_equal(moved, expected)


class TestGeneratedCode:
    def test_mask_spreads_with_vexpandps_on_avx512(self) -> None:
        text = assembly(gathered.build_mask(EXPAND, Epilogue()), "avx512")
        assert "vexpandps" in text
        assert "zmm" in text
        assert "popcnt" in text

    def test_mask_spreads_with_pshufb_on_avx2(self) -> None:
        text = assembly(gathered.build_mask(PSHUFB, Epilogue()), "avx2")
        assert "vpshufb" in text
        assert "popcnt" in text
        assert "vexpandps" not in text

    def test_values_are_asked_for_ahead(self) -> None:
        for function in (gathered.build_gather(USUAL, Epilogue()), gathered.build_mask(PSHUFB, Epilogue())):
            assert "prefetch" in assembly(function, "avx2")

    @needs_avx512
    def test_avx512_runs(self) -> None:
        target = tvm_target("avx512")
        for inputs_count in (16, 53, 160):
            weight = random_weight(20, inputs_count, 0.5)
            inputs = Inputs.random(3, 20, inputs_count)
            for epilogue in SOME_EPILOGUES:
                expected = dense(weight, inputs, epilogue)
                close(run_mask(weight, inputs, EXPAND, epilogue, target=target), expected)
                close(run_gather(weight, inputs, USUAL, epilogue, target=target), expected)
