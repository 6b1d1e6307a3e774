# SPDX-License-Identifier: Apache-2.0
"""What ten objectives in one walk cost, as a ratio to a walk for one.

    python benchmarks/objectives.py [--rounds 3] [--write-docs]

The network is the 2019 paper's MNIST CNN, batch 64; the objectives are the validation loss and those of nine of its
classes. Retraces of one recorded run with one objective and with ten alternate, on one thread; each figure is the least
CPU time of the rounds, which other work on the machine moves little.
"""

import argparse
import json
import logging
import platform
import re
import time
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import pytorch_lightning as pl
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from cost import ROOT, PaperCNN, digits, fit
from lightning_sgdclean import SGDInfluence, retrace

RESULT = ROOT / "benchmarks" / "results" / "objectives_cpu.json"
DOCS = ROOT / "docs" / "method.md"
NUM, BOUND = 10, 6.0


def mean_loss(module, batch):
    return F.cross_entropy(module.net(batch[0]), batch[1])


def of_class(label):
    def loss_of_class(module, batch):
        chosen = batch[1] == label
        return F.cross_entropy(module.net(batch[0][chosen]), batch[1][chosen]), chosen.sum()

    return loss_of_class


TEN = {"loss": mean_loss, **{f"digit {label}": of_class(label) for label in range(NUM - 1)}}


def seconds(run_dir, optimizer, train, val, objective, curvature):
    began = time.process_time()
    retrace(
        run_dir,
        PaperCNN(optimizer),
        train_dataloaders=DataLoader(train, 64, shuffle=True),
        val_dataloaders=DataLoader(val, 128),
        objective=objective,
        curvature=curvature,
    )
    return time.process_time() - began


def ratios(rounds):
    train, val = digits()
    found = {}
    with TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        fit("SGD, momentum", train, val, SGDInfluence(verify=0, dirpath=run_dir, snapshots="every"))
        for curvature in ("exact", "finite"):
            one, ten = [], []
            for _ in range(rounds):
                one.append(seconds(run_dir, "SGD, momentum", train, val, mean_loss, curvature))
                ten.append(seconds(run_dir, "SGD, momentum", train, val, TEN, curvature))
            found[curvature] = {"one": min(one), "ten": min(ten), "ratio": min(ten) / min(one)}
            print(f"{curvature}: {found[curvature]['ratio']:.2f} walks for {NUM} objectives", flush=True)
    return found


def paragraph(result):
    exact, finite = (result["curvature"][name]["ratio"] for name in ("exact", "finite"))
    verdicts = ["met" if ratio <= BOUND else "missed" for ratio in (exact, finite)]
    return (
        f"Ten objectives in one walk (`objective={{name: callable, ...}}`) cost {exact:.1f} walks for one with "
        f'`"exact"` and {finite:.1f} with `"finite"`, which has no graph to use again: the target '
        f"of at most {BOUND:.0f} is {verdicts[0]} with the one and {verdicts[1]} with the other "
        f"({result['machine']}, one thread, `python benchmarks/objectives.py --write-docs`).\n"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write-docs", action="store_true")
    arguments = parser.parse_args()
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    pl.seed_everything(0, verbose=False)
    result = {
        "machine": platform.machine(),
        "torch": torch.__version__,
        "curvature": ratios(arguments.rounds),
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if arguments.write_docs:
        text = DOCS.read_text(encoding="utf-8")
        pattern = r"(<!-- objectives -->\n).*?(<!-- /objectives -->)"
        DOCS.write_text(re.sub(pattern, lambda m: m[1] + paragraph(result) + m[2], text, flags=re.S), encoding="utf-8")


if __name__ == "__main__":
    main()
