# SPDX-License-Identifier: Apache-2.0
"""Data whose wrong labels are known: MNIST with flips, and CIFAR-10 with the labels that people gave (CIFAR-10N).

A task's training, validation and test samples are disjoint. Validation and test have right labels; the first rank,
the second judge.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

NUM_VAL = 1000
Samples = tuple[Tensor, Tensor]  # inputs, labels


@dataclass(frozen=True)
class Data:
    """The data of one seed; ``wrong`` tells which training labels are."""

    train: Samples
    wrong: np.ndarray
    val: Samples
    test: Samples


@dataclass(frozen=True)
class Task:
    """What is trained on what, and how."""

    name: str
    words: str
    load: Callable[[Path, int, int], Data]  # folder, samples, seed
    build: Callable[[], nn.Sequential]
    num_train: int
    epochs: int
    lr: float
    batch: int = 64

    def data(self, folder: Path, seed: int) -> Data:
        return self.load(folder, self.num_train, seed)

    def smaller(self, num_train: int, epochs: int) -> "Task":
        """The task in little, for trying things out."""
        return replace(self, num_train=num_train, epochs=epochs)


def arrays(path):
    if not path.exists():
        raise SystemExit(f"{path} is missing. Fetch it with: python benchmarks/fetch_data.py --data {path.parent}")
    with np.load(path, allow_pickle=False) as data:
        return dict(data)


def samples(images, labels, mean, std):
    """Images ``(N, H, W, C)`` as standardized tensors ``(N, C, H, W)``, and labels."""
    scaled = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    scaled = (scaled - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    return scaled.contiguous(), torch.from_numpy(labels).long()


def flipped_mnist(folder, num_train, seed, share=0.1):
    """Digits; that share of the training labels is replaced by another class, drawn uniformly."""
    data, random = arrays(folder / "mnist.npz"), np.random.default_rng([seed, 0])
    rows = random.permutation(len(data["y_train"]))[:num_train]
    truth, wrong = data["y_train"][rows], np.zeros(num_train, bool)
    wrong[random.permutation(num_train)[: round(share * num_train)]] = True
    labels = np.where(wrong, (truth + random.integers(1, 10, num_train)) % 10, truth)
    order = random.permutation(len(data["y_test"]))

    def standardized(split, rows, labels):
        return samples(data[f"x_{split}"][rows][..., None], labels, (0.1307,), (0.3081,))

    val, test = (standardized("test", part, data["y_test"][part]) for part in (order[:NUM_VAL], order[NUM_VAL:]))
    return Data(standardized("train", rows, labels), wrong, val, test)


def cifar10n(kind):
    """CIFAR-10's images, the training labels those of a kind of annotation: ``aggre``, ``worse``, ``random1`` ..."""
    key = f"random_label{kind[-1]}" if kind.startswith("random") else f"{kind}_label"

    def load(folder, num_train, seed):
        data, people = arrays(folder / "cifar10_10k.npz"), arrays(folder / "cifar10n_labels.npz")
        random, truth = np.random.default_rng([seed, 0]), data["y_train"]
        if not np.array_equal(truth, people["clean_label"][: len(truth)]):
            raise SystemExit("The labels of CIFAR-10N do not belong to these images.")
        rows, order = random.permutation(len(truth)), random.permutation(len(data["y_test"]))
        train, unseen, val, test = rows[:num_train], rows[num_train:], order[:NUM_VAL], order[NUM_VAL:]
        labels = people[key][train]

        def standardized(images, labels):
            return samples(images, labels, (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))

        judges = np.concatenate([data["x_test"][test], data["x_train"][unseen]])
        return Data(
            standardized(data["x_train"][train], labels),
            labels != truth[train],
            standardized(data["x_test"][val], data["y_test"][val]),
            standardized(judges, np.concatenate([data["y_test"][test], truth[unseen]])),
        )

    return load


def digit_net():
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.GELU()),
        *(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.GELU()),
        *(nn.Flatten(), nn.Linear(784, 64), nn.GELU(), nn.Linear(64, 10)),
    )


def image_net():
    def block(inputs, outputs):
        conv = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        return conv, nn.BatchNorm2d(outputs), nn.ReLU()

    return nn.Sequential(*block(3, 16), *block(16, 32), *block(32, 64), nn.Flatten(), nn.Linear(1024, 10))


TASKS = {
    task.name: task
    for task in (
        Task("mnist", "MNIST, a tenth of the labels flipped", flipped_mnist, digit_net, 3000, 8, 0.05),
        Task("cifar10n_aggre", "CIFAR-10N, majority of three people", cifar10n("aggre"), image_net, 5000, 5, 0.05),
        Task("cifar10n_worse", "CIFAR-10N, worst of three people", cifar10n("worse"), image_net, 5000, 5, 0.05),
    )
}
