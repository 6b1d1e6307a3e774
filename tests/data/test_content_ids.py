# SPDX-License-Identifier: Apache-2.0
"""Samples named by what they hold: alike in any batch, and not where a batch does not tell them apart."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from lightning_sgdclean.base.errors import SampleIdError
from lightning_sgdclean.data.packing import content_ids
from processes import python

X, Y = torch.arange(20.0).reshape(4, 5), torch.tensor([0, 1, 0, 1])


def ragged(places):
    return [torch.arange(place + 1.0) for place in places]


MAKES = {
    "pair": lambda places: [X[places], Y[places]],
    "two alike": lambda places: (X[places], X[places] + 1),
    "tensor": lambda places: X[places],
    "dict with a number": lambda places: {"x": X[places], "split": "train", "scale": 0.5, "k": torch.tensor(2)},
    "words": lambda places: {"y": Y[places], "text": [f"word {place}" for place in places]},
    "time first": lambda places: {"x": X[places].T, "y": Y[places]},
    "records": lambda places: [{"x": X[place], "boxes": ragged([place])[0]} for place in places],
    "objects": lambda places: [SimpleNamespace(x=X[place]) for place in places],
    "arrays": lambda places: {"x": X[places].numpy(), "y": Y[places]},
    "objects of NumPy": lambda places: {"x": X[places], "t": np.array([f"w{p}" for p in places], dtype=object)},
    "16 bits": lambda places: [X[places].bfloat16(), X[places] > 3],
    "complex": lambda places: torch.complex(X, X)[places],
}


@pytest.mark.parametrize("name", MAKES)
def test_a_sample_has_its_id_in_any_batch_and_another_one_another(name):
    make = MAKES[name]
    ids = content_ids(make([0, 1, 2, 3]))
    assert len(set(ids)) == 4
    assert all(len(one) == 16 and int(one, 16) >= 0 for one in ids)
    assert content_ids(make([2, 0, 1])) == [ids[2], ids[0], ids[1]]
    assert content_ids(make([1, 1, 3])) == [ids[1], ids[1], ids[3]]


def test_rows_of_a_table_are_named_whatever_their_index_says():
    table = pd.DataFrame({"a": [1.5, 2.5, 3.5], "b": ["u", "v", "w"]})
    ids = content_ids({"t": table})
    assert content_ids({"t": table.iloc[[2, 0]].reset_index(drop=True)}) == [ids[2], ids[0]]


def test_ids_are_those_of_any_process():
    code = "import torch; from lightning_sgdclean.data.packing import content_ids\n"
    code += "print(*content_ids({'x': torch.arange(20.0).reshape(4, 5), 't': list('abcd')}))"
    assert python("-c", code).stdout.split() == content_ids({"x": X, "t": list("abcd")})


def test_samples_that_differ_by_one_bit_in_numbers_of_many_zeros_are_told_apart():
    coarse = torch.randint(0, 2, (3000, 12), generator=torch.Generator().manual_seed(0)).double()
    assert len(set(content_ids(coarse))) == len(coarse.unique(dim=0))


UNCLEAR = {
    "holds a Index without a row": lambda: {"x": X, "cols": pd.Index(list("abcd"))},
    "holds a bytes without a row": lambda: {"x": X, "raw": b"abc"},
    "tensors of different lengths": lambda: {"x": torch.zeros(9, 3), "edges": torch.zeros(2, 12), "y": Y},
    "has tensors of different lengths.*how many": dict,
}


@pytest.mark.parametrize("match", UNCLEAR)
def test_a_batch_that_does_not_tell_its_samples_apart_is_refused_by_name(match):
    with pytest.raises(SampleIdError, match=f"(?s){match}.*instead of .content"):
        content_ids(UNCLEAR[match]())
