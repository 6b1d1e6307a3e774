# SPDX-License-Identifier: Apache-2.0
"""Whether loaders have samples in common."""

import torch
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_sgdclean.data.fetching import share_samples

VAL, TEST = (TensorDataset(torch.zeros(10, 2), torch.zeros(10)) for _ in range(2))


def test_overlap_of_loaders():
    def loaders(*datasets):
        return [DataLoader(dataset) for dataset in datasets]

    first, second = Subset(TEST, [0, 1, 2]), Subset(Subset(TEST, [2, 3, 4]), [1, 2])
    assert share_samples(loaders(TEST), loaders(VAL, TEST))
    assert share_samples(loaders(first), {"a": DataLoader(TEST)})
    assert not share_samples(loaders(first), loaders(second))
    assert share_samples(loaders(Subset(TEST, [4])), loaders(second))
    assert not share_samples(loaders(TEST), loaders(VAL))
    assert not share_samples([[torch.zeros(1)]], loaders(VAL))
