# SPDX-License-Identifier: Apache-2.0
"""How much faster it is to leave samples out at once than one after another, and that both come to the same.

    python benchmarks/counterfactual.py [--rounds 3] [--runs 64] [--write-docs]

Networks of the 2019 paper's size, 200 samples each: tabular data shaped like Adult's (made up here) and the digits 1
and 7 of MNIST. Every round makes the runs one after another and then at once; figures are medians over rounds of
processor time.
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
from torch.utils.data import DataLoader, TensorDataset

from lightning_sgdclean import SGDInfluence, counterfactual
from lightning_sgdclean.ranking.agreement import kendall_tau
from silent import silent_trainer

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "counterfactual_cpu.json"
PAGE = ROOT / "docs" / "counterfactual.md"
NUM, EPOCHS, TARGET = 200, 5, 5.0


def adult_like():
    """Two classes over 104 features, most of them zero or one, a tenth of the labels wrong."""
    source = torch.Generator().manual_seed(0)
    x = (torch.rand(2 * NUM, 104, generator=source) < 0.12).float()
    x[:, :6] = torch.randn(2 * NUM, 6, generator=source)
    y = (x @ torch.randn(104, generator=source) > 0).float()
    wrong = torch.rand(2 * NUM, generator=source) < 0.1
    return x, torch.where(wrong, 1 - y, y)


def ones_and_sevens():
    with np.load(ROOT / "examples" / "data" / "mnist_8k.npz", allow_pickle=False) as data:
        chosen = np.flatnonzero(np.isin(data["y_train"], (1, 7)))[: 2 * NUM]
        x, y = data["x_train"][chosen], data["y_train"][chosen]
    return torch.from_numpy(x).unsqueeze(1) / 255, torch.from_numpy(y == 7).float()


def logistic(num_inputs):
    return nn.Sequential(nn.Flatten(), nn.Linear(num_inputs, 1))


def perceptron(num_inputs):
    hidden = [nn.Linear(num_inputs, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(8, 1))


def convolutional(_):
    first = [nn.Conv2d(1, 8, 5, stride=2), nn.ReLU()]
    return nn.Sequential(*first, nn.Conv2d(8, 8, 5, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(128, 1))


CASES = {  # words: data, network, batch, optimizer
    "Adult-like, logistic regression": (adult_like, logistic, 5, "SGD"),
    "Adult-like, perceptron of 8 and 8": (adult_like, perceptron, 20, "SGD"),
    "MNIST 1 and 7, logistic regression": (ones_and_sevens, logistic, 5, "SGD"),
    "MNIST 1 and 7, perceptron of 8 and 8": (ones_and_sevens, perceptron, 20, "SGD"),
    "the same by Adam": (ones_and_sevens, perceptron, 20, "Adam"),
    "MNIST 1 and 7, two convolutions": (ones_and_sevens, convolutional, 20, "SGD"),
}
BEYOND_THE_PAPER = ("MNIST 1 and 7, two convolutions",)


class Binary(pl.LightningModule):
    def __init__(self, net, num_inputs, optimizer):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.optimizer = net(num_inputs), optimizer

    def loss(self, batch):
        return F.binary_cross_entropy_with_logits(self.net(batch[0])[:, 0], batch[1])

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        if self.optimizer == "Adam":
            return torch.optim.Adam(self.parameters(), lr=1e-3)
        return torch.optim.SGD(self.parameters(), lr=0.05)


def record(make_module, train, val, folder):
    callback = SGDInfluence("val_loss", verify=0, epochs="all", dirpath=folder, overwrite=True)
    pl.seed_everything(0, verbose=False)
    trainer = silent_trainer(EPOCHS, [callback])
    trainer.fit(make_module(), train, val)
    return callback


def measure(words, rounds, num_runs, folder):
    data, net, batch, optimizer = CASES[words]
    x, y = data()
    train = DataLoader(TensorDataset(x[:NUM], y[:NUM]), batch, shuffle=True)
    val = DataLoader(TensorDataset(x[NUM:], y[NUM:]), NUM)

    def make_module():
        return Binary(net, x[0].numel(), optimizer)

    callback = record(make_module, train, val, folder)

    def left_out(batched):
        return counterfactual(
            callback.run_dir,
            make_module(),
            without=range(num_runs),
            train_dataloaders=train,
            val_dataloaders=val,
            epochs="all",
            batched=batched,
        )

    seconds, found = {False: [], True: []}, {}
    for _ in range(rounds):
        for batched in (False, True):
            began = time.process_time()
            found[batched] = left_out(batched)
            seconds[batched].append(time.process_time() - began)
    alone, at_once = (found[batched].differences for batched in (False, True))
    automatic = left_out("auto")
    return {
        "words": words,
        "num_params": sum(param.numel() for param in make_module().parameters()),
        "num_steps": callback.summary["window"]["num_steps"],
        "batch": batch,
        "alone_s": statistics.median(seconds[False]),
        "at_once_s": statistics.median(seconds[True]),
        "off_by": float(np.abs(at_once - alone).max() / np.abs(alone).max()),
        "tau_of_both": kendall_tau(alone, at_once),
        "tau_of_prediction": kendall_tau(found[True].predicted, at_once),
        "is_automatic": automatic.is_batched,
    }


def row_of(row):
    factor = row["alone_s"] / row["at_once_s"]
    missed = " **!**" if factor < TARGET and row["words"] not in BEYOND_THE_PAPER else ""
    return (
        f"| {row['words']} | {row['num_params']:,} | {row['batch']} | {row['num_steps']} | {row['alone_s']:.1f} s | "
        f"{row['at_once_s']:.1f} s | {factor:.1f}{missed} | {row['off_by']:.0e} | {row['tau_of_prediction']:.2f} | "
        f"{'at once' if row['is_automatic'] else 'one by one'} |"
    )


PAGE_TEXT = """\
# Many counterfactual runs at once

`counterfactual` runs a recorded window again without some samples, once for each. Where networks are small, a step is
mostly overhead, and `torch.func.vmap` trains all runs at once: their parameters, buffers and optimizer states lie side
by side, the module is called once a batch for all of them, and the user's own optimizer steps them as one tensor.
Whether the module means the same then is checked: time and again the gradient of one run is computed by itself, too.
Where it differs, or where the module cannot be called so, the runs are made one after another.

    python benchmarks/counterfactual.py --write-docs

{machine}, Python {python}, torch {torch}, {date}; processor time of one thread. {num_runs} runs over {epochs} epochs of
{num} samples, everything included: opening the run, the run with nobody left out, validation. Medians over {rounds}
rounds.

| training | parameters | batch | steps | one by one | at once | times as fast | off by | tau | automatic |
|---|---|---|---|---|---|---|---|---|---|
{table}

*Off by*: the largest difference between the two, relative to the largest effect of a sample; all of this is in
float32. *Tau*: Kendall's, between predicted influences and real differences. *Automatic*: what `batched="auto"` chose.
The target is {target:.0f} times as fast for networks of the 2019 paper's size; a row that missed it is marked with an
exclamation mark. The convolutions are beyond that; many small ones side by side gain less.
"""


def markdown(result):
    table = "\n".join(row_of(row) for row in result["rows"])
    return PAGE_TEXT.format(**result, table=table, epochs=EPOCHS, num=NUM, target=TARGET)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runs", type=int, default=64)
    parser.add_argument("--write-docs", action="store_true")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.INFO)  # Lightning's remarks at every fit
    torch.set_num_threads(1)  # so that processor time is comparable, whatever else the machine does
    with TemporaryDirectory() as folder:
        rows = [measure(words, args.rounds, args.runs, folder) for words in CASES]
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rounds": args.rounds,
        "num_runs": args.runs,
        "date": time.strftime("%Y-%m-%d"),
        "rows": rows,
    }
    print(markdown(result))
    if args.write_docs:
        RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        PAGE.write_text(markdown(result), encoding="utf-8")


if __name__ == "__main__":
    main()
