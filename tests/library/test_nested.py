"""Nested arguments and outputs: walking, rebuilding, and telling which dimension is the batch."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from bitfit_hf.tuner.mixed import pick_rows
from bitfit_hf.tuner.nested import SHARED, batch_axis, leaves, rebuild, rows_per_example, take, tensors

Pair = namedtuple("Pair", "left right")


def test_trees_of_all_types_are_walked_and_rebuilt():
    output = BaseModelOutput(last_hidden_state=torch.zeros(2), hidden_states=(torch.ones(2), torch.ones(2)))
    tree = (Pair(torch.zeros(1), None), {"a": [torch.ones(3), "text"], "b": output})
    assert [path for path, _ in leaves(tree)] == [
        (0, 0), (1, "a", 0), (1, "a", 1), (1, "b", "last_hidden_state"), (1, "b", "hidden_states", 0),
        (1, "b", "hidden_states", 1),
    ]  # fmt: skip
    paths = []
    again = rebuild(tree, lambda path, tensor: (paths.append(path), tensor + 1)[1])
    assert paths == list(tensors(tree))
    assert type(again[0]) is Pair
    assert again[0].right is None
    assert again[1]["a"][1] == "text"
    assert type(again[1]["b"]) is BaseModelOutput
    assert all(torch.equal(again_tensor, tensor + 1) for again_tensor, tensor in
               zip(tensors(again).values(), tensors(tree).values(), strict=True))  # fmt: skip


@pytest.mark.parametrize(
    ("small", "large", "axis"),
    [
        ((3, 7), (5, 7), 0),
        ((7, 3, 8), (7, 5, 8), 1),
        ((12, 8), (20, 8), 0),  # four rows for each example
        ((7, 8), (7, 8), SHARED),
        ((3, 3), (5, 5), None),  # similarities of all with all
        ((4, 8), (6, 8), None),  # grows in another way
        ((3,), (5, 1), None),
    ],
)
def test_the_batch_is_what_grows_with_it(small, large, axis):
    assert batch_axis(small, large, (3, 5)) == axis


def test_rows_of_examples():
    assert [rows_per_example(rows, 4) for rows in (4, 8, 3, 6, 0)] == [1, 2, None, None, None]
    x = torch.arange(12).view(6, 2)
    assert take(x, 0, torch.tensor([2, 0]), 3).flatten().tolist() == [8, 9, 10, 11, 0, 1, 2, 3]
    assert take(x, 1, torch.tensor([1]), 2).flatten().tolist() == [1, 3, 5, 7, 9, 11]


def test_each_example_is_picked_from_its_adapters_result():
    one, two = ({"x": (torch.full((4, 2), value), None)} for value in (1, 2))
    picked = pick_rows({"a": one, "b": two}, ["b", "a"], lambda rows: rows // 2)
    assert picked["x"][0][:, 0].tolist() == [2, 2, 1, 1]
    assert picked["x"][1] is None
    assert pick_rows({"a": None, "b": None}, ["a", "b"], lambda rows: rows) is None
