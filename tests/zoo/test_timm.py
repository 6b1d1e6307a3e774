# SPDX-License-Identifier: Apache-2.0
"""Networks, losses, optimizers, schedules and Mixup of timm."""

from functools import partial

import pytest
import torch
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import ConvNeXt, ResNet, VisionTransformer
from timm.models.resnet import BasicBlock
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler, StepLRScheduler
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from cases import NUM_CLASSES, NUM_TRAIN, NUM_VAL, Case, Plain, adam
from lightning_sgdclean.base.errors import UnsupportedTrainingError
from reference import assert_influence_is_the_derivative, ranked


def pictures(num, seed, size=16):
    source = torch.Generator().manual_seed(seed)
    x, y = torch.randn(num, 3, size, size, generator=source), torch.randint(0, NUM_CLASSES, (num,), generator=source)
    return TensorDataset(x + y[:, None, None, None] / 2, y, torch.arange(num))


PICTURES = {"train": pictures(NUM_TRAIN, 1), "val": pictures(NUM_VAL, 2)}


def convnext():
    return ConvNeXt(num_classes=NUM_CLASSES, patch_size=1, depths=(1, 1, 1, 1), dims=(4, 4, 6, 8), drop_path_rate=0.2)


def resnet():
    """With a deep stem, squeezing and excitation, and dropped blocks."""
    return ResNet(
        BasicBlock,
        [1, 1, 1, 1],
        num_classes=NUM_CLASSES,
        channels=(4, 4, 6, 6),
        output_stride=8,
        stem_type="deep",
        stem_width=4,
        act_layer=nn.SiLU,
        block_args={"attn_layer": "se"},
        drop_path_rate=0.2,
    )


def vit():
    return VisionTransformer(16, 8, num_classes=NUM_CLASSES, embed_dim=8, depth=2, num_heads=2, proj_drop_rate=0.1)


class Training(Plain):
    """As timm trains: one of its losses in training, torch's own in validation, parameters grouped by their decay."""

    criterion = staticmethod(F.cross_entropy)

    def __init__(self, net=vit, opt="sgd", scheduler=None, **options):
        super().__init__(net=net)
        self.opt, self.scheduler, self.options = opt, scheduler, options

    def training_step(self, batch, batch_idx):
        x, y, index = batch
        if self.sample_weights is None:
            return self.criterion(self.net(x), y)
        return (self.rows(self.net(x), y) * self.sample_weights[index]).mean()

    def rows(self, logits, y):
        return F.cross_entropy(logits, y, reduction="none")

    def configure_optimizers(self):
        optimizer = create_optimizer_v2(self, self.opt, **{"lr": 0.02, "weight_decay": 0.02, **self.options})
        return optimizer if self.scheduler is None else ([optimizer], [self.scheduler(optimizer)])

    def lr_scheduler_step(self, scheduler, metric):
        scheduler.step(self.current_epoch)  # as Lightning's documentation says of timm's


@pytest.mark.parametrize("net", [convnext, resnet, vit])
def test_influence_is_the_derivative_of_the_whole_fit(net):
    assert_influence_is_the_derivative(Case(net.__name__, {"net": net, "make_optimizer": adam}, **PICTURES), 1e-5)


@pytest.mark.parametrize("opt", ["sgd", "adamw", "lamb", "lars"])
def test_optimizers_are_followed_exactly(opt):
    case = Case(opt, {"opt": opt}, make=Training, **PICTURES)
    assert_influence_is_the_derivative(case, 1e-6)


@pytest.mark.parametrize("opt", ["lion", "nadamw", "rmsproptf"])
def test_other_optimizers_are_refused_by_name_before_training(opt):
    with pytest.raises(UnsupportedTrainingError, match=rf"timm\.optim\.{opt.removesuffix('tf').removesuffix('w')}"):
        ranked(Case(opt, {"opt": opt}, make=Training, **PICTURES))


@pytest.mark.parametrize("scheduler", [CosineLRScheduler, StepLRScheduler])
def test_schedulers_are_followed_exactly(scheduler):
    make = partial(
        scheduler,
        warmup_t=1,
        warmup_lr_init=0.001,
        **({"t_initial": 3} if scheduler is CosineLRScheduler else {"decay_t": 1}),
    )
    assert_influence_is_the_derivative(Case("schedule", {"scheduler": make}, make=Training, **PICTURES), 1e-6)


def smoothed(logits, y):
    logs = logits.log_softmax(-1)
    return -0.9 * logs.gather(1, y[:, None])[:, 0] - 0.1 * logs.mean(-1)


def of_soft_targets(logits, y):
    return -(F.one_hot(y, NUM_CLASSES) * logits.log_softmax(-1)).sum(-1)


class OneHot(SoftTargetCrossEntropy):
    def forward(self, x, target):
        return super().forward(x, F.one_hot(target, NUM_CLASSES))


def binary(logits, y):
    target = F.one_hot(y, NUM_CLASSES) * 0.7 + 0.1  # smoothed by 0.3
    return F.binary_cross_entropy_with_logits(logits, target.to(logits), reduction="none").mean(1)


LOSSES = {
    "LabelSmoothingCrossEntropy": (LabelSmoothingCrossEntropy(0.1), smoothed),
    "SoftTargetCrossEntropy": (OneHot(), of_soft_targets),
    "BinaryCrossEntropy": (BinaryCrossEntropy(smoothing=0.3), binary),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_followed_exactly(name):
    class Own(Training):
        criterion, rows = LOSSES[name][0], staticmethod(LOSSES[name][1])

    assert_influence_is_the_derivative(
        Case(name, {"net": vit, "opt": "adamw", "eps": 1e-4}, make=Own, **PICTURES), 1e-6
    )


class Mixing(Training):
    """Mixes batches before the step, as timm's own script does."""

    mixup = Mixup(cutmix_alpha=1.0, num_classes=NUM_CLASSES)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if not self.trainer.training:
            return batch
        x, y, index = batch
        return [*self.mixup(x, y), index]

    def rows(self, logits, y):
        return F.cross_entropy(logits, y, reduction="none")


def last(batch):
    return batch[-1].tolist()


def test_mixed_batches_are_followed_where_sample_ids_say_whose_row_is_whose():
    case = Case("Mixup", {"net": vit}, loader={"batch_size": 6, "drop_last": True}, make=Mixing, **PICTURES)
    assert_influence_is_the_derivative(case, 1e-6, sample_ids=last, keep_batches=True)
