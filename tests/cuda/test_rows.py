"""Weights whose rows are read on their own."""

import pytest
import torch

from sparsecomp.cuda.rows import pack_ffn, pack_rows, pack_token_rows, pack_two_four


def test_rows_are_filled_up_to_four_slots_with_the_column_after_the_last():
    weight = torch.tensor([[0.0, 2, 0, 3, 4, 5, 6], [0, 0, 0, 0, 0, 0, 0], [-0.0, 0, 7, 0, 0, 0, 0]])
    packed = pack_token_rows(weight)
    assert packed["starts"].tolist() == [0, 8, 8, 12]
    assert packed["values"].tolist() == [2, 3, 4, 5, 6, 0, 0, 0, 7, 0, 0, 0]
    assert packed["columns"].tolist() == [1, 3, 4, 5, 6, 7, 7, 7, 2, 7, 7, 7]
    assert pack_rows(weight)["starts"].tolist() == [0, 5, 5, 6]


def test_places_are_two_bits_each_from_the_lowest():
    weight = torch.zeros(1, 20, dtype=torch.float16)
    weight[0, [1, 3, 4, 18]] = torch.tensor([1.0, 2, 3, 4], dtype=torch.float16)
    packed = pack_two_four(weight)
    assert packed["values"].tolist() == [[1, 2, 3, 0, 0, 0, 0, 0, 4 * 0.0, 4, 0, 0, 0, 0, 0, 0]]
    groups = [packed["places"][0, 0].item() >> 4 * i & 15 for i in range(4)]
    assert groups[0] == 1 | 3 << 2
    assert groups[1] == 0 | 1 << 2
    assert packed["places"][0, 1].item() & 15 == 0 | 2 << 2


def test_weights_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="more than two values in four columns"):
        pack_two_four(torch.ones(2, 8, dtype=torch.float16))
    with pytest.raises(ValueError, match="70000 inputs"):
        pack_token_rows(torch.ones(1, 70000))
    with pytest.raises(ValueError, match="non-empty float32"):
        pack_rows(torch.ones(2, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="must fit each other"):
        pack_ffn(torch.ones(8, 4), torch.ones(8, 4), torch.ones(4, 9))
