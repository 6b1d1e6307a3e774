# SPDX-License-Identifier: Apache-2.0
"""Modules that people build of: central differences of whole fits, or a refusal that names what it cannot follow."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

from cases import NUM_CLASSES, NUM_TRAIN, NUM_VAL, TRAIN, Case, Plain, adam, loaders, quiet_trainer
from lightning_sgdclean import SGDInfluence
from lightning_sgdclean.base.errors import UnsupportedOperationError, UnsupportedTrainingError
from reference import assert_influence_is_the_derivative

WIDTH = 6


class Layered(nn.Module):
    """Samples of ``WIDTH`` channels and a shape, the layers under test, and a classifier on the mean over the shape."""

    def __init__(self, shape, layers):
        super().__init__()
        self.shape = shape
        self.first = nn.Linear(5, WIDTH * torch.Size(shape).numel())
        self.layers = nn.Sequential(*(make() for make in layers))
        self.last = nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, x):
        hidden = self.layers(self.first(x).tanh().view(-1, WIDTH, *self.shape)).tanh()
        return self.last(hidden.flatten(2).mean(-1) if self.shape else hidden)


def case(name, *layers, shape=(), make=Plain, **module):
    net = partial(Layered, shape, [*layers, partial(nn.Linear, WIDTH, WIDTH)] if not shape else layers)
    return Case(name, {"net": net, "options": {"momentum": 0.9}, **module}, {"max_epochs": 2}, make=make)


class FrozenNorms(Plain):
    """Its norm reads its running statistics in training, too: always, or from some epoch on."""

    def __init__(self, from_epoch=0, **options):
        super().__init__(**options)
        self.from_epoch = from_epoch
        self.net.layers[0].running_mean.fill_(0.2)

    def training_step(self, batch, batch_idx):
        self.net.layers[0].train(self.current_epoch < self.from_epoch)
        return super().training_step(batch, batch_idx)


class Twice(nn.Module):
    """Called twice a step, so that its statistics move twice."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH, momentum=0.3)

    def forward(self, x):
        return self.norm(x) + self.norm(x.tanh() * 0.5 + 0.1)


NORMS = [
    case("BatchNorm1d", partial(nn.BatchNorm1d, WIDTH)),
    case("BatchNorm1d of sequences", partial(nn.BatchNorm1d, WIDTH), shape=(4,)),
    case("BatchNorm2d", partial(nn.Conv2d, WIDTH, WIDTH, 2), partial(nn.BatchNorm2d, WIDTH), shape=(4, 3)),
    case("BatchNorm3d", partial(nn.BatchNorm3d, WIDTH), shape=(4, 3, 2), make_optimizer=adam, options={}),
    case("SyncBatchNorm", partial(nn.SyncBatchNorm, WIDTH)),
    case("BatchNorm cumulative", partial(nn.BatchNorm1d, WIDTH, momentum=None)),
    case("BatchNorm not tracked", partial(nn.BatchNorm1d, WIDTH, track_running_stats=False)),
    case("BatchNorm not affine", partial(nn.BatchNorm1d, WIDTH, affine=False)),
    case("BatchNorm twice a step", Twice),
    case("BatchNorm frozen", partial(nn.BatchNorm1d, WIDTH), make=FrozenNorms),
    case("BatchNorm frozen from epoch 1", partial(nn.BatchNorm1d, WIDTH), make=FrozenNorms, from_epoch=1),
    case("LayerNorm", partial(nn.LayerNorm, WIDTH)),
    case("RMSNorm", partial(nn.RMSNorm, WIDTH)),
    case("GroupNorm", partial(nn.GroupNorm, 3, WIDTH), shape=(4,)),
    case("LocalResponseNorm", partial(nn.LocalResponseNorm, 2), shape=(4,)),
    case("InstanceNorm1d", partial(nn.InstanceNorm1d, WIDTH, affine=True), nn.Tanh, shape=(4,)),
    case("InstanceNorm2d", partial(nn.InstanceNorm2d, WIDTH), nn.Softplus, shape=(4, 3)),
    case(
        "InstanceNorm3d tracked",
        partial(nn.InstanceNorm3d, WIDTH, affine=True, track_running_stats=True),
        nn.Softplus,
        shape=(3, 2, 2),
    ),
]

DROPOUTS = [
    case("Dropout", partial(nn.Dropout, 0.3)),
    case("Dropout1d", partial(nn.Dropout1d, 0.3), shape=(4,)),
    case("Dropout2d", partial(nn.Dropout2d, 0.3), shape=(4, 3)),
    case("Dropout3d", partial(nn.Dropout3d, 0.3), shape=(3, 2, 2)),
    case("AlphaDropout", partial(nn.AlphaDropout, 0.3)),
    case("FeatureAlphaDropout", partial(nn.FeatureAlphaDropout, 0.3), shape=(4, 3)),
    case("RReLU", partial(nn.RReLU, 0.1, 0.3)),
]


def tokens(num, seed, length=4, vocabulary=9):
    """Sequences of ids, some cut short and filled up with 0; the classes do not depend on them."""
    source = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocabulary, (num, length), generator=source)
    lengths = torch.randint(2, length + 1, (num,), generator=source)
    ids[torch.arange(length) >= lengths[:, None]] = 0
    return TensorDataset(ids, torch.randint(0, NUM_CLASSES, (num,), generator=source), torch.arange(num))


TOKENS = {"train": tokens(NUM_TRAIN, 1), "val": tokens(NUM_VAL, 2)}


class Recurrent(nn.Module):
    """Embedding, recurrent layers over packed sequences, classifier on the last states."""

    def __init__(self, kind, packed=True, **options):
        super().__init__()
        self.embedding = nn.Embedding(9, 4, padding_idx=0)
        self.layers = kind(4, 5, batch_first=True, **options)
        self.last = nn.Linear(5, NUM_CLASSES)
        self.packed = packed

    def forward(self, ids):
        states = self.embedding(ids)
        if self.packed:
            lengths = (ids != 0).sum(1).cpu()
            states = pack_padded_sequence(states, lengths, batch_first=True, enforce_sorted=False)
        _, hidden = self.layers(states)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return self.last(hidden.mean(0))


class Attending(nn.Module):
    """Embedding, what attends ``(hidden, padding mask)``, classifier on the mean."""

    def __init__(self, attend, **options):
        super().__init__()
        self.embedding = nn.Embedding(9, 8, padding_idx=0)
        self.register_buffer("places", torch.linspace(0, 1, 9))
        self.attend = attend(**options)
        self.last = nn.Linear(8, NUM_CLASSES)

    def forward(self, ids):
        return self.last(
            self.attend(self.embedding(ids) + torch.linspace(0, 1, ids.shape[1])[:, None], ids == 0).mean(1)
        )


class MultiHead(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, dropout=0.2)
        self.options = options

    def forward(self, hidden, padding):
        return self.attention(hidden, hidden, hidden, key_padding_mask=padding, **self.options)[0]


class EncoderLayer(nn.TransformerEncoderLayer):
    def __init__(self, **options):
        super().__init__(8, 2, dim_feedforward=7, activation="gelu", batch_first=True, **options)

    def forward(self, hidden, padding):
        return super().forward(hidden, src_key_padding_mask=padding)


class Scaled(nn.Module):
    def __init__(self, masked=False, is_causal=False, dropout=0.0):
        super().__init__()
        self.project = nn.Linear(8, 24)
        self.masked, self.is_causal, self.dropout = masked, is_causal, dropout

    def forward(self, hidden, padding):
        query, key, value = self.project(hidden).unflatten(-1, (2, 12)).transpose(1, 2).chunk(3, -1)
        mask = ~padding[:, None, None, :] if self.masked else None
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, mask, dropout, self.is_causal)
        return attended.transpose(1, 2).flatten(2)


class Tied(nn.Module):
    """The classifier's rows are the embeddings of the first tokens."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 5)
        self.out = nn.Linear(5, 9)
        self.out.weight = self.embedding.weight

    def forward(self, ids):
        return self.out(self.embedding(ids).mean(1).tanh())[:, :NUM_CLASSES]


class Embedded(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.embedding = nn.Embedding(30, 5, **options)  # most rows are never used
        self.last = nn.Linear(5, NUM_CLASSES)

    def forward(self, ids):
        return self.last(self.embedding(ids).mean(1).tanh())


def sequences(name, net, *args, **options):
    module = {"options": {"momentum": 0.9}, **options.pop("module", {})}
    return Case(name, {"net": partial(net, *args, **options), **module}, {"max_epochs": 2}, **TOKENS)


SEQUENCES = [
    sequences("LSTM", Recurrent, nn.LSTM, packed=False),
    sequences("LSTM packed bidirectional", Recurrent, nn.LSTM, num_layers=2, dropout=0.3, bidirectional=True),
    sequences("GRU", Recurrent, nn.GRU, num_layers=2, dropout=0.3),
    sequences("RNN", Recurrent, nn.RNN, bidirectional=True),
    sequences("Embedding", Embedded, padding_idx=0),
    sequences("Embedding adam", Embedded, padding_idx=0, module={"make_optimizer": adam, "options": {}}),
    sequences("MultiheadAttention", Attending, MultiHead),
    sequences("MultiheadAttention without weights", Attending, MultiHead, need_weights=False),
    sequences("TransformerEncoderLayer", Attending, EncoderLayer, dropout=0.2),
    sequences("TransformerEncoderLayer norm first", Attending, EncoderLayer, dropout=0.0, norm_first=True),
    sequences("attention", Attending, Scaled),
    sequences("attention causal", Attending, Scaled, is_causal=True),
    sequences("attention padded, dropout", Attending, Scaled, masked=True, dropout=0.2),
    sequences("tied weights", Tied),
]


class PartlyFrozen(Plain):
    """A frozen layer that the optimizer holds, and one that it does not."""

    def __init__(self, **options):
        super().__init__(**options)
        self.fixed = nn.Linear(5, 5)
        for param in [*self.fixed.parameters(), self.net.first.bias]:
            param.requires_grad_(False)

    def loss(self, batch, reduction="mean"):
        x, y, index = batch
        return super().loss((self.fixed(x).tanh(), y, index), reduction)

    def configure_optimizers(self):
        return self.make_optimizer(self.net.parameters(), **self.options)


class Checkpointed(nn.Module):
    def __init__(self, *layers, use_reentrant=False):
        super().__init__()
        self.layers, self.use_reentrant = nn.Sequential(*layers), use_reentrant

    def forward(self, x):
        return checkpoint(self.layers, x, use_reentrant=self.use_reentrant)


def compiled(*layers):
    return torch.compile(nn.Sequential(*layers), backend="aot_eager")


OTHERS = [
    case("frozen parameters", make=PartlyFrozen),
    case("checkpointing", lambda: Checkpointed(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3), nn.Tanh())),
    case("compiled part", lambda: compiled(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.BatchNorm1d(WIDTH))),
    case("old weight norm", lambda: nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH))),
    case("weight norm", lambda: nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))),
]


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf", "ignore:`torch.nn.utils.weight_norm`"
)
@pytest.mark.parametrize("case", [*NORMS, *DROPOUTS, *SEQUENCES, *OTHERS], ids=str)
def test_influence_through_a_module_is_the_derivative_of_the_whole_fit(case):
    assert_influence_is_the_derivative(case)


def refused(error, words, module, train=TRAIN, num_steps=2, **options):
    """Refused with these words before ``num_steps`` optimizer steps were made."""
    callback = SGDInfluence("val_loss", epochs="all", **options)
    trainer = quiet_trainer([callback])
    with pytest.raises(error, match=words):
        trainer.fit(module, *loaders(train))
    assert trainer.global_step <= num_steps


@pytest.mark.parametrize("option", [{"max_norm": 0.5}, {"scale_grad_by_freq": True}, {"sparse": True}], ids=str)
@pytest.mark.parametrize("curvature", ["exact", "finite"])
def test_embedding_that_cannot_be_followed_is_refused_by_name_before_training(option, curvature):
    module = Plain(net=partial(Embedded, **option))
    words = f"embedding of 'net.embedding.weight' with {next(iter(option))}="
    refused(UnsupportedOperationError, words, module, TOKENS["train"], 0, curvature=curvature)


def test_reentrant_checkpointing_is_refused_and_says_what_to_write():
    module = Plain(net=partial(Layered, (), [lambda: Checkpointed(nn.Linear(WIDTH, WIDTH), use_reentrant=True)]))
    refused(UnsupportedOperationError, "use_reentrant=False", module)


def test_batchnorm_inside_checkpointing_is_refused():
    module = Plain(net=partial(Layered, (), [lambda: Checkpointed(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))]))
    refused(UnsupportedOperationError, "BatchNorm moves its statistics twice there", module)


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_spectral_norm_is_refused_by_the_name_of_its_buffer(norm):
    module = Plain(net=partial(Layered, (), [lambda: norm(nn.Linear(WIDTH, WIDTH))]))
    refused(UnsupportedTrainingError, r"moves the buffer 'net.layers.0.*_u'", module)


class Codebook(Plain):
    """Moves a buffer from some step on."""

    def __init__(self, from_step):
        super().__init__()
        self.register_buffer("codebook", torch.zeros(3))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.from_step = from_step

    def training_step(self, batch, batch_idx):
        self.steps += 1
        if self.steps > self.from_step:
            self.codebook += 0.1
        return super().training_step(batch, batch_idx) + self.codebook.sum()


def test_buffer_that_moves_is_refused_in_the_second_step():
    refused(UnsupportedTrainingError, "moves the buffer 'codebook' .step 0.", Codebook(0))


def test_buffer_that_starts_to_move_late_is_refused_after_training():
    refused(UnsupportedTrainingError, "moves the buffer 'codebook' .step 14.", Codebook(9), num_steps=15)


def test_buffer_that_moves_outside_of_the_window_and_a_counter_are_no_matter():
    callback = SGDInfluence("val_loss", epochs=1)
    quiet_trainer([callback]).fit(Codebook(99), *loaders())
    assert len(callback.ranking) == NUM_TRAIN


class Averaged(Plain):
    """Keeps an average of its weights as parameters of its own, from some step on."""

    def __init__(self, from_step):
        super().__init__()
        self.average = nn.Linear(5, 8).requires_grad_(False)
        self.from_step = from_step

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.global_step > self.from_step:
            self.average.weight.data.lerp_(self.net[0].weight.data ** 2, 0.1)

    def configure_optimizers(self):
        return self.make_optimizer(self.net.parameters())


@pytest.mark.parametrize(("from_step", "num_steps"), [(0, 2), (5, 15)])
def test_parameter_that_something_else_moves_is_refused_by_name(from_step, num_steps):
    refused(UnsupportedTrainingError, "parameter 'average.weight' moved", Averaged(from_step), num_steps=num_steps)


BY_NAME = {str(case): case for case in [*NORMS, *SEQUENCES]}


@pytest.mark.parametrize(
    "name", ["BatchNorm frozen from epoch 1", "InstanceNorm3d tracked", "LSTM", "attention causal"]
)
def test_finite_follows_it_to_second_order_in_its_radius(name):
    assert_influence_is_the_derivative(BY_NAME[name], 1e-4, curvature="finite", finite_radius=3e-4)


@pytest.mark.parametrize("name", ["BatchNorm frozen from epoch 1", "InstanceNorm3d tracked", "BatchNorm cumulative"])
def test_statistics_are_followed_over_accumulated_batches(name):
    assert_influence_is_the_derivative(replace(BY_NAME[name], trainer={"max_epochs": 2, "accumulate_grad_batches": 2}))
