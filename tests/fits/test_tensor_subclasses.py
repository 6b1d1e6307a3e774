# SPDX-License-Identifier: Apache-2.0
"""Batches and attributes that are tensors of a class of somebody's own, whose attributes operations lose or keep."""

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from cases import TRAIN, VAL, Plain, quiet_trainer
from lightning_sgdclean import SGDInfluence
from reference import influences


class Labelled(Tensor):
    """As PINA's LabelTensor: what operations make of it has no labels, and its own methods ask for them."""

    @staticmethod
    def __new__(cls, values, labels):
        return values.as_subclass(cls)

    def __init__(self, values, labels):
        self._labels = labels

    def clone(self):
        return Labelled(super().clone().as_subclass(Tensor), self._labels)

    def detach(self):
        return Labelled(super().detach().as_subclass(Tensor), self._labels)

    def __getitem__(self, index):
        return Labelled(self.as_subclass(Tensor)[index], self._labels)

    def plain(self):
        assert self._labels == {"columns": list("abcde")}
        return self.as_subclass(Tensor)


class WithMeta(Tensor):
    """As MONAI's MetaTensor: what operations make of it has its notes."""

    @staticmethod
    def __new__(cls, values, notes):
        return values.as_subclass(cls)

    def __init__(self, values, notes):
        self.notes = notes

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        made = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(made, WithMeta):
            made.notes = next((value.notes for value in args if isinstance(value, WithMeta)), None)
        return made

    def plain(self):
        assert self.notes == {"columns": list("abcde")}
        return self.as_subclass(Tensor)


class OfClass(Plain):
    """Its batches and its scale are of a class of their own."""

    kind = None

    def __init__(self, **options):
        super().__init__(**options)
        self.scale = torch.full((5,), 1.5)
        if self.kind is not None:
            self.scale = self.kind(self.scale, {"columns": list("abcde")})

    def loss(self, batch, reduction="mean"):
        x, *rest = batch
        plain = x if self.kind is None else x.plain()
        return super().loss((plain * self.scale.as_subclass(Tensor), *rest), reduction)


def ranked(kind, make=OfClass, **options):
    def pack(items):
        x, *rest = default_collate(items)
        return (x if kind in (None, Unindexed) else kind(x, {"columns": list("abcde")}), *rest)

    callback = SGDInfluence(epochs="all", verify=4, **options)
    module = type("Module", (make,), {"kind": kind})()
    train, val = DataLoader(TRAIN, 5, collate_fn=pack), DataLoader(VAL, 4, collate_fn=pack)
    quiet_trainer([callback], max_epochs=2, num_sanity_val_steps=1, precision="32-true").fit(module, train, val)
    return influences(callback), module, callback.summary


@pytest.mark.parametrize("keep_batches", [False, True])
@pytest.mark.parametrize("kind", [Labelled, WithMeta])
def test_tensors_of_a_class_of_ones_own_are_ranked_as_plain_ones(kind, keep_batches):
    found, module, _ = ranked(kind, keep_batches=keep_batches)
    plain, twin, _ = ranked(None, keep_batches=keep_batches)
    assert (found == plain).all()
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), twin.parameters(), strict=True))


class Unindexed(Tensor):
    """A loss of this class has no rows to be taken, as MONAI's MetaTensor wants to know whose they are."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is Tensor.__getitem__ and args[0].ndim == 0:
            raise TypeError("len() of a 0-d tensor")
        return super().__torch_function__(func, types, args, kwargs or {})


class LossOfClass(Plain):
    kind = None

    def loss(self, batch, reduction="mean"):
        return super().loss(batch, reduction).as_subclass(self.kind or Tensor)


@pytest.mark.parametrize("batched", [False, True])
def test_samples_are_left_out_where_the_loss_is_of_such_a_class(batched, monkeypatch):
    monkeypatch.setattr("lightning_sgdclean.leave_out.stacked._FEW", 0 if batched else 99)
    found = {kind: ranked(kind, make=LossOfClass)[2] for kind in (Unindexed, None)}
    assert found[Unindexed]["trust"]["samples"] == found[None]["trust"]["samples"]
    assert found[Unindexed]["trust"]["num_verified"] == 4
