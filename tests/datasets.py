# SPDX-License-Identifier: Apache-2.0
"""Data, a module and collate functions that change what they give each time that they are asked, or what is missing."""

import random

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from cases import TRAIN, Plain

KEPT = "Training batches are kept as they were trained on"
LOST = "gone already"
OPTIONS = {"options": {"momentum": 0.9}, "dropout": 0.2, "norm": True}


class Wrapped(Dataset):
    def __init__(self, inner=TRAIN):
        self.inner = inner

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, index):
        return self.inner[index]


class Augmented(Wrapped):
    """Noise from all three global generators."""

    def __getitem__(self, index):
        x, y, i = self.inner[index]
        return x + 0.3 * torch.randn(5) + 0.1 * random.random() + 0.1 * float(np.random.rand()), y, i


class OwnGenerator(Wrapped):
    """Noise from a generator that nobody can see or set."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(5)

    def __getitem__(self, index):
        x, y, i = self.inner[index]
        return x + 0.3 * torch.randn(5, generator=self.generator), y, i


def noisy_collate(items):
    x, y, i = default_collate(items)
    return [x * (1 + 0.2 * torch.randn(len(x), 1)), y, i]


class Hooked(Plain):
    """Augments on the device, as the whole batch."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if not self.trainer.training:
            return batch
        x, y, i = batch
        return [x + 0.2 * torch.randn_like(x), y, i]


def sound(items):
    return [item for item in items if item is not None]


def filled_up(items):
    return default_collate([*sound(items), *sound(items)[: len(items) - len(sound(items))]])


class ByThePrevious:
    """Puts the last whole sample, maybe of an earlier batch, in place of a missing one; at first ``first``."""

    def __init__(self, *first):
        self.last = first

    def __call__(self, items):
        found = []
        for item in items:
            self.last = self.last if item is None else item
            found.append(self.last)
        return default_collate(found)
