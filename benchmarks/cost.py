# SPDX-License-Identifier: Apache-2.0
"""What recording and retracing cost, as ratios to a training step measured in the same run.

    python benchmarks/cost.py [--rounds 2] [--write-docs]

The network is the 2019 paper's MNIST CNN, batch 64, inside ``Trainer.fit``. Recorded steps are measured
beside bare ones of the same fit (``recording_cost.py``). For the retrace, fits with and without the callback
alternate, three of each a round, so that a change in the machine's load meets both; a figure is a median over steps.
"""

import argparse
import json
import logging
import os
import platform
import statistics
import time
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

from cost_page import markdown
from lightning_sgdclean import SGDInfluence, retracing
from lightning_sgdclean.trajectory.store import Trajectory
from recording_cost import recording_ratio
from silent import silent_trainer

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "cost_cpu.json"
LR, BATCH, SMALL, NUM_TRAIN, NUM_VAL, EPOCHS = 0.05, 64, 4, 2048, 256, 2
RECORDED = {"record_small": (SMALL, "every"), "record": (BATCH, "every"), "record_sqrt": (BATCH, "sqrt")}
FREE = ("record_small", "record_sqrt")  # measured, too, while training leaves a core to the thread that writes
RECORDED_STEPS, RECORDED_DIGITS, TIMES = 2400, 5632, 4
# In the order of a round; the paper's way reads the last one's steps.
ENGINES = ("finite", "none", "gauss-newton", "exact")
OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=LR),
    "SGD, momentum": lambda params: torch.optim.SGD(params, lr=LR, momentum=0.9),
    "Adam": lambda params: torch.optim.Adam(params, lr=1e-3),
}


class PaperCNN(pl.LightningModule):
    """Two 5x5 convolutions of 20 channels and one linear layer."""

    def __init__(self, optimizer):
        super().__init__()
        torch.manual_seed(0)
        self.optimizer = optimizer
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(20, 20, 5), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(320, 10)),
        )

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return OPTIMIZERS[self.optimizer](self.parameters())


class Clock(pl.Callback):
    """Times from one batch's start to the next's, within an epoch."""

    def __init__(self):
        self.durations, self._last = [], None

    def on_train_epoch_start(self, *_):
        self._last = None

    def on_train_batch_start(self, *_):
        now = time.perf_counter()
        if self._last is not None:
            self.durations.append(now - self._last)
        self._last = now


def digits(num):
    """So many to train on, and others to validate."""
    with np.load(ROOT / "examples" / "data" / "mnist_8k.npz", allow_pickle=False) as data:
        x, y = data["x_train"][: num + NUM_VAL], data["y_train"][: num + NUM_VAL]
    images, labels = torch.from_numpy(x).unsqueeze(1) / 255, torch.from_numpy(y).long()
    return TensorDataset(images[:num], labels[:num]), TensorDataset(images[num:], labels[num:])


def fit(optimizer, train, val, callback=None):
    """Train; medians come from the durations of its steps, in seconds."""
    clock = Clock()
    pl.seed_everything(0, verbose=False)
    trainer = silent_trainer(EPOCHS, [clock, *([callback] if callback else [])])
    module = PaperCNN(optimizer)
    trainer.fit(module, DataLoader(train, BATCH, shuffle=True), DataLoader(val, 128))
    return clock.durations, module


def timed_retrace(optimizer, train, val, folder, engine):
    """Fit with the callback: seconds of the walk's steps."""
    ticks, retrace_steps = [], retracing.retrace_steps

    def ticking(states, steps, adjoints, walk, progress, bookmark):
        def tick(influence):
            ticks.append(time.perf_counter())
            progress(influence)

        return retrace_steps(states, steps, adjoints, walk, tick, bookmark)

    options = {"dirpath": folder, "overwrite": True, "curvature": engine, "snapshots": "every"}
    callback = SGDInfluence("val_loss", verify=0, epochs="all", **options)
    retracing.retrace_steps = ticking
    try:
        fit(optimizer, train, val, callback)
    finally:
        retracing.retrace_steps = retrace_steps
    return list(np.diff(ticks)), callback


def papers_way(train, val, folder):
    """Algorithm 2 for plain SGD as it stands: a backward a sample, then a Hessian product of the batch loss."""
    module = PaperCNN("SGD")
    params = list(module.parameters())
    trajectory = Trajectory(Path(folder) / "trajectory")

    def load(index):
        with torch.no_grad():
            for param, value in zip(params, trajectory.state(index).params.values(), strict=True):
                param.copy_(value)

    load(trajectory.steps[-1].index + 1)
    x, y = val.tensors
    u = torch.autograd.grad(F.cross_entropy(module.net(x), y), params)
    scores, durations = np.zeros(NUM_TRAIN), []
    for step in reversed(trajectory.steps):
        load(step.index)
        ids = step.micro[0].ids
        x, y = (tensor[ids] for tensor in train.tensors)
        began = time.perf_counter()
        for row, name in enumerate(ids):
            grads = torch.autograd.grad(F.cross_entropy(module.net(x[row : row + 1]), y[row : row + 1]), params)
            scores[name] += LR / len(ids) * float(sum((a * b).sum() for a, b in zip(u, grads, strict=True)))
        grads = torch.autograd.grad(F.cross_entropy(module.net(x), y), params, create_graph=True)
        product = torch.autograd.grad(sum((a * b).sum() for a, b in zip(u, grads, strict=True)), params)
        u = [a - LR * b for a, b in zip(u, product, strict=True)]
        durations.append(time.perf_counter() - began)
    return durations, scores


def measure(rounds):
    """All ratios."""
    train, val = digits(NUM_TRAIN)
    fit("SGD", train, val)  # warm up
    with TemporaryDirectory() as folder:
        return [
            {"optimizer": optimizer}
            | measure_recording(optimizer, RECORDED_STEPS, RECORDED_DIGITS, folder)
            | measure_retrace(optimizer, rounds, train, val, folder)
            for optimizer in OPTIMIZERS
        ]


def measure_recording(optimizer, steps, num_train, folder):
    """Recorded steps beside bare ones; in epochs of as many steps as real ones have, since each ends a file."""
    train, val = digits(num_train)
    train, threads = ConcatDataset([train] * TIMES), torch.get_num_threads()

    def measured(name):
        batch, snapshots = RECORDED[name]
        return recording_ratio(
            lambda: PaperCNN(optimizer), train, val, folder, batch=batch, snapshots=snapshots, steps=steps
        )

    found = {name: measured(name) for name in RECORDED}
    torch.set_num_threads(max(1, threads - 1))
    try:
        return found | {f"{name}_free": measured(name) for name in FREE}
    finally:
        torch.set_num_threads(threads)


def measure_retrace(optimizer, rounds, train, val, folder):
    """Steps of the walk over those of fits in between, and the paper's way where it is defined."""
    times, agreement = {name: [] for name in ("train", *ENGINES, "paper")}, None
    for _ in range(rounds):
        for engine in ENGINES:
            times["train"] += fit(optimizer, train, val)[0]
            walked, callback = timed_retrace(optimizer, train, val, folder, engine)
            times[engine] += walked
        if optimizer == "SGD":
            durations, scores = papers_way(train, val, folder)
            times["paper"] += durations
            ranking = callback.ranking
            agreement = float(np.abs(ranking.influence - scores[ranking.sample_id]).max() / np.abs(scores).max())
    median = {name: statistics.median(values) for name, values in times.items() if values}
    ratios = {name: value / median["train"] for name, value in median.items() if name != "train"}
    return {"training_step_ms": 1000 * median["train"]} | ratios | {"agreement_with_paper": agreement}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--write-docs", action="store_true")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.INFO)  # Lightning's remarks at every fit
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": pl.__version__,
        "threads": torch.get_num_threads(),
        "retraced_steps": EPOCHS * NUM_TRAIN // BATCH,
        "date": time.strftime("%Y-%m-%d"),
        "num_params": sum(param.numel() for param in PaperCNN("SGD").parameters()),
        "rows": measure(args.rounds),
    }
    print(markdown(result))
    if args.write_docs:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        (ROOT / "docs" / "cost.md").write_text(markdown(result), encoding="utf-8")


if __name__ == "__main__":
    main()
