# SPDX-License-Identifier: Apache-2.0
"""What large runs would take: measured bytes a step and a sample, and the schedules' formulas.

    python benchmarks/scale.py [--write-docs]

Nothing large is run. Bytes come from recording two small fits, states in memory from retracing small ones of a wide
network, costs of a step from ``docs/cost.md``.
"""

import argparse
import gc
import json
import logging
import tracemalloc
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_sgdclean import SGDInfluence
from lightning_sgdclean.adjoint import backward
from lightning_sgdclean.replay.forward import RecomputedStates
from lightning_sgdclean.trajectory.schedule import interval_of, num_snapshots, repeated_steps
from lightning_sgdclean.trajectory.store import Trajectory
from silent import silent_trainer

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "scale_cpu.json"
WALK = 2.7  # training steps that a step backwards takes with "exact": docs/cost.md
DISK, MEMORY = 1e12, 64e9  # bytes of the machine that the table is held against
# Powers of ten of samples, steps and parameters; epochs.
RUNS = ((5, 4, 7, 10), (6, 5, 8, 10), (7, 5, 9, 5), (9, 6, 10, 1))
STATES = {"SGD": 1, "Adam": 3}  # tensors of the parameters' size in a state, float32


class Small(pl.LightningModule):
    """Dropout, so that torch's random state is another before every batch."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Dropout(0.1), nn.Linear(4, 2))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def recorded(batch, folder, num_steps=64):
    """Bytes a step on disk and in memory once read, for a batch size; states apart."""
    data = TensorDataset(torch.randn(batch * num_steps, 4), torch.randint(0, 2, (batch * num_steps,)))
    callback = SGDInfluence("val_loss", verify=0, dirpath=folder, snapshots=num_steps)
    trainer = silent_trainer(1, [callback])
    trainer.fit(Small(), DataLoader(data, batch, shuffle=True), DataLoader(data, 512))
    tracemalloc.start()
    trajectory = Trajectory(callback.run_dir / "trajectory")
    in_python, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    digests = sum(micro.digest.nbytes for step in trajectory.steps for micro in step.micro)
    return callback.summary["trajectory_bytes"] / num_steps, (in_python + digests) / num_steps


def measure():
    """Bytes a step and a sample drawn, on disk and in memory: the straight line through two batch sizes.

    And the states in memory besides those that are held.
    """
    small, large = 16, 256
    with TemporaryDirectory() as folder:
        at_small, at_large = (recorded(batch, Path(folder) / str(batch)) for batch in (small, large))
    sample = [(b - a) / (large - small) for a, b in zip(at_small, at_large, strict=True)]
    step = [a - small * per_sample for a, per_sample in zip(at_small, sample, strict=True)]
    keys = ("disk_step", "memory_step"), ("disk_sample", "memory_sample")
    found = {key: round(value, 1) for key, value in zip(keys[0] + keys[1], step + sample, strict=True)}
    around = {name: round(max(states_around(name, interval) for interval in (1, 4, 16)), 1) for name in STATES}
    return found | {"states_around": around}


class Wide(Small):
    """Its states are large beside its batches."""

    def __init__(self, optimizer):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4000), nn.ReLU(), nn.Linear(4000, 2))
        self.optimizer = optimizer

    def configure_optimizers(self):
        return getattr(torch.optim, self.optimizer)(self.parameters(), lr=0.001)


def tensor_bytes():
    """Of all tensors that were made since ``gc.freeze()``."""
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def states_around(optimizer, interval, num_steps=16):
    """Most tensors alive after a state is read or a step pulled back, in states, less those held for visits to come."""
    peaks, sizes = [], []
    read, pull_back = RecomputedStates.state, backward._pull_back

    def reading(self, index):
        found = read(self, index)
        sizes.append(self._trajectory.state_bytes)
        peaks.append(tensor_bytes() / sizes[-1])
        return found

    def pulling_back(*args):
        found = pull_back(*args)
        peaks.extend(tensor_bytes() / size for size in sizes[-1:])
        return found

    data = TensorDataset(torch.randn(4 * num_steps, 4), torch.randint(0, 2, (4 * num_steps,)))
    RecomputedStates.state, backward._pull_back = reading, pulling_back
    gc.collect()
    gc.freeze()
    try:
        with TemporaryDirectory() as folder:
            trainer = silent_trainer(
                1, [SGDInfluence("val_loss", verify=0, dirpath=Path(folder) / "run", snapshots=interval)]
            )
            trainer.fit(Wide(optimizer), DataLoader(data, 4), DataLoader(data, 32))
    finally:
        gc.unfreeze()
        RecomputedStates.state, backward._pull_back = read, pull_back
    return max(peaks) - max(0, interval - 2)


def in_units(number):
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} PB"


def marked(number, bound):
    return in_units(number) + ("" if number <= bound else " **!**")


def policy_row(name, num_steps, interval, state, slots, around):
    """Disk of the snapshots, states in memory, and training steps that a retraced step takes."""
    held = min(slots, max(0, interval - 2))  # neither the segment's first state, read, nor its last, handed out
    repeated = (repeated_steps(interval, slots) + 1) / interval if interval > 1 else 0.0
    count = num_snapshots(num_steps, interval)
    disk, memory = count * state, (held + around) * state
    return (
        f"| {name} | {count:,} | {marked(disk, DISK)} | {held:,} | {marked(memory, MEMORY)} | {WALK + repeated:.1f} |"
    )


def run_section(samples, steps, params, epochs, constants):
    title = f"## 1e{samples} samples, 1e{steps} steps, 1e{params} parameters ({epochs} {'epochs'[: 5 + (epochs > 1)]})"
    drawn, steps, params = 10**samples * epochs, 10**steps, 10**params
    records = steps * constants["disk_step"] + drawn * constants["disk_sample"]
    memory = steps * constants["memory_step"] + drawn * constants["memory_sample"]
    lines = [
        title,
        "",
        f"Records of the steps: {marked(records, DISK)} on disk, {marked(memory, MEMORY)} in memory while retracing.",
        "",
    ]
    for optimizer, tensors in STATES.items():
        state = params * 4 * tensors
        root = interval_of("sqrt", steps)
        around = constants["states_around"][optimizer]
        fitting = max(1, int(MEMORY / 2 // state))
        dense, coarse = min(root, fitting), max(root, -(-steps // max(1, int(DISK // state) - 1)))
        lines += [
            f"{optimizer}: a state is {in_units(state)}.",
            "",
            "| policy | snapshots | disk | held | memory | cost of a step |",
            "|---|---|---|---|---|---|",
            policy_row("`every`", steps, 1, state, 0, around),
            policy_row("`sqrt`, segments held whole", steps, root, state, root, around),
            policy_row("`sqrt`, what memory allows", steps, root, state, dense, around),
            policy_row("as many as the disk takes", steps, coarse, state, fitting, around),
            "",
        ]
    return lines


def markdown(constants):
    lines = [
        "# How it scales, on paper",
        "",
        "    python benchmarks/scale.py --write-docs",
        "",
        "Nothing of this size was run. A recorded step takes "
        f"{constants['disk_step']:,.0f} bytes on disk (torch's random state",
        f"above all) and {constants['disk_sample']:.0f} more for each sample drawn; read back,",
        f"{constants['memory_step']:,.0f} bytes of memory and {constants['memory_sample']:.0f} a sample. These were",
        "measured, and so was what is in memory besides the states that are *held*: as much as",
        f"{constants['states_around']['SGD']} states with SGD and {constants['states_around']['Adam']} with Adam, for",
        "the live model, its optimizer, gradients, the adjoint and the states at work; activations come on top.",
        "How many snapshots there are and how often a step is repeated are formulas",
        "(`lightning_sgdclean/trajectory/schedule.py`), which a simulation of a million steps bears out",
        "(`tests/trajectory/test_schedule.py`). The window is the whole training. *Cost of a step* is in training",
        f"steps: {WALK} for the walk itself ([cost.md](cost.md)) and one for each time that the step is repeated.",
        f"What exceeds {in_units(DISK)} of disk or {in_units(MEMORY)} of memory is marked with an exclamation mark.",
        "",
    ]
    for run in RUNS:
        lines += run_section(*run, constants)
    return "\n".join([*lines, WHAT_BREAKS])


WHAT_BREAKS = """## What breaks first

1. The disk, with a state for every step: at 1e7 parameters already. `snapshots="sqrt"`, which `"auto"` chooses
   above 1 GiB, takes it down by the square root of the steps, for one more training step a step.
2. Memory, where a segment is held whole: at 1e8 parameters. Fewer states are held then, and steps are repeated
   twice to three times, as *revolve* does it best.
3. The disk again, from 1e9 parameters on. `max_bytes` has `"auto"` keep as many snapshots as fit.
4. The records in memory: all steps of the window are read at once, ids and fingerprints included. With 1e9
   samples drawn that alone is too much, whatever the policy. A shorter window (`epochs=`) is the answer for now;
   reading the steps segment by segment would be a better one.
5. A single state: it has to fit into memory some ten times over, which ends at 1e9 parameters with Adam, and at
   1e10 with any optimizer. No schedule helps, and the last tables' costs show it; the state would have to be
   spread over machines, which is not followed.
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write-docs", action="store_true")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.INFO)
    constants = measure()
    print(markdown(constants))
    if args.write_docs:
        RESULT.write_text(json.dumps(constants, indent=2) + "\n", encoding="utf-8")
        (ROOT / "docs" / "scale.md").write_text(markdown(constants), encoding="utf-8")


if __name__ == "__main__":
    main()
