# SPDX-License-Identifier: Apache-2.0
"""A module and its data, as a LightningCLI takes them: points in two clusters, twenty with a wrong label."""

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class TwoClusters(LightningDataModule):
    """Points of two classes.

    Args:
        num: How many for training.
        num_wrong: How many of these, the first ones, have the other class's label.
        batch_size: Points a batch.
    """

    def __init__(self, num: int = 400, num_wrong: int = 20, batch_size: int = 20):
        super().__init__()
        self.num, self.num_wrong, self.batch_size = num, num_wrong, batch_size

    def setup(self, stage: str) -> None:
        source = torch.Generator().manual_seed(0)
        label = torch.randint(0, 2, (self.num + 400,), generator=source)
        point = torch.randn(len(label), 2, generator=source) + 3 * label[:, None]
        label[: self.num_wrong] = 1 - label[: self.num_wrong]
        self.train = TensorDataset(point[: self.num], label[: self.num])
        self.val = TensorDataset(point[self.num : -200], label[self.num : -200])
        self.test = TensorDataset(point[-200:], label[-200:])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=100)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=100)


class Classifier(LightningModule):
    """A small network.

    Args:
        width: Of its hidden layer.
        lr: Learning rate.
    """

    def __init__(self, width: int = 16, lr: float = 0.1):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 2))
        self.lr = lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def error_rate(module: Classifier, batch: list[Tensor]) -> Tensor:
    """A smooth count of mistakes: how probable the other class is to the network."""
    chance = module.net(batch[0]).softmax(1)
    return 1 - chance.gather(1, batch[1][:, None]).mean()
