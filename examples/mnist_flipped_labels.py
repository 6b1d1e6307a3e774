# SPDX-License-Identifier: Apache-2.0
"""Find flipped labels in MNIST and train again without them.

Every tenth training label is replaced by a wrong one. A small CNN trains on that as any Lightning
module does, the callback ranks the training digits by influence on the validation loss, and two more
trainings show what it is worth: one without the most harmful digits, one without as many random ones.

    python examples/mnist_flipped_labels.py

Data: 6,000 training and 2,000 test digits that lie in ``data/``; nothing is downloaded.
"""

import argparse
import logging
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from lightning_sgdclean import Ranking, SGDInfluence

DATA = Path(__file__).parent / "data" / "mnist_8k.npz"
BATCH_SIZE = 64


class DigitNet(pl.LightningModule):
    """An ordinary image classifier. Nothing in it knows of the callback."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.GELU(),
            nn.AvgPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.GELU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.1),
            nn.Linear(16 * 7 * 7, 64),
            nn.GELU(),
            nn.Linear(64, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        self.log("val_loss", F.cross_entropy(logits, labels))
        self.log("val_accuracy", (logits.argmax(1) == labels).float().mean())

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("test_error", (self(images).argmax(1) != labels).float().mean())

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=1e-4)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def load_digits(samples: int) -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """The first ``samples`` training digits; 1,000 test digits for validation; 1,000 others for the test."""

    def dataset(images: np.ndarray, labels: np.ndarray) -> TensorDataset:
        scaled = (torch.from_numpy(images).unsqueeze(1) / 255 - 0.1307) / 0.3081
        return TensorDataset(scaled, torch.from_numpy(labels).long())

    with np.load(DATA, allow_pickle=False) as data:
        train = dataset(data["x_train"][:samples], data["y_train"][:samples])
        x_test, y_test = data["x_test"], data["y_test"]
    return train, dataset(x_test[:1000], y_test[:1000]), dataset(x_test[1000:], y_test[1000:])


def flip_labels(clean: TensorDataset, share: float, seed: int) -> tuple[TensorDataset, np.ndarray]:
    """Replace a share of the labels by another class; returns the new dataset and the flipped positions."""
    random = np.random.default_rng(seed)
    images, labels = clean.tensors
    flipped = np.sort(random.choice(len(labels), round(share * len(labels)), replace=False))
    noisy = labels.clone()
    noisy[flipped] = (labels[flipped] + torch.from_numpy(random.integers(1, 10, len(flipped)))) % 10
    return TensorDataset(images, noisy), flipped


def fit_and_test(
    name: str,
    train: Dataset,
    validation: Dataset,
    test: Dataset,
    args: argparse.Namespace,
    callbacks: Sequence[pl.Callback] = (),
) -> tuple[pl.Trainer, float]:
    """One training from the same seed; returns its Trainer and the share of test digits it gets wrong."""
    started = time.perf_counter()
    pl.seed_everything(args.seed, verbose=False)
    model = DigitNet()
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=CSVLogger("runs", name=f"mnist_{name}"),
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, DataLoader(train, BATCH_SIZE, shuffle=True), DataLoader(validation, 250))
    test_error = trainer.test(model, DataLoader(test, 250), verbose=False)[0]["test_error"]
    print(f"  {len(train):5} digits, {args.epochs} epochs: {time.perf_counter() - started:.0f} s", flush=True)
    return trainer, test_error


def without_random(dataset: Dataset, drop: int, seed: int) -> Subset:
    """The dataset without ``drop`` samples picked by chance."""
    kept = np.random.default_rng(seed + 1).permutation(len(dataset))[drop:]
    return Subset(dataset, np.sort(kept).tolist())


def flipped_among_worst(ranking: Ranking, flipped: np.ndarray, share: float) -> tuple[int, int]:
    """How many samples make up that share of the ranking, and how many of the most harmful are flipped."""
    count = round(share * len(ranking.sample_id))
    return count, int(np.isin(ranking.harmful(count), flipped).sum())


def print_found(found: dict[float, tuple[int, int]], chance: float) -> None:
    """Table of the flipped labels among the most harmful samples."""
    print(f"\n{'most harmful':<22}{'flipped':>10}{'share':>9}{'by chance':>12}")
    for share, (count, hits) in found.items():
        print(f"{f'{share:.0%} = {count} digits':<22}{hits:>10}{hits / max(count, 1):>9.0%}{chance:>12.0%}")


def print_errors(errors: dict[str, tuple[int, float]]) -> None:
    """Table of the test errors."""
    print(f"\n{'trained on':<32}{'digits':>8}{'test error':>13}")
    for name, (digits, error) in errors.items():
        print(f"{name:<32}{digits:>8}{error:>13.1%}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Find flipped labels in MNIST and train again without them.")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of each training (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of flips, weights and order (%(default)s)")
    parser.add_argument("--flip", type=float, default=0.1, help="share of labels flipped (%(default)s)")
    parser.add_argument("--drop", type=int, default=600, help="digits to train without (%(default)s)")
    parser.add_argument("--samples", type=int, default=6000, help="training digits used (%(default)s)")
    args = parser.parse_args(argv)
    if not 0 <= args.drop < args.samples <= 6000:
        parser.error("expected 0 <= --drop < --samples <= 6000")
    return args


def main(argv: Sequence[str] | None = None) -> dict:
    """Run the demo.

    Returns:
        ``found`` (share of the ranking to number of samples and of flipped ones among them), ``errors``
        (training set to number of samples and test error) and ``csv``, the path of the ranking.
    """
    args = parse(argv)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)

    clean, validation, test = load_digits(args.samples)
    train, flipped = flip_labels(clean, args.flip, args.seed)
    print(f"{len(train)} training digits, {len(flipped)} of them with a flipped label")

    print("Training on all and retracing the training:", flush=True)
    influence = SGDInfluence(monitor="val_loss", epochs="all")
    trainer, error_all = fit_and_test("all", train, validation, test, args, [influence])
    ranking = influence.ranking
    csv = Path(trainer.log_dir) / "sgd_influence" / "influence.csv"

    found = {share: flipped_among_worst(ranking, flipped, share) for share in (0.05, 0.1)}
    print_found(found, len(flipped) / len(train))

    print("\nTraining again, without the most harmful digits and without random ones:", flush=True)
    cleansed = ranking.keep(train, drop=args.drop)
    _, error_cleansed = fit_and_test("without_harmful", cleansed, validation, test, args)
    thinned = without_random(train, args.drop, args.seed)
    _, error_thinned = fit_and_test("without_random", thinned, validation, test, args)
    errors = {
        "all": (len(train), error_all),
        f"all but the {args.drop} most harmful": (len(cleansed), error_cleansed),
        f"all but {args.drop} random ones": (len(thinned), error_thinned),
    }
    print_errors(errors)

    print(f"\nThe whole ranking: {csv}")
    return {"found": found, "errors": errors, "csv": csv}


if __name__ == "__main__":
    main()
