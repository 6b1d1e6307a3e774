# SPDX-License-Identifier: Apache-2.0
"""MONAI's networks and losses on its own loaders: dicts of MetaTensors, cached or augmented by transforms."""

import numpy as np
import pytest
import torch
from monai.data import CacheDataset, DataLoader, Dataset
from monai.losses import DiceCELoss, DiceLoss, FocalLoss
from monai.networks.nets import UNet
from monai.transforms import Compose, EnsureTyped, RandFlipd, RandGaussianNoised, ScaleIntensityd
from pytorch_lightning import LightningModule, seed_everything

from cases import quiet_trainer
from lightning_sgdclean import SGDInfluence
from lightning_sgdclean.base.errors import LossSplitError
from reference import assert_derivative, influences

KEYS = ["image", "label"]
FIXED = Compose([ScaleIntensityd("image"), EnsureTyped(KEYS, dtype=(torch.float64, torch.int64))])
RANDOM = Compose([*FIXED.transforms, RandFlipd(KEYS, prob=0.5, spatial_axis=0), RandGaussianNoised("image", prob=0.5)])


def items(num, seed):
    source = np.random.default_rng(seed)
    images = source.normal(size=(num, 1, 8, 8))
    return [{"image": image, "label": image > 0.3, "index": index} for index, image in enumerate(images)]


TRAIN, VAL = items(11, 1), items(5, 2)
FUNCTION = {"to_onehot_y": True, "softmax": True}


class Segmenting(LightningModule):
    """An ordinary module around a network and a loss of MONAI's; with ``sample_weights`` its own weighted twin."""

    def __init__(self, criterion):
        super().__init__()
        torch.manual_seed(1)
        self.net = UNet(2, 1, 2, channels=(3, 4), strides=(2,), num_res_units=1, act="SELU", dropout=0.1)
        self.criterion, self.sample_weights = criterion, None

    def loss(self, batch):
        return self.criterion(self.net(batch["image"]), batch["label"])

    def rows(self, batch):
        out = self.net(batch["image"])
        return torch.stack([self.criterion(o[None], y[None]) for o, y in zip(out, batch["label"], strict=True)])

    def training_step(self, batch, batch_idx):
        if self.sample_weights is None:
            return self.loss(batch)
        return (self.rows(batch) * self.sample_weights[batch["index"]]).mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01, eps=1e-4)


def fit(criterion, kind=CacheDataset, transform=FIXED, callbacks=(), weights=None):
    options = {"progress": False} if kind is CacheDataset else {}
    seed_everything(1, verbose=False)
    transform.set_random_state(1)
    module = Segmenting(criterion)
    module.sample_weights = weights
    train = DataLoader(kind(TRAIN, transform, **options), batch_size=4, shuffle=True)
    trainer = quiet_trainer(callbacks, max_epochs=2)
    trainer.fit(module, train, DataLoader(kind(VAL, FIXED, **options), batch_size=5))
    return module, float(trainer.callback_metrics["val_loss"])


def assert_followed(criterion, *how, verify=0, **options):
    callback = SGDInfluence("val_loss", epochs="all", verify=verify, **options)
    found, plain = fit(criterion, *how, callbacks=[callback])[0].state_dict(), fit(criterion, *how)[0].state_dict()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in found.items())
    assert_derivative(influences(callback, len(TRAIN)), lambda w: fit(criterion, *how, weights=w)[1], 1e-6)
    return callback


def of_classes(scores, labels):
    return torch.nn.functional.cross_entropy(scores, labels[:, 0])


@pytest.mark.parametrize("kind", [CacheDataset, Dataset])
def test_dicts_of_meta_tensors_are_followed_and_samples_really_left_out(kind):
    callback = assert_followed(of_classes, kind, verify=3)
    assert callback.summary["trust"]["num_verified"] == 3


def test_transforms_with_random_states_of_their_own_need_their_batches_kept():
    callback = assert_followed(of_classes, CacheDataset, RANDOM, keep_batches=True)
    assert callback.summary["batches"]["kept"] == 6


@pytest.mark.parametrize("loss", [DiceLoss(**FUNCTION), DiceCELoss(**FUNCTION)], ids=["Dice", "Dice and CE"])
def test_losses_of_images_are_followed(loss):
    assert_followed(loss)


def test_focal_loss_which_computes_in_32_bits_is_split_as_its_rows_say():
    def of(**options):
        callback = SGDInfluence("val_loss", epochs="all", verify=0, **options)
        fit(FocalLoss(to_onehot_y=True, use_softmax=True), callbacks=[callback])
        return influences(callback, len(TRAIN))

    assert of() == pytest.approx(
        of(sample_losses=lambda module, batch: module.rows(batch), tolerance=1e-6), rel=1e-3, abs=1e-7
    )


def test_dice_of_a_whole_batch_is_refused_before_training():
    with pytest.raises(LossSplitError, match="_loss"):
        fit(DiceLoss(batch=True, **FUNCTION), callbacks=[SGDInfluence("val_loss", epochs="all")])
