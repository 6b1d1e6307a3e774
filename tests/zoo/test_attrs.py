# SPDX-License-Identifier: Apache-2.0
"""Batches that are classes of attrs: with slots, frozen, with converters and private names."""

import attrs
import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from cases import Case, Plain, fit
from datasets import OPTIONS
from lightning_sgdclean import SGDInfluence
from lightning_sgdclean.data.fingerprints import batch_digest
from lightning_sgdclean.data.unpacking import pack_surely, unpack_batch
from reference import influences, ranked


@attrs.define
class Defined:
    x: object
    y: object
    _i: object

    @property
    def i(self):
        return self._i


@attrs.frozen
class Frozen:
    x: object
    y: object = attrs.field(converter=lambda y: y.long())
    i: object = None


@attrs.define(slots=False)
class WithDict:
    x: object
    y: object
    i: object


MAKES = [Defined, Frozen, WithDict]


@pytest.mark.parametrize("make", MAKES)
def test_an_object_comes_back_as_it_was(make):
    value, classes = make(torch.ones(3, 2), torch.arange(3), torch.arange(3)), {}
    back = unpack_batch(pack_surely(value, 3, classes), classes, torch.device("cpu"))
    assert type(back) is make
    assert torch.equal(batch_digest(back, 3), batch_digest(value, 3))
    assert torch.equal(back.x, value.x)


@pytest.mark.parametrize("keep", ["auto", True, False])
@pytest.mark.parametrize("make", MAKES)
def test_it_is_ranked_as_plain_tensors_are(make, keep):
    class Taking(Plain):
        def training_step(self, batch, batch_idx):
            (held,) = batch
            return super().training_step([held.x.double(), held.y, held.i], batch_idx)

        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            return batch

    case = Case("attrs", OPTIONS, loader={"collate_fn": lambda items: (make(*default_collate(items)),)}, make=Taking)
    plain, callback = Case("list", OPTIONS), SGDInfluence("val_loss", epochs="all", keep_batches=keep)
    module = fit(case, callback)
    assert all(torch.equal(one, other) for one, other in zip(module.parameters(), fit(plain).parameters(), strict=True))
    assert np.array_equal(influences(callback), influences(ranked(plain)))
