# SPDX-License-Identifier: Apache-2.0
"""Short sentences of token ids, filled up with 0; the first token gives the class away."""

import torch
from torch.utils.data import TensorDataset

from cases import NUM_CLASSES, NUM_TRAIN, NUM_VAL


def sentences(num, seed, length=6, vocabulary=12):
    source = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocabulary, (num, length), generator=source)
    lengths = torch.randint(3, length + 1, (num,), generator=source)
    ids[torch.arange(length) >= lengths[:, None]] = 0
    return TensorDataset(ids, ids[:, 0] % NUM_CLASSES, torch.arange(num))


SENTENCES = {"train": sentences(NUM_TRAIN, 1), "val": sentences(NUM_VAL, 2)}
