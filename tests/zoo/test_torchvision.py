# SPDX-License-Identifier: Apache-2.0
"""Models of torchvision, its segmentation with pixels to be left out, and its MixUp and CutMix."""

from collections import OrderedDict
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset, default_collate
from torchvision.models import ConvNeXt, DenseNet, MobileNetV3, SwinTransformer, VisionTransformer, resnet18
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.models.segmentation import FCN, LRASPP
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.transforms import v2

from cases import NUM_CLASSES, NUM_TRAIN, NUM_VAL, Case, Plain, adam
from reference import assert_influence_is_the_derivative

SMALL_STEP = 1e-8
MOMENTUM = {"options": {"lr": 0.01, "momentum": 0.9}}


def pictures(num, seed, size=16):
    source = torch.Generator().manual_seed(seed)
    x, y = torch.randn(num, 3, size, size, generator=source), torch.randint(0, NUM_CLASSES, (num,), generator=source)
    return TensorDataset(x + y[:, None, None, None] / 2, y, torch.arange(num))


def painted(num, seed, size=16):
    """Every pixel has a class, which its own colours give away; some are 255, which means that they do not count."""
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(num, 3, size, size, generator=source)
    y = (x.sum(1) > 0).long() + (x[:, 0] > 1)
    y[torch.rand(y.shape, generator=source) < torch.rand(num, 1, 1, generator=source) / 2] = 255
    return TensorDataset(x, y, torch.arange(num))


PICTURES = {"train": pictures(NUM_TRAIN, 1), "val": pictures(NUM_VAL, 2)}
PAINTED = {"train": painted(NUM_TRAIN, 1), "val": painted(NUM_VAL, 2)}


class Segmenting(Plain):
    """A mean over the pixels that count; torchvision's networks say it in a dict."""

    def loss(self, batch, reduction="mean"):
        x, y, _ = batch
        scores = self.net(x)["out"]
        if reduction == "mean":
            return F.cross_entropy(scores, y, ignore_index=255)
        rows = F.cross_entropy(scores, y, ignore_index=255, reduction="none").sum((1, 2))
        return rows * len(rows) / (y != 255).sum()


class Backbone(nn.Module):
    """Features at two scales."""

    def __init__(self):
        super().__init__()
        self.fine = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.SiLU())
        self.coarse = nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.SiLU())

    def forward(self, x):
        low = self.fine(x)
        high = self.coarse(low)
        return OrderedDict(out=high, low=low, high=high)


def resnet():
    """ResNet-18 without its last two stages, which hold nearly all of its eleven million weights."""
    net = resnet18()
    net.layer3, net.layer4, net.fc = nn.Identity(), nn.Identity(), nn.Linear(128, NUM_CLASSES)
    return net


def densenet():
    return DenseNet(4, (2, 2), 8, num_classes=NUM_CLASSES)


def vit():
    return VisionTransformer(16, 8, 2, 2, 8, 12, dropout=0.1, num_classes=NUM_CLASSES)


def swin():
    return SwinTransformer([4, 4], 8, [2, 2], [2, 2], [2, 2], stochastic_depth_prob=0.1, num_classes=NUM_CLASSES)


def convnext():
    return ConvNeXt([CNBlockConfig(8, 12, 2), CNBlockConfig(12, None, 1)], 0.2, num_classes=NUM_CLASSES)


def mobilenet():
    """Of three blocks, with squeezing and excitation, ReLU in one, hardswish in the others."""
    block = partial(InvertedResidualConfig, width_mult=1.0, dilation=1)
    blocks = [
        block(8, 3, 8, 8, True, "RE", stride=2),
        block(8, 3, 16, 8, True, "HS", stride=1),
        block(8, 5, 16, 12, True, "HS", stride=1),
    ]
    return MobileNetV3(blocks, 16, num_classes=NUM_CLASSES)


def classifying(name, net, **options):
    return Case(name, {"net": net, **(options or MOMENTUM)}, **PICTURES)


def segmenting(name, net, **options):
    return Case(name, {"net": net, **(options or MOMENTUM)}, make=Segmenting, **PAINTED)


RESNET = Case("ResNet-18", {"net": resnet, **MOMENTUM}, {"max_epochs": 1}, **PICTURES)
SMOOTH = [
    classifying("ViT", vit, make_optimizer=adam),
    classifying("Swin", swin, make_optimizer=adam),
    classifying("ConvNeXt", convnext, make_optimizer=adam),
    segmenting("LR-ASPP", lambda: LRASPP(Backbone(), 6, 8, NUM_CLASSES, 8), make_optimizer=adam),
]
KINKS = [
    classifying("DenseNet", densenet),
    classifying("MobileNetV3", mobilenet),
    segmenting("FCN", lambda: FCN(Backbone(), FCNHead(8, NUM_CLASSES))),
]


@pytest.mark.parametrize("case", SMOOTH, ids=str)
def test_influence_is_the_derivative_of_the_whole_fit(case):
    assert_influence_is_the_derivative(case, 1e-6)


@pytest.mark.parametrize("case", [RESNET, *KINKS], ids=str)
def test_with_kinks_it_is_the_derivative_but_for_those_that_the_difference_crosses(case):
    assert_influence_is_the_derivative(case, 1e-4, SMALL_STEP)


def mixed(items, kind):
    """As torchvision's documentation mixes them, in the collate function; the samples' numbers stay."""
    x, y, index = default_collate(items)
    return [*kind(num_classes=NUM_CLASSES)(x, y), index]


def last(batch):
    return batch[-1].tolist()


@pytest.mark.parametrize("kind", [v2.MixUp, v2.CutMix])
def test_mixed_batches_are_stored_and_a_mixed_sample_is_its_row(kind):
    case = Case(
        kind.__name__, {"net": densenet, **MOMENTUM}, loader={"collate_fn": partial(mixed, kind=kind)}, **PICTURES
    )
    callback = assert_influence_is_the_derivative(case, 1e-4, SMALL_STEP, sample_ids=last, keep_batches=True)
    assert callback.summary["batches"]["kept"] == 15
