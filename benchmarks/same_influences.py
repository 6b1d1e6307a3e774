# SPDX-License-Identifier: Apache-2.0
"""Whether a change to the package leaves every influence as it was, to the last bit.

    python benchmarks/same_influences.py record DIR    # with the package as it was: one file a configuration
    python benchmarks/same_influences.py compare DIR   # with the package as it is: the same again, held against them

Small trainings on the CPU go through the optimizers, engines, precisions and options. Files are compared byte for
byte, which means something only on the machine, and with the torch, that they were recorded with. Only the public
interface is used, so that one script serves both sides of a change.
"""

import argparse
import csv
import logging
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

import lightning_sgdclean
from lightning_sgdclean import SGDInfluence, counterfactual, retrace

NUM_FEATURES, NUM_CLASSES = 16, 3
QUIET = {"accelerator": "cpu", "logger": False, "enable_model_summary": False, "enable_progress_bar": False}
MOMENTUM = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)


def data(num: int, seed: int) -> TensorDataset:
    """Points around one centre for each class, with some wrong labels."""
    source = torch.Generator().manual_seed(seed)
    y = torch.arange(num) % NUM_CLASSES
    x = torch.randn(num, NUM_FEATURES, generator=source) + F.one_hot(y, NUM_FEATURES)
    y[::7] = (y[::7] + 1) % NUM_CLASSES
    return TensorDataset(x, y)


class Noisy(TensorDataset):
    """Other data each time they are asked for."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + 0.3 * torch.randn(NUM_FEATURES), y


TRAIN, VAL = data(45, 1), data(22, 2)
NESTED = ConcatDataset([Subset(TRAIN, range(20, 40)), Subset(Subset(TRAIN, range(15)), range(0, 15, 2))])


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(NUM_FEATURES, 8), nn.Tanh(), nn.Linear(8, NUM_CLASSES))


def convolutional() -> nn.Module:
    """BatchNorm, whose running statistics are followed, and dropout."""
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.GELU()),
        *(nn.Flatten(), nn.Dropout(0.3), nn.Linear(64, NUM_CLASSES)),
    )


class Classifier(pl.LightningModule):
    def __init__(self, net: Callable[[], nn.Module], optimizer: Callable[..., torch.optim.Optimizer]):
        super().__init__()
        self.net, self.optimizer = net(), optimizer

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters())
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def loss_on(*labels: int) -> Callable[..., Any]:
    """An objective: the mean loss of the validation samples with these labels."""

    def objective(module, batch):
        x, y = batch
        chosen = torch.isin(y, torch.tensor(labels, device=y.device))
        return F.cross_entropy(module.net(x[chosen]), y[chosen]), int(chosen.sum())

    return objective


def from_fit(run_dir: Path, path: Path, training: dict[str, Any]) -> None:
    """The ranking that the fit wrote."""
    shutil.copy(run_dir / "influence.csv", path)


def from_retrace(run_dir: Path, path: Path, training: dict[str, Any], **options: Any) -> None:
    """The ranking of a retrace after the fit."""
    retrace(run_dir, **training, **options).save(path)


def from_leaving_out(run_dir: Path, path: Path, training: dict[str, Any], **options: Any) -> None:
    """Samples that are really left out."""
    found = counterfactual(run_dir, **training, **options)
    columns = found.without, found.values.tolist(), found.differences.tolist(), found.predicted.tolist()
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("without", "value", "difference", "predicted"), *zip(*columns, strict=True)])


@dataclass(frozen=True)
class Configuration:
    """A training, what the callback and the Trainer are told besides, and where the influences are taken from."""

    influence: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    optimizer: Callable[..., torch.optim.Optimizer] = MOMENTUM
    net: Callable[[], nn.Module] = perceptron
    train: Dataset = TRAIN
    batch_size: int = 8  # so that the last batch of an epoch is short
    checkpoint: dict[str, Any] | None = None  # options of a ModelCheckpoint
    resumed_after: int | None = None  # epochs, from the checkpoint that they end with
    outcome: Callable[..., None] = from_fit

    def training(self) -> dict[str, Any]:
        """The module and the loaders, the same each time."""
        pl.seed_everything(1, verbose=False)
        return {
            "model": Classifier(self.net, self.optimizer),
            "train_dataloaders": DataLoader(self.train, self.batch_size, shuffle=True),
            "val_dataloaders": DataLoader(VAL, 10),
        }

    def fit(self, folder: Path, max_epochs: int, ckpt_path: Path | None = None) -> Path:
        """Train, in a Trainer and with a callback of their own; the run directory."""
        influence = SGDInfluence(**{"dirpath": folder / "run", "overwrite": True, "page": False} | self.influence)
        saving = [] if self.checkpoint is None else [pl.callbacks.ModelCheckpoint(folder, **self.checkpoint)]
        options = {"callbacks": [influence, *saving], "enable_checkpointing": bool(saving), **QUIET, **self.trainer}
        trainer = pl.Trainer(max_epochs=max_epochs, default_root_dir=folder, **options)
        trainer.fit(**self.training(), ckpt_path=ckpt_path)
        return influence.run_dir

    def write(self, path: Path) -> None:
        """Train, and write the influences to this file."""
        with tempfile.TemporaryDirectory() as name:
            folder, ckpt_path = Path(name), None
            if self.resumed_after is not None:
                self.fit(folder, self.resumed_after)
                ckpt_path = folder / "last.ckpt"
            run_dir = self.fit(folder, 4, ckpt_path)
            self.outcome(run_dir, path, self.training())


ALL = {"epochs": "all", "columns": ("loss", "by_epoch")}
DOUBLE, BF16 = {"precision": "64-true"}, {"precision": "bf16-mixed"}
ADAM, ADAMW = partial(torch.optim.Adam, lr=0.02, amsgrad=True, weight_decay=0.01), partial(torch.optim.AdamW, lr=0.02)
PLAIN, RMSPROP = partial(torch.optim.SGD, lr=0.2), partial(torch.optim.RMSprop, lr=0.01, momentum=0.5, centered=True)
ACCUMULATED = {"accumulate_grad_batches": 3, "gradient_clip_val": 0.3}  # the last window of an epoch is short
OBJECTIVES = {"all": loss_on(0, 1, 2), "class 0": loss_on(0), "others": loss_on(1, 2)}
EVERY_COLUMN = ("label", "prediction", "loss", "by_epoch", "relabel", "source")
CONFIGURATIONS = {
    "sgd": Configuration(ALL | {"snapshots": "every"}, DOUBLE),
    "page_and_labels": Configuration({"page": True, "mode": "max", "columns": ("label", "source")}),
    "finite": Configuration(ALL | {"curvature": "finite"}, DOUBLE),
    "finite_adam": Configuration(ALL | {"curvature": "finite"}, optimizer=ADAM, net=convolutional),
    "none": Configuration(ALL | {"curvature": "none"}),
    "sqrt_adam": Configuration(ALL | {"snapshots": "sqrt"}, optimizer=ADAM),
    "every_fifth_adamw": Configuration(ALL | {"snapshots": 5}, DOUBLE, ADAMW, convolutional),
    "batchnorm_dropout": Configuration(ALL, net=convolutional),
    "accumulated_clipped": Configuration(ALL, ACCUMULATED, net=convolutional, batch_size=6),
    "clipped_by_value": Configuration(ALL, {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"}),
    "kept_batches": Configuration(ALL | {"keep_batches": "auto"}, net=convolutional, train=Noisy(*TRAIN.tensors)),
    "objectives": Configuration({"epochs": 2, "objective": OBJECTIVES, "columns": EVERY_COLUMN}, train=NESTED),
    "best": Configuration({"at": "best", "columns": ("loss",)}, optimizer=PLAIN, checkpoint={"monitor": "val_loss"}),
    "resumed": Configuration(ALL, net=convolutional, checkpoint={"save_last": True}, resumed_after=2),
    "bf16": Configuration(ALL | {"retrace_precision": "run"}, BF16, net=convolutional),
    "bf16_in_float32": Configuration(ALL | {"retrace_precision": "float32"}, BF16, net=convolutional),
    "later_finite": Configuration(
        {"epochs": 3}, optimizer=ADAMW, outcome=partial(from_retrace, curvature="finite", epochs=2, columns=("loss",))
    ),
    "later_objectives": Configuration(
        {"epochs": "all"}, net=convolutional, outcome=partial(from_retrace, objective=OBJECTIVES, epochs=3)
    ),
    "verified_reranked": Configuration(ALL | {"verify": 6, "rerank": 4}, DOUBLE),
    "left_out": Configuration(
        {"epochs": "all"}, optimizer=ADAM, outcome=partial(from_leaving_out, epochs="all", without=[[0], [7, 14]])
    ),
    "rmsprop": Configuration(ALL, DOUBLE, RMSPROP),
    "adagrad": Configuration(ALL, optimizer=partial(torch.optim.Adagrad, lr=0.1), net=convolutional),
}


def difference(old: Path, new: Path) -> str | None:
    """The first line that is another one; None where the files are the same to the last byte."""
    before, after = (path.read_bytes().splitlines(True) if path.exists() else [] for path in (old, new))
    lines = enumerate(zip_longest(before, after), start=1)
    return next((f"line {n} was {was}, is {became}" for n, (was, became) in lines if was != became), None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=("record", "compare"))
    parser.add_argument("folder", metavar="DIR", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    print(f"with {Path(lightning_sgdclean.__file__).parent}", file=sys.stderr)  # which of two checkouts was it?
    is_record, all_same = given.do == "record", True
    if is_record:
        given.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        for name, configuration in CONFIGURATIONS.items():
            recorded, again = given.folder / f"{name}.csv", Path(temporary, f"{name}.csv")
            configuration.write(recorded if is_record else again)
            found = None if is_record else difference(recorded, again)
            verdict = "recorded" if is_record else f"DIFFERENT: {found}" if found else "same"
            print(f"{name:20} {verdict}", flush=True)
            all_same = all_same and found is None
    return 0 if all_same else 1


if __name__ == "__main__":
    sys.exit(main())
