# SPDX-License-Identifier: Apache-2.0
"""A training that leaves checkpoints, and a kill in the middle of it."""

import os
import signal

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Sampler

from cases import TRAIN, VAL, Plain, adam, quiet_trainer
from lightning_sgdclean import SGDInfluence


class ByEpoch(Sampler):
    """An order that is a function of the epoch, as Lightning tells it."""

    def __init__(self):
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter(torch.randperm(len(TRAIN), generator=torch.Generator().manual_seed(self.epoch)).tolist())

    def __len__(self):
        return len(TRAIN)


class Kill(pl.Callback):
    """As ``kill -9`` does: no exception, no clean-up."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder, snapshots, callbacks=(), ckpt_path=None, max_epochs=4, **options):
    pl.seed_everything(1, verbose=False)
    callback = SGDInfluence("val_loss", epochs="all", snapshots=snapshots, dirpath=folder / "run", **options)
    saving = pl.callbacks.ModelCheckpoint(folder, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    settings = {"max_epochs": max_epochs, "precision": "32-true", "enable_checkpointing": True}
    trainer = quiet_trainer([callback, saving, *callbacks], **settings)
    loader = DataLoader(TRAIN, batch_size=5, sampler=ByEpoch())
    trainer.fit(Plain(adam, norm=True), loader, DataLoader(VAL, batch_size=4), ckpt_path=ckpt_path)
    return callback
