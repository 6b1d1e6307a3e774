# SPDX-License-Identifier: Apache-2.0
"""Modules in the style of the PyTorch and Lightning tutorials; they need no further package."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from cases import Case, Plain, adam
from reference import assert_influence_is_the_derivative

LENGTH, TAGS = 6, 4


class Tagger(nn.Module):
    """A tag for each word, by a bidirectional LSTM."""

    def __init__(self):
        super().__init__()
        self.word_embeddings = nn.Embedding(12, 6, padding_idx=0)
        self.lstm = nn.LSTM(6, 5, batch_first=True, bidirectional=True)
        self.hidden2tag = nn.Linear(10, TAGS)

    def forward(self, sentence):
        return F.log_softmax(self.hidden2tag(self.lstm(self.word_embeddings(sentence))[0]), dim=-1)


class Tagging(Plain):
    """Its loss is a mean over all words that count, and a sample is the whole sentence."""

    def loss(self, batch, reduction="mean"):
        words, tags, _ = batch
        scores = self.net(words).flatten(0, 1)
        if reduction == "mean":
            return F.nll_loss(scores, tags.flatten(), ignore_index=-100)
        rows = F.nll_loss(scores, tags.flatten(), ignore_index=-100, reduction="none").view_as(tags).sum(1)
        return rows * len(rows) / (tags != -100).sum()


def tagged(num, seed):
    source = torch.Generator().manual_seed(seed)
    words = torch.randint(1, 12, (num, LENGTH), generator=source)
    tags = (words + words.roll(1, 1)) % TAGS
    filled = torch.arange(LENGTH) >= torch.randint(2, LENGTH + 1, (num,), generator=source)[:, None]
    return TensorDataset(words.masked_fill(filled, 0), tags.masked_fill(filled, -100), torch.arange(num))


class AutoEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
        self.decoder = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 16))

    def forward(self, x):
        return self.decoder(self.encoder(x))


class Reconstructing(Plain):
    def loss(self, batch, reduction="mean"):
        x = batch[0].flatten(1)
        rows = F.mse_loss(self.net(x), x, reduction=reduction)
        return rows if reduction == "mean" else rows.mean(1)


def pictures(num, seed):
    source = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.rand(num, 1, 4, 4, generator=source), torch.arange(num))


class Convolutional(nn.Module):
    """Blocks of convolution, BatchNorm and SiLU around an identity, with dropout before the classifier."""

    def __init__(self):
        super().__init__()
        block = partial(nn.Conv2d, 4, 4, 3, padding=1, bias=False)
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.block = nn.Sequential(nn.BatchNorm2d(4), nn.SiLU(), block(), nn.BatchNorm2d(4), nn.SiLU(), block())
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(16, 3))

    def forward(self, x):
        hidden = self.stem(x)
        return self.head(hidden + self.block(hidden))


def labelled(num, seed):
    x, index = pictures(num, seed).tensors
    return TensorDataset(x, (x.flatten(1).sum(1) * 3).long() % 3, index)


CASES = [
    Case("LSTM tagger", {"net": Tagger, "make_optimizer": adam}, make=Tagging, train=tagged(23, 1), val=tagged(11, 2)),
    Case(
        "autoencoder",
        {"net": AutoEncoder, "make_optimizer": adam},
        make=Reconstructing,
        train=pictures(23, 1),
        val=pictures(11, 2),
    ),
    Case(
        "convolutional",
        {"net": Convolutional, "options": {"momentum": 0.9}},
        train=labelled(23, 1),
        val=labelled(11, 2),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_influence_is_the_derivative_of_the_whole_fit(case):
    assert_influence_is_the_derivative(case)
