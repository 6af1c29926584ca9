"""FFN blocks that are skipped as a whole where the blocks before them changed the stream little.

FFN-SkipLLM (Jaiswal et al., arXiv:2404.03865, algorithm 1): once the cosine between the stream before and after a
block exceeds a threshold, some of the following blocks are skipped, and then the next is computed and looked at again.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakIdKeyDictionary

from sparsecomp.runtime.ffn_site import RuntimeSkip, register
from sparsecomp.runtime.skip_rates import count_skips


class BlockState(threading.local):
    """What the blocks of a model hand to each other, for each thread that runs it.

    Attributes:
        seen: tokens of the sequence so far.
        late: whether the present token comes after the warm-up.
        left: for every row of the batch the blocks that are still to be skipped.
        last: number of the block that ran last.
    """

    seen = 0
    late = False
    left: list[int] = []  # noqa: RUF012 -- of the class until the first call; it is replaced, never changed
    last = -1


_states = WeakIdKeyDictionary()
_lock = threading.Lock()


def state_of(weight: Tensor) -> BlockState:
    """The state of the model whose first such block has this weight: prefill and decoding are graphs of their own."""
    with _lock:
        state: BlockState = _states.setdefault(weight, BlockState())
        return state


class RuntimeBlock:
    """A block that is skipped as a whole, for each row of a batch by itself.

    Attributes:
        handle: of the op.
    """

    def __init__(
        self, ffn: RuntimeSkip, state: BlockState, number: int, first: bool, threshold: float, warmup: int, span: int
    ) -> None:
        """Make a site.

        Args:
            ffn: computes the block.
            state: of the model.
            number: of the block in its graph; a gap to the one before stands for a block that is never skipped.
            first: whether a pass through the model begins with it.
            threshold: of the cosine.
            warmup: tokens of a sequence that skip nothing.
            span: blocks that are skipped at a time.
        """
        self.name, self.handle = ffn.name, ffn.handle
        self._ffn, self._state = ffn, state
        self._number, self._first = number, first
        self._threshold, self._warmup, self._span = threshold, warmup, span
        self._counters = np.zeros(2, np.int64)
        register(self.handle, self)

    def refresh(self, *weights: Tensor) -> None:
        """See `RuntimeSkip.refresh`."""
        self._ffn.refresh(*weights)
        for weight in weights:
            count_skips(weight, self.handle, self._counters.tolist)

    def prepare(self, tokens: int, residual: bool) -> None:
        """See `RuntimeSkip.prepare`."""
        self._ffn.prepare(tokens, residual)

    def run(self, x: Tensor, biases: Sequence[Tensor | None], residual: Tensor | None) -> Tensor:
        """The block for x of `[batch, sequence, I]`; the residual is the stream before it.

        Several tokens of a sequence at once, or the first of it, are computed in full.
        """
        if residual is None:
            raise ValueError(f"site {self.name}: a block is skipped by what it adds to, and nothing is given")
        state = self._state
        length = x.shape[-2] if x.dim() > 2 else 1
        rows = x.numel() // (length * x.shape[-1]) if x.numel() else 0
        if self._first:
            before = state.seen if length == 1 else 0
            state.seen = before + length
            state.late = length == 1 and before >= self._warmup
            state.left = [0] * rows
        elif state.last != self._number - 1 or len(state.left) != rows:
            state.left = [0] * rows
        state.last = self._number
        self._counters[1] += rows * length
        skips = [left > 0 for left in state.left]
        self._counters[0] += rows * length - sum(skips)
        if not any(skips):
            out = self._ffn.run(x, biases, residual)
        elif all(skips):
            out = residual.clone()
        else:
            out = self._some(x, biases, residual, [row for row, skip in enumerate(skips) if not skip])
        if state.late:
            state.left = self._following(state.left, residual, out)
        return out

    def _some(self, x: Tensor, biases: Sequence[Tensor | None], residual: Tensor, rows: list[int]) -> Tensor:
        """Compute some rows of a batch of single tokens; the others pass."""
        out = residual.clone()
        flat, before = x.reshape(-1, x.shape[-1]), residual.reshape(-1, residual.shape[-1])
        out.view(-1, residual.shape[-1])[rows] = self._ffn.run(flat[rows], biases, before[rows])
        return out

    def _following(self, left: list[int], before: Tensor, after: Tensor) -> list[int]:
        """How many blocks every row skips from here on."""
        if all(left):
            return [count - 1 for count in left]
        one, other = before.flatten(0, -2).float(), after.flatten(0, -2).float()
        cosines = functional.cosine_similarity(one, other, dim=-1).tolist()
        return [
            count - 1 if count else self._span if cosine > self._threshold else 0
            for count, cosine in zip(left, cosines, strict=True)
        ]

    @property
    def nbytes(self) -> int:
        """See `RuntimeSkip.nbytes`."""
        return self._ffn.nbytes

    @property
    def source(self) -> str:
        """See `RuntimeSkip.source`."""
        return self._ffn.source
