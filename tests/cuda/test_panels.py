"""Weights in the registers of the tensor cores."""

import pytest
import torch
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from sparsecomp.cuda.panels import pack_panels, pack_sparse_panels


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_metadata_lies_where_cutlass_puts_it(dtype):
    weight = torch.randn(32, 32).abs() + 1
    weight.view(32, 8, 4).scatter_(2, torch.rand(32, 8, 4).argsort(dim=2)[..., :2], 0)
    _, metadata = sparse_semi_structured_from_dense_cutlass(weight.to(dtype))
    # ldmatrix hands word t of the 8 rows to lane 4 g + t; selector 0 (lanes 0 and 1 of a quad) is rows 0 to 15,
    # selector 1 rows 16 to 31 (CUTLASS, mma_sparse_tensor_op.h: id2).
    words = metadata.contiguous().view(torch.int32).reshape(8, 2, 2)
    packed = pack_sparse_panels(weight.to(dtype), 32)
    assert packed["columns"].tolist() == [list(range(32))]
    ours = packed["weights"][0, :, 128:].reshape(2, 8, 2)
    assert torch.equal(ours, words.transpose(0, 1))


def test_metadata_of_int8_lies_where_cutlass_puts_it():
    weight = torch.randint(1, 128, (32, 128), dtype=torch.int8)
    weight.view(32, 32, 4).scatter_(2, torch.rand(32, 32, 4).argsort(dim=2)[..., :2], 0)
    _, metadata = sparse_semi_structured_from_dense_cutlass(weight)
    # Two columns of words lie side by side; ldmatrix hands word t of 8 times 16 bytes to lane 4 g + t.
    words = metadata.contiguous().view(2, 2, 32)  # 64 columns of the weight, 16 rows, lanes
    packed = pack_sparse_panels(weight, 32)
    assert packed["columns"].tolist() == [list(range(64)), list(range(64, 128))]
    assert torch.equal(packed["weights"][:, :, 128:], words)


def test_int8_lies_four_to_a_word():
    weight = torch.arange(16 * 32, dtype=torch.int32).reshape(16, 32).to(torch.int8)
    weight[weight == 0] = 1
    words = pack_panels(weight, 16)["weights"].view(torch.int8).reshape(32, 4, 4)
    for lane, register in ((0, 0), (5, 1), (18, 2), (31, 3)):
        row, column = lane // 4 + 8 * (register % 2), lane % 4 * 4 + 16 * (register // 2)
        assert torch.equal(words[lane, register], weight[row, column : column + 4])


def test_a_group_is_closed_before_a_row_has_three_values_in_it():
    weight = torch.zeros(16, 40, dtype=torch.float16)
    weight[0, [3, 7, 8]] = 1
    weight[1, 7] = 2
    columns = pack_sparse_panels(weight, 16)["columns"]
    assert columns.shape == (1, 32)
    assert columns[0, :8].tolist() == [3, 7, -1, -1, 8, -1, -1, -1]


def test_blocks_keep_the_first_column_of_their_runs():
    weight = torch.zeros(40, 70, dtype=torch.bfloat16)
    weight[3, 20] = weight[15, 69] = weight[20, 0] = 1
    packed = pack_panels(weight, 16, 16)
    assert packed["columns"].tolist() == [[16, 64], [0, -1]]
    assert packed["starts"].tolist() == [0, 1, 2, 2]
    assert packed["weights"].shape == (2, 256)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(4, 4), "float16 or bfloat16 or int8 matrix"),
        (torch.ones(0, 4, dtype=torch.float16), "non-empty"),
        (torch.ones(4, dtype=torch.float16), "matrix"),
    ],
)
def test_wrong_weights_are_refused(weight, message):
    with pytest.raises(ValueError, match=message):
        pack_sparse_panels(weight, 16)


def test_panels_that_no_kernel_has_are_refused():
    with pytest.raises(ValueError, match="16, 32 and 64"):
        pack_panels(torch.ones(4, 4), 8)
