"""Which positions stand for a segment, for one and for several ids each."""

import pytest
import torch

from uground.modeling_uground.segment_tokens import find_segments

SEG = 7


def found(rows, num_ids=1):
    row, columns = find_segments(torch.tensor(rows), SEG, num_ids)
    return row.tolist(), columns.tolist()


def test_one_id_each_in_reading_order():
    assert found([[1, 7, 4, 7, 7], [1, 2, 3, 4, 5], [1, 2, 3, 4, 7]]) == ([0, 0, 0, 2], [[0], [2], [3], [3]])


def test_three_ids_each():
    assert found([[1, 7, 7, 7, 4, 2], [1, 2, 7, 7, 7, 7]], 3) == ([0, 1], [[0, 1, 2], [1, 2, 3]])


def test_a_longer_run_is_several_segments():
    assert found([[1, 7, 7, 7, 7, 7, 7]], 3) == ([0, 0], [[0, 1, 2], [3, 4, 5]])
    assert found([[1, 7, 7, 7, 7, 7]], 2) == ([0, 0], [[0, 1], [2, 3]])


def test_a_run_that_is_not_whole_is_none():
    assert found([[1, 7, 7, 4, 7, 7]], 3) == ([], [])
    assert found([[1, 2, 7, 4, 7, 7]], 2) == ([0], [[3, 4]])


@pytest.mark.parametrize("num_ids", [1, 3])
def test_nothing_to_find(num_ids):
    rows, columns = find_segments(torch.tensor([[1, 2]]), SEG, num_ids)
    assert rows.shape == (0,) and columns.shape == (0, num_ids)


def test_nothing_predicts_a_first_token():
    with pytest.raises(ValueError, match="begins with the segment token"):
        found([[1, 7], [7, 1]])
