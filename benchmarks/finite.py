# SPDX-License-Identifier: Apache-2.0
"""How far ``curvature="finite"`` can be trusted: its radius, and what it does about kinks that it crosses.

Small networks on digits are trained and recorded. A few samples of each are really left out, and each engine's
influences are compared with what came of it.

    python benchmarks/finite.py                  # prints the tables; some minutes
    python benchmarks/finite.py --write-docs     # also writes results/finite_cpu.json and docs/finite.md
"""

import argparse
import json
import logging
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_sgdclean import SGDInfluence, counterfactual, retrace
from lightning_sgdclean.agreement import kendall_tau
from silent import silent_trainer

HERE = Path(__file__).parent
DIGITS = HERE.parent / "examples" / "data" / "mnist_8k.npz"
RESULT, PAGE = HERE / "results" / "finite_cpu.json", HERE.parent / "docs" / "finite.md"
NUM_TRAIN, NUM_VAL, NUM_LEFT_OUT, BATCH, EPOCHS = 240, 200, 32, 20, 2
RADII = (0.003, 0.01, 0.03, 0.1)


def perceptron(activation):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 32), activation(), nn.Linear(32, 32), activation(), nn.Linear(32, 10)
    )


def convolutional(activation):
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2), activation(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3), activation(), nn.Flatten(),
        nn.Linear(16 * 4 * 4, 10),
    )  # fmt: skip


NETWORKS = {
    "perceptron, ReLU": lambda: perceptron(nn.ReLU),
    "perceptron, GELU": lambda: perceptron(nn.GELU),
    "convolutions, ReLU": lambda: convolutional(nn.ReLU),
}
OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.001),
}


class Digits(pl.LightningModule):
    def __init__(self, network, optimizer):
        super().__init__()
        self.net, self.optimizer = NETWORKS[network](), optimizer

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return OPTIMIZERS[self.optimizer](self.net.parameters())


def loaders(seed):
    with np.load(DIGITS, allow_pickle=False) as data:
        images, labels = data["x_train"], data["y_train"]
    rows = np.random.default_rng(seed).permutation(len(labels))[: NUM_TRAIN + NUM_VAL]
    x = torch.from_numpy(images[rows]).reshape(-1, 1, 28, 28).float() / 255
    y = torch.from_numpy(labels[rows]).long()
    train, val = TensorDataset(x[:NUM_TRAIN], y[:NUM_TRAIN]), TensorDataset(x[NUM_TRAIN:], y[NUM_TRAIN:])
    return DataLoader(train, BATCH, shuffle=True), DataLoader(val, NUM_VAL)


def one_run(network, optimizer, seed, folder):
    """Tau of each engine with leaving out, its largest error, and how many batches were bent."""
    pl.seed_everything(seed, verbose=False)
    train, val = loaders(seed)
    callback = SGDInfluence(epochs="all", page=False, verify=0, dirpath=folder / "run")
    silent_trainer(EPOCHS, [callback]).fit(Digits(network, optimizer), train, val)
    data = {"train_dataloaders": train, "val_dataloaders": val, "epochs": "all"}
    chosen = np.random.default_rng(seed).choice(NUM_TRAIN, NUM_LEFT_OUT, replace=False).tolist()
    left_out = counterfactual(callback.run_dir, Digits(network, optimizer), without=[[one] for one in chosen], **data)
    real = np.array(left_out.differences)
    settings = {"exact": {"curvature": "exact"}}
    settings |= {f"finite {r}": {"curvature": "finite", "finite_radius": r} for r in RADII}
    found = {}
    for name, options in settings.items():
        ranking = retrace(callback.run_dir, Digits(network, optimizer), verify=0, **options, **data)
        by_id = dict(zip(ranking.sample_id.tolist(), ranking.influence.tolist(), strict=True))
        predicted = np.array([by_id[one] for one in chosen])
        found[name] = {
            "tau": float(kendall_tau(predicted, real)),
            "error": float(np.abs(predicted - real).max() / np.abs(real).max()),
            "by_exact": ((getattr(ranking, "summary", None) or {}).get("finite") or {}).get("by_exact", 0),
        }
    return found


def measured(seeds):
    found = {}
    for network in NETWORKS:
        for optimizer in OPTIMIZERS:
            runs = []
            for seed in range(seeds):
                with tempfile.TemporaryDirectory() as folder:
                    runs.append(one_run(network, optimizer, seed, Path(folder)))
            found[f"{network}, {optimizer}"] = {
                name: {
                    "tau": round(float(np.mean([run[name]["tau"] for run in runs])), 3),
                    "tau_deviation": round(float(np.std([run[name]["tau"] for run in runs])), 3),
                    "largest_error": round(float(np.max([run[name]["error"] for run in runs])), 2),
                    "by_exact": round(float(np.mean([run[name]["by_exact"] for run in runs])), 1),
                }
                for name in runs[0]
            }
            print(network, optimizer, json.dumps(found[f"{network}, {optimizer}"]), flush=True)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--write-docs", action="store_true")
    arguments = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    result = {"seeds": arguments.seeds, "steps": EPOCHS * NUM_TRAIN // BATCH, "tasks": measured(arguments.seeds)}
    if arguments.write_docs:
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
