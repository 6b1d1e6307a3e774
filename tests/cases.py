# SPDX-License-Identifier: Apache-2.0
"""Small, smooth trainings whose truth can be had, and the module that they train."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

NUM_TRAIN, NUM_VAL, NUM_CLASSES = 23, 11, 3


def data(num: int, seed: int) -> TensorDataset:
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(num, 5, generator=source)
    y = torch.randint(0, NUM_CLASSES, (num,), generator=source)
    return TensorDataset(x, y, torch.arange(num))


TRAIN, VAL = data(NUM_TRAIN, 1), data(NUM_VAL, 2)


def sgd(params, **options):
    return torch.optim.SGD(params, **{"lr": 0.1, **options})


def adam(params, **options):
    return torch.optim.Adam(params, **{"lr": 0.02, "eps": 1e-4, **options})


def adamw(params, **options):
    return torch.optim.AdamW(params, **{"lr": 0.02, "eps": 1e-4, "weight_decay": 0.1, **options})


def warm_up(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 3, 1.0))  # starts at zero


def perceptron(norm=False, dropout=0.0):
    return nn.Sequential(
        nn.Linear(5, 8, bias=not norm),
        nn.BatchNorm1d(8) if norm else nn.Identity(),
        nn.Tanh(),
        nn.Dropout(dropout),
        nn.Linear(8, NUM_CLASSES),
    )


class Plain(pl.LightningModule):
    """An ordinary classifier. With ``sample_weights`` set it is its own weighted twin."""

    def __init__(
        self,
        make_optimizer=sgd,
        options=None,
        norm=False,
        dropout=0.0,
        two_groups=False,
        warmup=False,
        net=None,
        schedule=None,
    ):
        super().__init__()
        torch.manual_seed(3)
        self.net = perceptron(norm, dropout) if net is None else net()
        self.make_optimizer, self.options = make_optimizer, options or {}
        self.two_groups, self.make_scheduler = two_groups, warm_up if warmup else schedule
        self.sample_weights = None

    def loss(self, batch, reduction="mean"):
        x, y, _ = batch
        return F.cross_entropy(self.net(x), y, reduction=reduction)

    def training_step(self, batch, batch_idx):
        if self.sample_weights is None:
            loss = self.loss(batch)
        else:
            loss = (self.loss(batch, "none") * self.sample_weights[batch[-1]]).mean()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        groups = self.parameters()
        if self.two_groups:
            groups = [
                {"params": self.net[0].parameters(), "lr": 0.03},
                {"params": [p for part in self.net[1:] for p in part.parameters()], "weight_decay": 0.05},
            ]
        optimizer = self.make_optimizer(groups, **self.options)
        if self.make_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make_scheduler(optimizer), "interval": "step"},
        }


class Remembering(Plain):
    """Notes the samples of every batch, as the dataset itself tells them."""

    def __init__(self):
        super().__init__()
        self.order = []

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.order.append(batch[2].tolist())


@dataclass
class Case:
    """One training: how the module is made, what the Trainer is told besides, and the data.

    A module of another class than ``Plain`` has ``loss(batch, reduction)``, whose rows are one a sample,
    and ``sample_weights``; a data set's last column numbers its samples.
    """

    name: str
    module: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    loader: dict[str, Any] = field(default_factory=dict)
    make: Callable[..., Any] = Plain
    train: TensorDataset = TRAIN
    val: TensorDataset = VAL
    callbacks: Callable[[], list[Any]] = list

    def __str__(self) -> str:
        return self.name


def loaders(train=TRAIN, val=VAL, **options):
    return DataLoader(train, **{"batch_size": 5, "shuffle": True, **options}), DataLoader(val, batch_size=4)


def quiet_trainer(callbacks=(), package=pl, **options):
    return package.Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": 3,
            "logger": False,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "precision": "64-true",
            "num_sanity_val_steps": 0,
            "callbacks": list(callbacks),
            **options,
        }
    )


def fit(case: Case, callback=None, weights=None):
    """Train a case; the module afterwards."""
    pl.seed_everything(1, verbose=False)
    module = case.make(**case.module)
    module.sample_weights = weights
    train, val = loaders(case.train, case.val, **case.loader)
    callbacks = [*([callback] if callback else []), *case.callbacks()]
    quiet_trainer(callbacks, **case.trainer).fit(module, train, val)
    return module


def objective(module, val=VAL) -> float:
    """Mean validation loss of a module, in float64, over the batches that the Trainer validates on."""
    module.double().eval()
    total = 0.0
    with torch.no_grad():
        for batch in DataLoader(val, batch_size=4):
            total += len(batch[0]) * module.loss([t.double() if t.is_floating_point() else t for t in batch]).item()
    return total / len(val)


class Overflowing(Plain):
    """Its loss overflows at the third batch of the second epoch, as a scaled one does now and then."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if (self.current_epoch, batch_idx) == (1, 2) else loss


class Scaling(MixedPrecision):
    """A GradScaler around float64, so that truth can be had."""

    def __init__(self):
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))

    def autocast_context_manager(self):
        return torch.autocast("cpu", enabled=False)

    def convert_module(self, module):
        return module.double()

    def convert_input(self, data):
        return [tensor.double() if tensor.is_floating_point() else tensor for tensor in data]


def scaled(name, module, **trainer):
    return Case(name, module, {"precision": None, "plugins": [Scaling()], **trainer}, make=Overflowing)


CASES = {
    case.name: case
    for case in [
        Case("sgd"),
        Case("momentum", {"options": {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}}),
        Case("nesterov", {"options": {"momentum": 0.9, "nesterov": True}, "dropout": 0.3}),
        Case("batchnorm", {"norm": True, "options": {"momentum": 0.9}, "dropout": 0.2}),
        Case("batchnorm adam", {"norm": True, "make_optimizer": adam}),
        Case("adam decay", {"make_optimizer": adam, "options": {"weight_decay": 0.05}}),
        Case("adam amsgrad", {"make_optimizer": adam, "options": {"amsgrad": True}}),
        Case("adamw", {"make_optimizer": adamw}),
        Case("two groups", {"two_groups": True, "options": {"momentum": 0.5}}),
        Case("warm-up from zero", {"warmup": True, "options": {"momentum": 0.9, "weight_decay": 0.01}}),
        Case("warm-up from zero adamw", {"warmup": True, "make_optimizer": adamw}),
        Case("accumulate 2", {"norm": True, "options": {"momentum": 0.9}}, {"accumulate_grad_batches": 2}),
        Case("accumulate 3 adam", {"make_optimizer": adam}, {"accumulate_grad_batches": 3}),
        Case("clip norm", {"options": {"momentum": 0.9}}, {"gradient_clip_val": 0.3}),
        Case(
            "clip value",
            {"options": {"momentum": 0.9}},
            {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
        ),
        Case("mid-epoch end", {"options": {"momentum": 0.9}}, {"max_steps": 12}),
        Case("limited", {}, {"limit_train_batches": 3}),
        Case("workers", {"dropout": 0.2}, {}, {"num_workers": 2}),
    ]
}
