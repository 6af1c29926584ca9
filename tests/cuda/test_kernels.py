"""Every kernel under the emulator, against its meaning in NumPy."""

import numpy as np
import pytest
import torch
from cuda_emulation import emulate, emulated, linear

from sparsecomp.cuda.library import FFN, KERNELS, UNITS
from sparsecomp.cuda.rows import pack_ffn
from sparsecomp.kernels.epilogue import ACTIVATIONS, activate_reference

NAMED = {kernel.name: kernel for kernel in KERNELS}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.int8: 0}
ORDERS = range(4)
"""Seeds of the random orders in which the threads of a launch run."""
each_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)


def values(shape, dtype, generator, scale=1.0):
    """Random values of a type; of int8 all of them."""
    if dtype == torch.int8:
        return torch.randint(-128, 128, shape, generator=generator, dtype=dtype)
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def sparse_weight(kernel, outputs, inputs, generator):
    weight = values((outputs, inputs), kernel.dtype, generator, 1 / 4)
    if kernel.family == "two_four":
        fours = torch.nn.functional.pad(weight, (0, -inputs % 4)).view(outputs, -1, 4)
        fours.scatter_(2, torch.rand(fours.shape, generator=generator).argsort(dim=2)[..., :2], 0)
        weight = fours.view(outputs, -1)[:, :inputs].contiguous()
    else:
        weight = weight * (torch.rand(outputs, inputs, generator=generator) < 0.3)
    weight[: kernel.rows] *= outputs != 70  # a panel or row may be empty
    return weight


def reference(weight, x, bias, activation):
    sums = x.double().numpy() @ weight.double().numpy().T + (0 if bias is None else bias.double().numpy())
    return activate_reference(ACTIVATIONS[activation], sums)


def assert_equal(y, expected, dtype):
    np.testing.assert_allclose(y.double().numpy(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@each_kernel
def test_products_agree_at_ragged_sizes_in_any_order_of_threads(kernel):
    generator = torch.Generator().manual_seed(0)
    for case, (outputs, inputs, tokens) in enumerate(((70, 150, 67), (64, 64, 8), (5, 19, 1))):
        weight = sparse_weight(kernel, outputs, inputs, generator)
        tokens = min(tokens, kernel.tokens) if kernel.tokens else tokens
        x = values((tokens, inputs), kernel.dtype, generator)
        bias = torch.randn(outputs, generator=generator) if case != 1 else None
        activation = case
        if kernel.dtype == torch.int8:
            bias, activation = None if bias is None else (1000 * bias).int(), 0
        expected = reference(weight, x, bias, activation)
        for order in ORDERS:
            y, failure = linear(kernel, weight, x, bias, activation, order)
            assert failure == ""
            assert_equal(y, expected, kernel.dtype)


@pytest.mark.parametrize("name", ["panel_sparse_v16_int8", "panel_v16_int8", "rows_int8", "rows_token_t1_int8"])
def test_sums_of_int8_are_exact_where_those_of_float32_are_not(name):
    weight, x = torch.full((3, 1501), 127, dtype=torch.int8), torch.full((1, 1501), 127, dtype=torch.int8)
    y, failure = linear(NAMED[name], weight, x)
    assert failure == ""
    assert y.tolist() == [[127 * 127 * 1501] * 3]
    assert int(np.float32(127 * 127 * 1501)) != 127 * 127 * 1501


@pytest.mark.parametrize("activation", range(len(ACTIVATIONS)), ids=ACTIVATIONS)
def test_activations_follow_the_bias(activation):
    weight, x, bias = torch.eye(16), torch.linspace(-4, 4, 64).reshape(4, 16), torch.full((16,), 0.25)
    y, failure = linear(NAMED["rows_token_t4_f32"], weight, x, bias, activation)
    assert failure == ""
    assert_equal(y, reference(weight, x, bias, activation), torch.float32)


@pytest.mark.parametrize(
    "name",
    [
        "panel_sparse_v16_f16",
        "panel_v32_bf16",
        "block_v64_f16",
        "panel_v16_f32",
        "rows_token_t1_f32",
        "two_four_t4_f16",
        "panel_sparse_v32_int8",
        "block_v16_int8",
    ],
)
def test_without_any_one_of_its_barriers_and_waits_a_kernel_fails(name):
    kernel, generator = NAMED[name], torch.Generator().manual_seed(1)
    weight = sparse_weight(kernel, 33, 300, generator)
    x = values((kernel.tokens or 9, 300), kernel.dtype, generator)
    assert linear(kernel, weight, x)[1] == ""
    sites = emulate(kernel).sites()
    assert len(sites) == (3 if kernel.tokens == 0 else 1)
    for site in sites:
        assert linear(kernel, weight, x, left_out=site)[1].startswith(("race", "unknown")), site


def run_ffn(ffn, weights, biases, threshold, x, activation, seed=0, left_out=("", "")):
    """y, the share of units that survived, and what failed."""
    gate, up, down = weights
    packed = pack_ffn(gate, up, down)
    (hidden, inputs), outputs = gate.shape, len(down)
    blocks = -(-hidden // UNITS)
    given = dict(
        packed, x=x, threshold=threshold, hidden=hidden, inputs=inputs, stride=packed["gate"].shape[1], outputs=outputs
    )
    given.update(gate_bias=biases[0], up_bias=biases[1], bias=biases[2], activation=activation)
    given.setdefault("up", None)
    # Scratch holds what would be out of bounds or poison a sum.
    given.update(
        places=torch.full((blocks * UNITS,), 2**30, dtype=torch.int32),
        counts=torch.full((blocks,), 2**20, dtype=torch.int32),
    )
    given.update(
        hidden_values=torch.full((blocks * UNITS,), torch.nan), y=torch.full((outputs,), torch.nan, dtype=x.dtype)
    )
    first = emulated(ffn.source, ffn.hidden_entry, ffn.defines)
    failure = first.run(
        ffn.launch_hidden(hidden, inputs), [given[name] for name in ffn.hidden_arguments], seed, left_out[0]
    )
    second = emulated(ffn.source, ffn.down_entry, ffn.defines)
    failure = failure or second.run(
        ffn.launch_down(outputs), [given[name] for name in ffn.down_arguments], seed, left_out[1]
    )
    return given["y"], given["counts"].sum().item() / hidden, failure


def ffn_case(dtype, gated):
    generator = torch.Generator().manual_seed(2)
    hidden, inputs, outputs = 150, 70, 45
    gate, up = (torch.randn(hidden, inputs, generator=generator).to(dtype) / 4 for _ in range(2))
    down = (torch.randn(outputs, hidden, generator=generator) / 4).to(dtype)
    biases = [torch.randn(size, generator=generator) for size in (hidden, hidden, outputs)]
    threshold = torch.rand(hidden, generator=generator) * 2
    return (gate, up if gated else None, down), biases, threshold, torch.randn(inputs, generator=generator).to(dtype)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("ffn", FFN, ids=lambda ffn: ffn.name)
def test_an_ffn_reads_only_what_belongs_to_the_units_above_the_threshold(ffn, gated):
    (gate, up, down), biases, threshold, x = ffn_case(ffn.dtype, gated)
    activation = ACTIVATIONS.index("silu" if gated else "relu")
    sums = gate.double().numpy() @ x.double().numpy() + biases[0].double().numpy()
    g = activate_reference(ACTIVATIONS[activation], sums)
    kept = np.abs(g) > threshold.double().numpy()
    assert 0.2 < kept.mean() < 0.8
    h = g * (up.double().numpy() @ x.double().numpy() + biases[1].double().numpy()) if gated else g
    expected = down.double().numpy()[:, kept] @ h[kept] + biases[2].double().numpy()
    dropped = torch.from_numpy(~kept)
    down[:, dropped] = torch.nan
    if gated:
        up[dropped] = torch.nan
    for order in ORDERS:
        y, share, failure = run_ffn(ffn, (gate, up, down), biases, threshold, x, activation, order)
        assert failure == ""
        assert share == kept.mean()
        assert_equal(y, expected, ffn.dtype)


def test_without_any_one_of_its_barriers_the_ffn_fails():
    ffn, case = FFN[0], ffn_case(torch.float32, True)
    assert run_ffn(ffn, *case, 4)[2] == ""
    for which, entry, count in ((0, ffn.hidden_entry, 3), (1, ffn.down_entry, 1)):
        sites = emulated(ffn.source, entry, ffn.defines).sites()
        assert len(sites) == count
        for site in sites:
            failure = run_ffn(ffn, *case, 4, left_out=(site, "") if which == 0 else ("", site))[2]
            assert failure.startswith(("race", "unknown")), site


def test_launches_that_a_kernel_does_not_take_are_refused():
    with pytest.raises(ValueError, match="1 to 4 tokens, given 5"):
        NAMED["two_four_t4_f16"].launch(64, 64, 5)
    with pytest.raises(ValueError, match="at least 1 tokens, given 0"):
        NAMED["rows_f16"].launch(64, 64, 0)
    with pytest.raises(ValueError, match="bytes of shared memory"):
        NAMED["rows_token_t4_f32"].launch(64, 8192, 4)


def test_names_are_unique():
    assert len(NAMED) == len(KERNELS)
