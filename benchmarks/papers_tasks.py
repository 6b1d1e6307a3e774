# SPDX-License-Identifier: Apache-2.0
"""The small tasks on which the 2019 paper compares influences with leaving one out (its Section 7.1).

Settings are those of the authors' published experiment: 200 samples to train on and 200 to validate, standardized;
logistic regression, and a network with two hidden layers of 8 ReLUs; plain SGD with an L2 penalty. Adult's columns are
simplified a little less than theirs were.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
from sklearn.linear_model import LogisticRegressionCV
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.nn import functional as F

NUM = 200
NUMBERS = (0, 2, 4, 10, 11, 12)  # Adult's numeric columns; 14 is the income
SCHOOL = {"1st-4th", "5th-6th", "7th-8th", "9th", "10th", "11th", "12th"}


@dataclass(frozen=True)
class Setting:
    """A data set, a model, and how the paper trained it."""

    words: str
    load: Callable
    is_network: bool
    epochs: int
    batch: int
    paper: tuple  # tau and Jaccard of SGD-influence, then of influence functions


def ones_and_sevens(folder):
    with np.load(folder / "mnist.npz", allow_pickle=False) as data:
        rows = np.isin(data["y_train"], (1, 7))
        return data["x_train"][rows].reshape(-1, 784) / 255, data["y_train"][rows] == 7


def adult(folder):
    with np.load(folder / "adult.npz", allow_pickle=False) as data:
        table = pd.DataFrame(np.concatenate([data["train"], data["test"]]))
    income = (table.pop(14) == ">50K").to_numpy()
    numbers = table[list(NUMBERS)].astype(float)
    numbers[2] = np.log1p(numbers[2])
    words = table.drop(columns=list(NUMBERS))
    words[3] = words[3].where(~words[3].isin(SCHOOL), "school")
    words[13] = words[13] == "United-States"
    return np.hstack([numbers, pd.get_dummies(words.astype(str))]).astype(float), income


SETTINGS = {
    "adult_linear": Setting("Adult, logistic regression", adult, False, 20, 5, (0.93, 0.80, 0.85, 0.60)),
    "mnist_linear": Setting(
        "MNIST 1 and 7, logistic regression", ones_and_sevens, False, 5, 5, (0.95, 0.83, 0.7, 0.41)
    ),
    "adult_network": Setting("Adult, network", adult, True, 10, 20, (0.75, 0.59, 0.54, 0.32)),
    "mnist_network": Setting("MNIST 1 and 7, network", ones_and_sevens, True, 10, 20, (0.45, 0.37, 0.27, 0.27)),
}


def samples(setting, folder: Path, seed):
    """Training and validation samples: ``((inputs, labels), (inputs, labels))``, 200 each."""
    inputs, labels = setting.load(folder)
    x, x_val, y, y_val = train_test_split(inputs, labels, train_size=NUM, test_size=NUM, random_state=seed)
    scaler = StandardScaler().fit(x)

    def tensors(some, of):
        return torch.from_numpy(scaler.transform(some)).float(), torch.from_numpy(of).float()

    return tensors(x, y), tensors(x_val, y_val)


def penalty_of(setting, train, seed):
    """Weight of half the squared length of the parameters; for the linear model by cross-validation."""
    if setting.is_network:
        return 0.001
    search = LogisticRegressionCV(
        random_state=seed,
        fit_intercept=False,
        cv=5,
        max_iter=1000,
        l1_ratios=(0,),
        scoring="accuracy",
        use_legacy_attributes=False,
    )
    return 1 / (search.fit(train[0].numpy(), train[1].numpy()).C_ * NUM)


class PapersModel(pl.LightningModule):
    """Binary cross entropy and an L2 penalty; the linear model's rate falls as one over the root of the step."""

    def __init__(self, setting, num_inputs, penalty):
        super().__init__()
        self.setting, self.penalty = setting, penalty
        sizes = (num_inputs, 8, 8, 1) if setting.is_network else (num_inputs, 1)
        layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
        self.net = nn.Sequential(*layers[:-1])

    def training_step(self, batch, batch_idx):
        loss = F.binary_cross_entropy_with_logits(self.net(batch[0])[:, 0], batch[1])
        return loss + self.penalty / 2 * sum(param.square().sum() for param in self.parameters())

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.binary_cross_entropy_with_logits(self.net(batch[0])[:, 0], batch[1]))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        if self.setting.is_network:
            return optimizer
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1) ** 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
