# SPDX-License-Identifier: Apache-2.0
"""Batches that wait to be read: in order, never for long, and never read as anything but what was trained on."""

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import Dataset

from cases import TRAIN, Case, Plain, fit
from datasets import KEPT
from lightning_sgdclean import SGDInfluence
from lightning_sgdclean.base.errors import SGDInfluenceWarning
from lightning_sgdclean.record import keeping
from lightning_sgdclean.record.keeping import _MOST, FingerprintQueue, Taken
from lightning_sgdclean.trajectory.records import MicroBatch
from lightning_sgdclean.trajectory.store import Trajectory
from reference import assert_influence_is_the_derivative, influences

EPOCHS = 9


@pytest.fixture
def soon(monkeypatch):
    """The lengths of what is read at once, where data are soon known not to be random."""
    monkeypatch.setattr(keeping, "_ENOUGH", 10)
    lengths, read_all = [], FingerprintQueue.read_all

    def counting(self):
        lengths.append(len(self._waiting))
        read_all(self)

    monkeypatch.setattr(FingerprintQueue, "read_all", counting)
    return lengths


def trained(make=Plain, loader=None, **trainer):
    callback = SGDInfluence("val_loss", epochs="all")
    case = Case("waiting", {"norm": True}, {"max_epochs": EPOCHS, **trainer}, loader or {}, make=make)
    return callback, fit(case, callback)


def digests(callback):
    return [micro.digest for step in Trajectory(callback.run_dir / "trajectory").steps for micro in step.micro]


# In a fit -----------------------------------------------------------------------------------------------------------


def test_influence_is_the_derivative_where_batches_waited(soon):
    assert_influence_is_the_derivative(Case("waiting", {"norm": True}, {"max_epochs": 5}))
    assert max(soon) > 1


def test_what_waited_has_the_fingerprints_that_it_would_have_had_at_once(soon):
    waiting, _ = trained()
    assert max(soon) > 1
    soon.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keeping, "_MOST_BYTES", 0)
        at_once, _ = trained()
    assert max(soon) == 1
    assert all(map(torch.equal, digests(waiting), digests(at_once)))
    assert np.array_equal(influences(waiting), influences(at_once))


class Popping(Plain):
    """Takes a batch apart, as many a training_step does."""

    def training_step(self, batch, batch_idx):
        x = batch.pop("x")
        return self.loss((x, batch.pop("y"), batch.clear()))


def as_dict(items):
    x, y, _ = map(torch.stack, zip(*items, strict=True))
    return {"x": x, "y": y}


def test_a_dict_that_is_emptied_meanwhile_is_read_as_it_was(soon):
    popping, _ = trained(Popping, {"collate_fn": as_dict})
    assert max(soon) > 1
    assert np.array_equal(influences(popping), influences(trained()[0]))


class InPlace(Plain):
    """Writes to its batch, which waits to be read."""

    def training_step(self, batch, batch_idx):
        return self.loss((batch[0].mul_(0.9), *batch[1:]))


class OutOfPlace(Plain):
    def training_step(self, batch, batch_idx):
        return self.loss((batch[0] * 0.9, *batch[1:]))


def test_a_batch_that_is_written_to_meanwhile_is_read_as_it_was(soon):
    written, clean = trained(InPlace)[0], trained(OutOfPlace)[0]
    assert max(soon) > 1
    assert all(map(torch.equal, digests(written), digests(clean)))
    assert np.array_equal(influences(written), influences(clean))


class Ring:
    """A collate function that fills a few buffers again and again, behind torch's back."""

    def __init__(self):
        self.buffers = [np.empty((5, 5), np.float32) for _ in range(3)]

    def __call__(self, items):
        x, y, i = map(torch.stack, zip(*items, strict=True))
        self.buffers.append(buffer := self.buffers.pop(0))
        buffer[: len(x)] = x.numpy()
        return [torch.from_numpy(buffer)[: len(x)], y, i]


def test_buffers_that_the_loader_fills_again_are_read_as_they_were(soon):
    single = {"precision": "32-true"}  # in float64 a batch would be converted, and so copied
    reusing = trained(loader={"collate_fn": Ring()}, **single)[0]
    assert max(soon) > 3
    assert np.array_equal(influences(reusing), influences(trained(**single)[0]))


class LateNoise(Dataset):
    """The same data each time, until it is told otherwise."""

    is_noisy = False

    def __len__(self):
        return len(TRAIN)

    def __getitem__(self, index):
        x, y, i = TRAIN[index]
        return (x + 0.3 * torch.randn(5) if self.is_noisy else x), y, i


class Begin(pl.Callback):
    def __init__(self, dataset):
        self.dataset = dataset

    def on_train_epoch_start(self, trainer, pl_module):
        self.dataset.is_noisy = trainer.current_epoch == EPOCHS - 1


def test_augmentation_that_begins_while_batches_wait_loses_none_of_them(soon):
    dataset = LateNoise()
    callback = SGDInfluence("val_loss")
    case = Case("late", {}, {"max_epochs": EPOCHS}, train=dataset, callbacks=lambda: [Begin(dataset)])
    with pytest.warns(SGDInfluenceWarning, match=f"{KEPT}, since sample .* holds other data in epoch 8"):
        fit(case, callback)
    assert max(soon) > 1
    assert callback.summary["batches"]["kept"] == 5
    assert callback.summary["replay"]["batches_bit_for_bit"] == 5


def test_augmentation_that_begins_with_an_epoch_of_many_batches_loses_none_of_them_either(soon):
    dataset = LateNoise()
    callback = SGDInfluence("val_loss", snapshots="sqrt")
    case = Case(
        "late", {}, {"max_epochs": EPOCHS}, {"batch_size": 1}, train=dataset, callbacks=lambda: [Begin(dataset)]
    )
    with pytest.warns(SGDInfluenceWarning, match=KEPT):
        fit(case, callback)
    assert callback.summary["batches"]["kept"] == 23
    assert callback.summary["replay"]["batches_bit_for_bit"] == 23


# Alone --------------------------------------------------------------------------------------------------------------


def micro(number):
    return MicroBatch(ids=[number], positions=[number], epoch=0, batch_idx=number, random={})


def waiting():
    read = []
    return FingerprintQueue(lambda taken: read.extend((one.micro.batch_idx, one.batch) for one in taken)), read


def test_batches_are_read_in_order_so_many_at_once():
    line, read = waiting()
    for number in range(_MOST - 1):
        line.take(Taken(micro(number), [torch.tensor([number])]), may_wait=True)
    assert read == []
    line.take(Taken(micro(_MOST - 1), [torch.tensor([_MOST - 1])]), may_wait=True)
    assert read == [(number, [torch.tensor([number])]) for number in range(_MOST)]


@pytest.mark.parametrize(
    "batch",
    [
        [torch.ones(1), "text"],
        {"x": [torch.ones(1)]},
        np.ones(1),
        torch.ones(1 << 20),
        torch.nn.Parameter(torch.ones(1)),
        [],
    ],
)
def test_what_is_large_or_not_made_of_plain_tensors_is_read_at_once_after_all_before_it(batch):
    line, read = waiting()
    line.take(Taken(micro(0), torch.ones(1)), may_wait=True)
    line.take(Taken(micro(1), batch), may_wait=True)
    assert [number for number, _ in read] == [0, 1]


def test_nothing_waits_that_may_not():
    line, read = waiting()
    line.take(Taken(micro(0), torch.ones(1)), may_wait=False)
    assert [number for number, _ in read] == [0]


def test_an_error_of_one_that_waited_reaches_who_brings_the_next():
    def fail(taken):
        raise OSError("no")

    line = FingerprintQueue(fail)
    line.take(Taken(micro(0), torch.ones(1)), may_wait=True)
    with pytest.raises(OSError, match="no"):
        line.take(Taken(micro(1), "text"), may_wait=True)
