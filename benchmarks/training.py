# SPDX-License-Identifier: Apache-2.0
"""One training of a task, as any Lightning user would write it, and what it is worth on the test data."""

import logging
import statistics
import warnings

import pytorch_lightning as pl
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from baselines.gradients import losses, probabilities
from silent import silent_trainer


class Classifier(pl.LightningModule):
    """Momentum, weight decay, and a learning rate that falls along a cosine."""

    def __init__(self, net, lr):
        super().__init__()
        self.net, self.lr = net, lr

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, weight_decay=5e-4)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Checkpoints(pl.Callback):
    """The network after each epoch, with the epoch's mean learning rate, as TracIn wants them."""

    def __init__(self):
        self.kept, self._rates = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_epoch_end(self, trainer, pl_module):
        state = {name: tensor.clone() for name, tensor in pl_module.net.state_dict().items()}
        self.kept.append((state, statistics.mean(self._rates)))
        self._rates = []


def module_of(task):
    return Classifier(task.build(), task.lr)


def loaders(task, train, val):
    """For training and validation; what is without augmentation and small needs no workers."""
    return DataLoader(TensorDataset(*train), task.batch, shuffle=True), DataLoader(TensorDataset(*val), 250)


def quiet():
    """Leave the terminal to the results."""
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.ERROR)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module="pytorch_lightning")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")


def fit(task, train, seed, val=None, callbacks=()):
    """The network trained on ``train = (inputs, labels)`` from ``seed``; it is in evaluation mode."""
    pl.seed_everything(seed, verbose=False)
    module = module_of(task)
    trainer = silent_trainer(task.epochs, list(callbacks), num_sanity_val_steps=1)
    train_loader, val_loader = loaders(task, train, val or train)
    trainer.fit(module, train_loader, *([val_loader] if val else []))
    return module.net.eval()


def worth(net, test):
    """Accuracy and mean loss on the test data."""
    right = probabilities(net, test[0]).argmax(1) == test[1]
    return {"accuracy": float(right.float().mean()), "loss": float(losses(net, test).mean())}
