# SPDX-License-Identifier: Apache-2.0
"""What the check takes of a retrace: the same recorded run retraced with and without it, one after the other.

Each figure is the least CPU time of the rounds, on one thread, which other work on the machine moves little.
"""

import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from cost import PaperCNN, digits
from lightning_sgdclean import SGDInfluence, retrace, retracing
from lightning_sgdclean.adjoint import backward
from lightning_sgdclean.adjoint.gradcheck import _FEW, _STEPS_A_CHECK, DerivativeChecks
from silent import silent_trainer

WINDOW, BOUND = 1000, 0.03  # steps, and the share of their retrace that the check may take


class Block(nn.Module):
    """Two convolutions of 3x3 with BatchNorm around an identity."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()),
            *(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)),
        )
        same = inputs == outputs and stride == 1
        project = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.around = nn.Identity() if same else nn.Sequential(project, nn.BatchNorm2d(outputs))

    def forward(self, x):
        return F.relu(self.body(x) + self.around(x))


def stage(inputs, outputs, stride):
    return Block(inputs, outputs, stride), Block(outputs, outputs, 1)


def resnet18(width):
    stages = ((width, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2), (4 * width, 8 * width, 2))
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
        *(block for one in stages for block in stage(*one)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, 10)),
    )


class HalfResNet(PaperCNN):
    """A ResNet-18 of half the width, for images of 32x32."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.net = resnet18(32)


def noise(num, num_val):
    source = torch.Generator().manual_seed(0)
    images = torch.randn(num + num_val, 3, 32, 32, generator=source)
    labels = torch.randint(0, 10, (num + num_val,), generator=source)
    return TensorDataset(images[:num], labels[:num]), TensorDataset(images[num:], labels[num:])


class Timed:
    """Counts the CPU time spent in a function."""

    def __init__(self, function):
        self.function, self.seconds, self.calls = function, 0.0, 0

    def __call__(self, *args, **kwargs):
        began = time.process_time()
        try:
            return self.function(*args, **kwargs)
        finally:
            self.seconds += time.process_time() - began
            self.calls += 1


class NoChecks(DerivativeChecks):
    def is_due(self, step, batch):
        return False


def walked(run_dir, module, train, val, batch, checked):
    """CPU time of a walk over all of a run, of the checks within, and the number of both."""
    walk, check = Timed(backward.retrace_steps), Timed(backward.check_derivative)
    usual = retracing.walk_of

    def unchecked(*args):
        return usual(*args) if checked else replace(usual(*args), checks=NoChecks(args[-1]))

    with (
        patch.object(retracing, "retrace_steps", walk),
        patch.object(backward, "check_derivative", check),
        patch.object(retracing, "walk_of", unchecked),
    ):
        ranking = retrace(
            run_dir,
            module,
            train_dataloaders=DataLoader(train, batch, shuffle=True),
            val_dataloaders=DataLoader(val, 128),
            epochs="all",
        )
    return walk.seconds, check.seconds, check.calls, ranking.summary["window"]["num_steps"]


def share_of(make, optimizer, data, batch, epochs, rounds):
    """The check's share of the retrace of one recorded run, and what it would be of a longer one."""
    train, val = data
    with TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        pl.seed_everything(0, verbose=False)
        options = {"snapshots": "every", "epochs": "all", "curvature": "none", "page": False}
        callback = SGDInfluence(dirpath=run_dir, **options)
        silent_trainer(epochs, [callback]).fit(
            make(optimizer), DataLoader(train, batch, shuffle=True), DataLoader(val, 128)
        )
        runs = {checked: [] for checked in (True, False)}
        for _ in range(rounds):
            for checked in runs:
                runs[checked].append(walked(run_dir, make(optimizer), train, val, batch, checked))
    with_, within, num_checks, num_steps = (min(column) for column in zip(*runs[True], strict=True))
    without = min(run[0] for run in runs[False])
    step, check = without / num_steps, within / num_checks
    of_window = _FEW + WINDOW // _STEPS_A_CHECK
    return {
        "optimizer": optimizer,
        "num_params": sum(param.numel() for param in make(optimizer).parameters()),
        "batch": batch,
        "num_steps": num_steps,
        "num_checks": num_checks,
        "step_ms": 1000 * step,
        "check_in_steps": check / step,
        "share": (with_ - without) / with_,
        "share_by_clock": within / (within + without),
        "checks_of_window": of_window,
        "share_of_window": of_window * check / (of_window * check + WINDOW * step),
        "checks_allowed": int(BOUND / (1 - BOUND) * WINDOW * step / check),
    }


def costs():
    """Of the paper's network over many steps, and of a larger one over a few."""
    return {
        "the paper's MNIST CNN": share_of(PaperCNN, "SGD, momentum", digits(4096), 64, 10, 3),
        "ResNet-18 of half the width": share_of(HalfResNet, "SGD, momentum", noise(64, 16), 16, 2, 2),
    }
