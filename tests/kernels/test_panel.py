"""The panel kernel against its reference and against the dense product."""

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
    needs_avx512,
    needs_x86,
    panel_weight,
    run_kernel,
    tvm_target,
)

from sparsecomp.kernels import panel
from sparsecomp.kernels.epilogue import Epilogue
from sparsecomp.kernels.panel import PanelSchedule
from sparsecomp.patterns import PanelWeight
from sparsecomp.runtime.launch import KernelSource

# v, lanes, vectors, tokens, width: every relation of the register tile, the stored part and the panel.
USUAL = PanelSchedule(8, 8, 1, 3, 8)
SCHEDULES = [
    PanelSchedule(4, 4, 1, 2, 4),
    PanelSchedule(16, 4, 2, 5, 8),
    PanelSchedule(16, 4, 4, 1, 8),
    PanelSchedule(16, 8, 2, 6, 16),
    PanelSchedule(32, 8, 2, 4, 16),
    PanelSchedule(32, 8, 4, 1, 16),
    PanelSchedule(32, 8, 1, 2, 16),
    PanelSchedule(16, 16, 1, 4, 16),
    PanelSchedule(32, 16, 2, 3, 32),
]


def schedule_name(schedule: PanelSchedule) -> str:
    return f"{schedule.v}:{schedule.lanes}x{schedule.vectors}x{schedule.tokens}/{schedule.width}"


def run(
    packed: PanelWeight,
    inputs: Inputs,
    schedule: PanelSchedule,
    epilogue: Epilogue,
    *,
    group: int | None = None,
    splits: int = 1,
    threads: int = 1,
    target: dict[str, object] = HERE,
) -> torch.Tensor:
    tokens, width = inputs.x.shape
    group = group or -(-tokens // schedule.tokens) * schedule.tokens
    source = KernelSource("panel", f"{schedule} {epilogue}", lambda: panel.build(schedule, epilogue), target)
    dims = [tokens, width, packed.shape[0], group, splits]
    return run_kernel(
        source,
        panel.weights(packed, schedule.width),
        dims,
        -(-tokens // group) * splits,
        panel.SCRATCH_FLOATS,
        inputs,
        residual=epilogue.residual,
        threads=threads,
    )


def check(
    weight: torch.Tensor,
    tokens: int,
    schedule: PanelSchedule = USUAL,
    epilogue: Epilogue = SOME_EPILOGUES[1],
    *,
    group: int | None = None,
    splits: int = 1,
    threads: int = 1,
) -> None:
    packed = PanelWeight.pack(weight, schedule.v, signed_zeros=False)
    inputs = Inputs.random(tokens, *weight.shape)
    given = run(packed, inputs, schedule, epilogue, group=group, splits=splits, threads=threads)
    residual = inputs.residual.numpy() if epilogue.residual else None
    close(given, panel.reference(inputs.x.numpy(), packed, inputs.bias.numpy(), residual, epilogue))
    close(given, dense(weight, inputs, epilogue))


@needs_x86
class TestAgainstReferenceAndDense:
    @pytest.mark.parametrize("epilogue", EPILOGUES, ids=epilogue_name)
    def test_every_epilogue(self, epilogue: Epilogue) -> None:
        # 19 outputs: whole panels, and one whose last lanes do not exist.
        check(panel_weight(19, 37, 8), 7, USUAL, epilogue)

    @pytest.mark.parametrize("schedule", SCHEDULES, ids=schedule_name)
    def test_every_schedule(self, schedule: PanelSchedule) -> None:
        for outputs in (schedule.v, 2 * schedule.v + 1, 3 * schedule.v - 1):
            for tokens in (1, schedule.tokens, 2 * schedule.tokens + 1):
                check(panel_weight(outputs, 29, schedule.v), tokens, schedule)

    @pytest.mark.parametrize("tokens", [1, 2, 3, 4, 11, 50])
    def test_tokens(self, tokens: int) -> None:
        check(panel_weight(24, 32, 8), tokens)

    @pytest.mark.parametrize("outputs", [1, 3, 7, 8, 9, 15, 16, 33])
    def test_outputs(self, outputs: int) -> None:
        check(panel_weight(outputs, 24, 8), 5)

    @pytest.mark.parametrize("inputs", [1, 2, 7, 16, 65])
    def test_inputs(self, inputs: int) -> None:
        check(panel_weight(12, inputs, 8), 5)

    @pytest.mark.parametrize("group", [3, 6, 12, 99])
    @pytest.mark.parametrize("splits", [1, 2, 3, 7])
    def test_groups_of_tokens_and_splits_of_panels(self, group: int, splits: int) -> None:
        # 5 panels: with 7 splits some items have nothing to do.
        check(panel_weight(37, 24, 8), 20, group=group, splits=splits)

    @pytest.mark.parametrize("splits", [1, 3])
    def test_two_threads(self, splits: int) -> None:
        check(panel_weight(40, 24, 8), 31, group=6, splits=splits, threads=2)

    @pytest.mark.parametrize("density", [0.0, 0.05, 1.0])
    def test_densities(self, density: float) -> None:
        check(panel_weight(17, 48, 8, density), 7)
        check(panel_weight(70, 48, 32, density), 5, SCHEDULES[4])

    def test_rows_that_share_nothing_are_computed_too(self) -> None:
        check(torch.eye(16, 24), 4)


@needs_x86
def test_nan_spreads_to_its_own_outputs_only() -> None:
    weight = panel_weight(20, 24, 8, 0.8)
    weight[3, 5] = float("nan")
    inputs = Inputs.random(7, 20, 24)
    given = run(PanelWeight.pack(weight, 8), inputs, USUAL, Epilogue())
    assert torch.isnan(given[:, 3]).all()
    weight[3] = 0
    keep = torch.arange(20) != 3
    close(given[:, keep], dense(weight, inputs, Epilogue())[:, keep])


@pytest.mark.parametrize(("v", "width"), [(8, 8), (32, 16), (32, 8), (16, 4)])
def test_values_are_stored_by_parts(v: int, width: int) -> None:
    packed = PanelWeight.pack(panel_weight(3 * v - 2, 11, v), v)
    values, columns, ptr = panel.weights(packed, width)
    assert values.size == packed.values.numel()
    assert np.array_equal(columns, packed.cols.numpy())
    values = values.reshape(-1)
    for p in range(3):
        begin, end = int(ptr[p]), int(ptr[p + 1])
        stored = values[begin * v : end * v].reshape(v // width, end - begin, width)
        assert np.array_equal(np.concatenate(list(stored), axis=1), packed.values.numpy()[begin:end])


@pytest.mark.parametrize("sizes", [(12, 8, 1, 1, 12), (32, 8, 3, 1, 16), (32, 8, 2, 1, 12), (32, 16, 1, 1, 8)])
def test_a_schedule_that_does_not_divide_is_refused(sizes: tuple[int, int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="does not divide evenly"):
        PanelSchedule(*sizes)


class TestGeneratedCode:
    def test_avx512_uses_whole_registers(self) -> None:
        text = assembly(panel.build(PanelSchedule(32, 16, 2, 12, 32), Epilogue()), "avx512")
        assert "zmm" in text
        assert "vfmadd" in text

    def test_avx2_keeps_the_sums_in_registers(self) -> None:
        schedule = PanelSchedule(32, 8, 2, 6, 16)
        text = assembly(panel.build(schedule, Epilogue()), "avx2")
        fused = [line for line in text.splitlines() if "vfmadd" in line]
        assert len(fused) >= schedule.tokens * schedule.vectors
        assert not any("%rsp" in line for line in fused)
        assert "zmm" not in text

    @needs_avx512
    def test_avx512_runs(self) -> None:
        schedule = PanelSchedule(32, 16, 2, 12, 32)
        weight = panel_weight(70, 53, 32)
        inputs = Inputs.random(130, 70, 53)
        for epilogue in SOME_EPILOGUES:
            packed = PanelWeight.pack(weight, 32)
            given = run(packed, inputs, schedule, epilogue, group=96, target=tvm_target("avx512"))
            close(given, dense(weight, inputs, epilogue))
