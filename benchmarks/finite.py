# SPDX-License-Identifier: Apache-2.0
"""How far ``curvature="finite"`` can be trusted: its radius, and what it does where differences cannot be trusted.

Small networks on digits are trained and recorded. A few samples of each are really left out, and each engine's
influences are compared with what came of it.

    python benchmarks/finite.py                  # prints the tables; some minutes
    python benchmarks/finite.py --write-docs     # also writes results/finite_cpu.json and docs/finite.md
"""

import argparse
import json
import logging
import math
import tempfile
import warnings
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_sgdclean import SGDInfluence, counterfactual, retrace
from lightning_sgdclean.adjoint import curvature
from lightning_sgdclean.agreement import kendall_tau
from lightning_sgdclean.base.errors import NonFiniteError
from silent import silent_trainer

HERE = Path(__file__).parent
DIGITS = HERE.parent / "examples" / "data" / "mnist_8k.npz"
RESULT, PAGE = HERE / "results" / "finite_cpu.json", HERE.parent / "docs" / "finite.md"
NUM_TRAIN, NUM_VAL, NUM_LEFT_OUT, BATCH, EPOCHS = 240, 200, 32, 20, 2
RADII, PLAIN = (0.003, 0.01, 0.03, 0.1), (0.01, 0.03)


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


@contextmanager
def plain_differences():
    """Differences along the whole of ``c``, trusted everywhere: what is done without the two remedies."""
    live, bent = curvature._Difference._live, curvature._Difference._is_bent
    curvature._Difference._live = lambda self, cotangent: cotangent
    curvature._Difference._is_bent = lambda self, *_: False
    try:
        yield
    finally:
        curvature._Difference._live, curvature._Difference._is_bent = live, bent


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
    settings = {"exact": ({"curvature": "exact"}, nullcontext())}
    settings |= {f"{r}": ({"curvature": "finite", "finite_radius": r}, nullcontext()) for r in RADII}
    settings |= {f"{r}, plain": ({"curvature": "finite", "finite_radius": r}, plain_differences()) for r in PLAIN}
    found = {}
    for name, (options, context) in settings.items():
        with context, suppress(NonFiniteError):
            found[name] = {"tau": math.nan, "error": math.inf, "by_exact": 0}
            ranking = retrace(callback.run_dir, Digits(network, optimizer), verify=0, **options, **data)
            by_id = dict(zip(ranking.sample_id.tolist(), ranking.influence.tolist(), strict=True))
            predicted = np.array([by_id[one] for one in chosen])
            found[name] = {
                "tau": float(kendall_tau(predicted, real)),
                "error": float(np.abs(predicted - real).max() / np.abs(real).max()),
                "by_exact": (ranking.summary["finite"] or {}).get("by_exact", 0),
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
                    "tau": round(float(np.nanmean([run[name]["tau"] for run in runs])), 3),
                    "tau_deviation": round(float(np.nanstd([run[name]["tau"] for run in runs])), 3),
                    "largest_error": round(float(np.max([run[name]["error"] for run in runs])), 2),
                    "by_exact": round(float(np.mean([run[name]["by_exact"] for run in runs])), 1),
                }
                for name in runs[0]
            }
            print(network, optimizer, json.dumps(found[f"{network}, {optimizer}"]), flush=True)
    return found


WORDS = """# How far finite differences can be trusted

`curvature="finite"` takes the Hessian's product as a difference of two gradients, at a distance of `finite_radius`
times the length of the parameters. Too small a radius drowns in rounding and in the kinks of ReLU and max-pooling,
too large a one bends.

Under Adam it takes two remedies to be of use on networks with ReLU ([how](method.md#engines)): the move leaves out
what the batch's gradient does not know of, and batches whose loss is not what slope and curvature say are taken by
the exact engine. *Plain* is without them.

{runs} trainings of each kind on 240 digits of MNIST, {steps} steps of 20 samples. {left_out} samples of each are really
left out, one at a time. Kendall's tau between what that does and what is predicted, mean (standard deviation):

{taus}

The largest error of a prediction over all trainings, in units of the largest real effect in its training, and in
brackets how many of the {steps} batches the exact engine took, on average:

{errors}

Under Adam the largest errors are those of the derivative itself: it divides by the root of a second moment that may
be nearly zero, so that a tiny gradient seems to do much. Ask [`verify=`](trust.md) there.

`.03` is the default: it is the best or as good as the best everywhere but for smooth networks, where any radius up to
it does as well.

Repeat it by `python benchmarks/finite.py --write-docs`.
"""


def page(result):
    names = [*(f"{r}" for r in RADII), *(f"{r}, plain" for r in PLAIN)]

    def table(cell):
        head = ["| training | exact |" + "".join(f" {name} |" for name in names), "|---|" + "---|" * (1 + len(names))]
        rows = [
            f"| {task} |" + "".join(f" {cell(name, found[name])} |" for name in ("exact", *names))
            for task, found in result["tasks"].items()
        ]
        return "\n".join([*head, *rows])

    def error(name, found):
        by_exact = "" if name == "exact" or "plain" in name else f" ({found['by_exact']:.0f})"
        return f"{found['largest_error']:.3g}{by_exact}"

    return WORDS.format(
        runs=result["seeds"],
        steps=result["steps"],
        left_out=NUM_LEFT_OUT,
        taus=table(lambda name, found: f"{found['tau']:.2f} ({found['tau_deviation']:.2f})"),
        errors=table(error),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--write-docs", action="store_true")
    arguments = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    result = {"seeds": arguments.seeds, "steps": EPOCHS * NUM_TRAIN // BATCH, "tasks": measured(arguments.seeds)}
    print(page(result))
    if arguments.write_docs:
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
        PAGE.write_text(page(result))
