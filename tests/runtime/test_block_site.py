"""Blocks that are skipped as a whole: which rows skip which of them, and when a sequence begins."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from sparsecomp.runtime.block_site import BlockState, RuntimeBlock, state_of
from sparsecomp.runtime.skip_rates import skip_rate_of

WIDTH = 8


class Added:
    """Stands for the FFN of a block: adds a number of each row, and keeps how many rows it was given."""

    def __init__(self, name: str, handle: int) -> None:
        self.name, self.handle = name, handle
        self.rows: list[int] = []
        self.turn = (-5.0) ** (handle % 10)

    def refresh(self, *weights: Tensor) -> None:
        """Nothing to look at."""

    def run(self, x: Tensor, biases: Sequence[Tensor | None], residual: Tensor) -> Tensor:
        self.rows.append(x.numel() // WIDTH)
        # Each turns the stream as far as the one before did, which takes more and more.
        return residual + x * self.turn


class Model:
    """Blocks one after the other; x of a row is what each adds to the stream."""

    def __init__(self, numbers: Sequence[int] = (0, 1, 2, 3), warmup: int = 2, span: int = 1) -> None:
        self.state = BlockState()
        self.ffns = [Added(f"block.{number}", 1_000_000 + number) for number in numbers]
        self.blocks = [
            RuntimeBlock(ffn, self.state, number, number == numbers[0], 0.9, warmup, span)  # type: ignore[arg-type]
            for ffn, number in zip(self.ffns, numbers, strict=True)
        ]

    def run(self, x: Tensor) -> list[list[int]]:
        """Run one pass from a stream of ones; for every block the rows that it was given in each call."""
        for ffn in self.ffns:
            ffn.rows.clear()
        stream = torch.ones_like(x)
        for block in self.blocks:
            stream = block.run(x, (None, None, None), stream)
        self.stream = stream
        return [list(ffn.rows) for ffn in self.ffns]


def still(*shape: int) -> Tensor:
    return torch.zeros(*shape, WIDTH)


def moving(*shape: int) -> Tensor:
    """What is added points elsewhere than the stream."""
    return torch.full((*shape, WIDTH), 5.0) * torch.tensor([1.0, -1.0] * (WIDTH // 2))


def test_every_other_block_of_a_still_stream_after_the_warm_up() -> None:
    model = Model()
    assert model.run(still(1, 2)) == [[2]] * 4  # the prompt, which is as long as the warm-up
    assert model.run(still(1, 1)) == [[1], [], [1], []]


def test_several_blocks_at_a_time() -> None:
    model = Model(span=2)
    model.run(still(1, 2))
    assert model.run(still(1, 1)) == [[1], [], [], [1]]


def test_a_moving_stream_skips_nothing() -> None:
    model = Model()
    model.run(still(1, 2))
    assert model.run(moving(1, 1)) == [[1]] * 4


def test_tokens_of_the_warm_up_skip_nothing() -> None:
    model = Model(warmup=3)
    for _ in range(3):
        assert model.run(still(1, 1)) == [[1]] * 4
    assert model.run(still(1, 1)) == [[1], [], [1], []]
    # A new prompt begins a new sequence.
    model.run(still(1, 2))
    assert model.run(still(1, 1)) == [[1]] * 4


def test_rows_of_a_batch_skip_by_themselves() -> None:
    model = Model()
    model.run(still(3, 2))
    x = torch.cat([still(1, 1), moving(1, 1), still(1, 1)])
    assert model.run(x) == [[3], [1], [3], [1]]
    assert torch.equal(model.stream[0], torch.ones(1, WIDTH))
    assert torch.equal(model.stream[1], 1 + sum(ffn.turn for ffn in model.ffns) * moving(1))


def test_a_block_that_is_never_skipped_ends_a_run_of_skips() -> None:
    model = Model(numbers=(0, 2), span=3)
    model.run(still(1, 2))
    assert model.run(still(1, 1)) == [[1], [1]]


def test_another_batch_size_starts_anew() -> None:
    model = Model()
    model.run(still(1, 2))
    model.run(still(1, 1))
    assert model.run(still(2, 1)) == [[2], [], [2], []]


def test_skipped_calls_are_counted() -> None:
    model, weight = Model(), torch.zeros(1)
    model.run(still(1, 2))
    model.run(still(1, 1))
    model.blocks[1].refresh(weight)
    assert skip_rate_of(weight) == pytest.approx(1 / 3)


def test_a_block_without_a_stream_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing is given"):
        Model().blocks[0].run(still(1, 1), (None, None, None), None)


def test_graphs_of_a_model_share_their_state() -> None:
    first, second = torch.zeros(1), torch.zeros(1)
    assert state_of(first) is state_of(first)
    assert state_of(first) is not state_of(second)
