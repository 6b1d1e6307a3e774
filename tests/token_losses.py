# SPDX-License-Identifier: Apache-2.0
"""Losses of tokens, where a sample is a whole sequence, each beside its rows ``(B, T)`` written out by hand.

The twin that is trained with other weights is ``sum(w * rows) / divisor``.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from cases import Case, Plain

VOCABULARY, LENGTH, PAD = 7, 6, 0


def sequences(num, seed):
    """Tokens padded to a common length, and the number of each sequence."""
    source = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, VOCABULARY, (num, LENGTH), generator=source)
    lengths = torch.randint(3, LENGTH + 1, (num, 1), generator=source)
    return TensorDataset(torch.where(torch.arange(LENGTH) < lengths, tokens, PAD), torch.arange(num))


TRAIN, VAL = sequences(13, 1), sequences(7, 2)


class Reader(nn.Module):
    """A causal transformer layer with layer norm, dropout and a padding mask."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.place = nn.Parameter(0.3 * torch.randn(LENGTH, 8))
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1, batch_first=True, activation=F.gelu)
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, tokens):
        length = tokens.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).triu(1)
        x = self.embed(tokens) + self.place[:length]
        return self.head(self.layer(x, src_mask=causal, src_key_padding_mask=tokens == PAD))


class Recurrent(nn.Module):
    """The same by a GRU, whose sequences are time first."""

    def __init__(self):
        super().__init__()
        self.embed, self.gru = nn.Embedding(VOCABULARY, 8), nn.GRU(8, 8)
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, tokens):
        return self.head(self.gru(self.embed(tokens.T))[0])


def rows_of(logits, labels):
    return -logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]


class Tokens(Plain):
    """Predicts each next token; ``plain`` is its loss, ``divisor`` what the rows of the twin are divided by."""

    def __init__(self, plain, divisor="tokens", net=Reader, reads_last=False, **options):
        super().__init__(net=net, **{"options": {"momentum": 0.5, "lr": 0.3}, **options})
        self.plain, self.divisor, self.reads_last = plain, divisor, reads_last

    def trim(self, tokens):
        """Padded to the longest of the batch, as a collate function would do."""
        return tokens[:, : int((tokens != PAD).sum(1).max())]

    def rows(self, tokens):
        logits = self.net(tokens)[:, :-1] if self.reads_last else self.net(tokens[:, :-1])
        logits = logits if isinstance(self.net, Reader) else logits.transpose(0, 1)
        kept = tokens[:, 1:] != PAD
        rows = rows_of(logits, tokens[:, 1:]) * kept
        if self.divisor == "tokens":
            return rows / kept.sum()
        if self.divisor == "each":
            return rows / kept.sum(1, keepdim=True) / len(tokens)
        return rows / kept.numel()

    def loss(self, batch, reduction="mean"):
        return F.cross_entropy(*flat(self, batch[0]), ignore_index=PAD, reduction="sum") / 50

    def training_step(self, batch, batch_idx):
        tokens = self.trim(batch[0])
        if self.sample_weights is None:
            return self.plain(self, tokens)
        return (self.rows(tokens).sum(1) * self.sample_weights[batch[1]]).sum()


def flat(m, tokens):
    logits = m.net(tokens[:, :-1])
    labels = tokens[:, 1:] if isinstance(m.net, Reader) else tokens[:, 1:].T
    return logits.reshape(-1, VOCABULARY), labels.reshape(-1)


def flattened(m, tokens):
    return F.cross_entropy(*flat(m, tokens), ignore_index=PAD)


def flattened_module(m, tokens):
    return nn.CrossEntropyLoss(ignore_index=PAD)(*flat(m, tokens))


def shifted(m, tokens):
    """As language models do: logits of all tokens, then all but the last against all but the first."""
    logits = m.net(tokens)[:, :-1].contiguous()
    return F.cross_entropy(logits.view(-1, VOCABULARY), tokens[:, 1:].reshape(-1), ignore_index=PAD)


def time_first(m, tokens):
    logits = m.net(tokens[:, :-1]).transpose(0, 1)
    return F.cross_entropy(logits.reshape(-1, VOCABULARY), tokens[:, 1:].T.reshape(-1), ignore_index=PAD)


def not_flattened(m, tokens):
    return F.cross_entropy(m.net(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:], ignore_index=PAD)


def time_first_not_flattened(m, tokens):
    return F.cross_entropy(m.net(tokens[:, :-1]).permute(1, 2, 0), tokens[:, 1:].T, ignore_index=PAD)


def masked_by_hand(m, tokens):
    logits, labels = flat(m, tokens)
    rows = F.cross_entropy(logits, labels, reduction="none")
    return (rows * (labels != PAD)).sum() / (labels != PAD).sum()


def mean_of_means(m, tokens):
    logits, labels = flat(m, tokens)
    rows = F.cross_entropy(logits, labels, ignore_index=PAD, reduction="none").view(len(tokens), -1)
    return (rows.sum(1) / (tokens[:, 1:] != PAD).sum(1)).mean()


def summed(m, tokens):
    return F.cross_entropy(*flat(m, tokens), ignore_index=PAD, reduction="sum") / tokens[:, 1:].numel()


def nll(m, tokens):
    logits, labels = flat(m, tokens)
    return F.nll_loss(logits.log_softmax(1), labels, ignore_index=PAD)


LOSSES = {
    "flattened": (flattened, {}),
    "flattened, by module": (flattened_module, {}),
    "shifted as in language models": (shifted, {"reads_last": True}),
    "time first": (time_first, {}),
    "time first from a GRU": (flattened, {"net": Recurrent}),
    "not flattened": (not_flattened, {}),
    "time first, not flattened": (time_first_not_flattened, {}),
    "masked by hand": (masked_by_hand, {}),
    "mean of each sequence's mean": (mean_of_means, {"divisor": "each"}),
    "summed, then divided": (summed, {"divisor": "all"}),
    "nll": (nll, {}),
}


def case(name, plain, loader=None, **module):
    def make(**options):
        return Tokens(plain, **module, **options)

    return Case(name, {}, {"max_epochs": 2}, {"batch_size": 4, **(loader or {})}, make, TRAIN, VAL)
