# SPDX-License-Identifier: Apache-2.0
"""How often a ranking is doubted where its order is right, and where it is worth nothing.

    python benchmarks/trust.py [--seeds 20] [--kinds "ReLU"]    # half an hour; prints the tables of docs/trust.md

Small networks on 240 made-up pictures of four classes, a tenth of the labels drawn anew, over the whole training. The
truth is Kendall's tau with 32 samples that are really left out. What four of them would have led to is asked of the
same code as in a fit with ``verify="auto"``.
"""

import argparse
import statistics
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_sgdclean import SGDInfluence, retrace
from lightning_sgdclean.leave_out.outcome import Outcome
from lightning_sgdclean.leave_out.trust import card_of
from lightning_sgdclean.leave_out.verdict import Sizes
from lightning_sgdclean.ranking.agreement import kendall_tau
from silent import silent_trainer

NUM_TRAIN, NUM_VAL, NUM_CLASSES, NUM_LEFT_OUT, NUM_FEW = 240, 200, 4, 32, 4


def pictures(num, seed):
    source = torch.Generator().manual_seed(seed)
    centers = torch.randn(NUM_CLASSES, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = torch.randint(0, NUM_CLASSES, (num,), generator=source)
    x = centers[y] + 1.5 * torch.randn(num, 1, 8, 8, generator=source)
    anew = torch.rand(num, generator=source) < 0.1
    return TensorDataset(x, torch.where(anew, torch.randint(0, NUM_CLASSES, (num,), generator=source), y))


def perceptron(activation, norm=False, depth=2):
    sizes = [64, *[16] * depth]
    layers = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), *([nn.BatchNorm1d(after)] if norm else []), activation()]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(16, NUM_CLASSES))


def convolutional(activation, norm=True, depth=2):
    sizes = [1, *[8] * depth]
    layers = []
    for before, after in pairwise(sizes):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=not norm)]
        layers += [*([nn.BatchNorm2d(after)] if norm else []), activation()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, NUM_CLASSES))


class Classifier(pl.LightningModule):
    """A network and the optimizer it is trained by."""

    def __init__(self, kind):
        super().__init__()
        self.net, self.kind = kind.net(), kind

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        if self.kind.optimizer == "Adam":
            return torch.optim.Adam(self.parameters(), lr=self.kind.lr)
        return torch.optim.SGD(self.parameters(), lr=self.kind.lr, momentum=0.9)


@dataclass(frozen=True)
class Kind:
    """A kind of training; ``windows``: whether shorter windows are tried as well."""

    net: Any
    optimizer: str
    lr: float
    epochs: int = 3
    windows: bool = False


KINDS = {
    "perceptron, tanh, SGD 0.02": Kind(lambda: perceptron(nn.Tanh), "SGD", 0.02),
    "2 convolutions, GELU, Adam 0.003": Kind(lambda: convolutional(nn.GELU, False), "Adam", 0.003),
    "perceptron, ReLU, SGD 0.02": Kind(lambda: perceptron(nn.ReLU), "SGD", 0.02),
    "2 convolutions, BatchNorm, ReLU, SGD 0.02": Kind(lambda: convolutional(nn.ReLU), "SGD", 0.02),
    "the same, Adam 0.003": Kind(lambda: convolutional(nn.ReLU), "Adam", 0.003),
    "the same, Adam 0.003, 10 epochs": Kind(lambda: convolutional(nn.ReLU), "Adam", 0.003, 10),
    "4 convolutions, BatchNorm, ReLU, SGD 0.05": Kind(lambda: convolutional(nn.ReLU, depth=4), "SGD", 0.05),
    "6 convolutions, BatchNorm, ReLU, SGD 0.02": Kind(lambda: convolutional(nn.ReLU, depth=6), "SGD", 0.02),
    "6 convolutions, BatchNorm, ReLU, SGD 0.1": Kind(lambda: convolutional(nn.ReLU, depth=6), "SGD", 0.1),
    "10 convolutions, BatchNorm, ReLU, SGD 0.3": Kind(lambda: convolutional(nn.ReLU, depth=10), "SGD", 0.3, 3, True),
    "10 convolutions, BatchNorm, ReLU, SGD 1": Kind(lambda: convolutional(nn.ReLU, depth=10), "SGD", 1.0),
    "perceptron of 8, BatchNorm, ReLU, SGD 0.5": Kind(lambda: perceptron(nn.ReLU, True, 8), "SGD", 0.5, 3, True),
}


@dataclass(frozen=True)
class Window:
    """What was found over so many last epochs: the truth, and how far the adjoint had grown."""

    epochs: int
    tau: float
    growth: float


def measure(kind, seed, folder):
    """Whether few and many samples, and none at all, lead to doubts, and what the windows were like."""
    pl.seed_everything(seed, verbose=False)
    loaders = [
        DataLoader(pictures(NUM_TRAIN, 100 + seed), 20, shuffle=True),
        DataLoader(pictures(NUM_VAL, 500 + seed), 100),
    ]
    callback = SGDInfluence(epochs="all", verify=NUM_LEFT_OUT, page=False, dirpath=folder)
    silent_trainer(kind.epochs, [callback]).fit(Classifier(kind), *loaders)
    trust = callback.summary["trust"]
    factors = trust["adjoint_growth"]["factor"]
    windows = [Window(kind.epochs, trust["kendall_tau"], max(factors))]
    for epochs in range(1, kind.epochs) if kind.windows else ():
        found = retrace(
            folder,
            Classifier(kind),
            train_dataloaders=loaders[0],
            val_dataloaders=loaders[1],
            epochs=epochs,
            verify=NUM_LEFT_OUT,
        )
        is_real = ~np.isnan(found.columns["real"])
        tau = kendall_tau(found.influence[is_real], found.columns["real"][is_real])
        windows.append(Window(epochs, tau, max(factors[-epochs:])))
    few = with_few(trust)
    return {
        "windows": windows,
        "doubted": {4: not_to_be_trusted(few), 32: not_to_be_trusted(trust)},
        "wrong sizes": {4: bool(few["doubts"]), 32: bool(trust["doubts"])},
    }


def not_to_be_trusted(card):
    return card["verdict"].startswith("Do not trust")


def with_few(trust):
    """The card, had only a few samples been left out."""
    samples, sizes = trust["samples"], Sizes(**{name: trust[name] for name in Sizes.__dataclass_fields__})
    ends = [samples["stratum"].index("worst"), len(samples["id"]) - 1 - samples["stratum"][::-1].index("best")]
    rows = [*ends, *[row for row, kind in enumerate(samples["stratum"]) if kind == "random"][: NUM_FEW - 2]]
    by_id = {
        name: dict(zip((samples["id"][r] for r in rows), (samples[name][r] for r in rows), strict=True))
        for name in samples
    }
    noise = float("inf") if trust["noise_floor"] is None else trust["noise_floor"]
    return card_of("auto", sizes, Outcome(by_id["stratum"], by_id["predicted"], by_id["real"], [], noise, 0, "", 0.0))


def row(name, found):
    """A line of the table."""
    whole = [one["windows"][0] for one in found]
    taus, growth = [one.tau for one in whole], [one.growth for one in whole]
    shares = [f"{sum(one[what][num] for one in found)}" for what in ("doubted", "wrong sizes") for num in (4, 32)]
    numbers = f"{statistics.median(taus):.2f} ({min(taus):.2f} to {max(taus):.2f})"
    return f"| {name} | {numbers} | {statistics.median(growth):.2g} ({max(growth):.2g}) | {' | '.join(shares)} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--kinds", default="", help="only those whose name holds this")
    given = parser.parse_args()
    torch.set_num_threads(1)
    columns = ["training", "tau", "growth", "do not trust: of 4", "of 32", "any doubt: of 4", "of 32"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    windows = []
    for name, kind in KINDS.items():
        if given.kinds not in name:
            continue
        found = []
        for seed in range(given.seeds):
            with TemporaryDirectory() as folder:
                found.append(measure(kind, seed, Path(folder) / "run"))
        windows += [window for one in found for window in one["windows"] if kind.windows]
        print(row(name, found), flush=True)
    print("\n| growth over the window | windows | median tau | tau below 0.3 |\n|---|---|---|---|")
    bounds = [0.0, 3.0, 10.0, 30.0, 1000.0, float("inf")]
    for low, high in pairwise(bounds):
        taus = [one.tau for one in windows if low <= one.growth < high]
        if taus:
            num_low = sum(tau < 0.3 for tau in taus)
            print(f"| {low:g} to {high:g} | {len(taus)} | {statistics.median(taus):.2f} | {num_low} |")


if __name__ == "__main__":
    main()
