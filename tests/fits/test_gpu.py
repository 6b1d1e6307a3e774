# SPDX-License-Identifier: Apache-2.0
"""Runs in any precision on a GPU: replayed bit for bit, and ranked as in float32."""

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from cases import quiet_trainer
from lightning_sgdclean import SGDInfluence

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(144, 3)
        self.net = nn.Sequential(*layers)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def ranked_on_a_gpu(precision, folder):
    torch.manual_seed(1)
    data = TensorDataset(torch.randn(45, 1, 8, 8), torch.randint(0, 3, (45,)))
    callback = SGDInfluence(epochs="all", dirpath=folder, page=False)
    trainer = quiet_trainer([callback], max_epochs=2, precision=precision, accelerator="gpu", devices=1)
    trainer.fit(Net(), DataLoader(data, 8), DataLoader(data, 16))
    influence = np.zeros(len(data))
    influence[callback.ranking.sample_id] = callback.ranking.influence
    return influence, callback.summary["replay"]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
def test_every_precision_is_replayed_bit_for_bit_and_ranked_as_in_float32(precision, tmp_path):
    found, replay = ranked_on_a_gpu(precision, tmp_path / "run")
    assert replay["batches_bit_for_bit"] == replay["batches"] > 0
    expected, _ = ranked_on_a_gpu("32-true", tmp_path / "float32")
    assert np.corrcoef(found, expected)[0, 1] > 0.99
