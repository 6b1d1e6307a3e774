# SPDX-License-Identifier: Apache-2.0
"""Would lossless compression of snapshots pay? What is left of the MNIST CNN's, and how fast it goes.

    python benchmarks/compression.py

Two snapshots some steps apart are combined by exclusive or, split into planes of a byte each, and compressed by zlib
at its fastest level.
"""

import logging
import time
import warnings
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from cost import digits, fit
from lightning_sgdclean import SGDInfluence
from lightning_sgdclean.trajectory.flat_state import flatten
from lightning_sgdclean.trajectory.store import Trajectory

DISTANCES = (1, 8, 32)


def bits(trajectory, position):
    """The state's float32 as unsigned integers."""
    _, flat = flatten(trajectory.state(trajectory.steps[position].index))
    return flat["float32"].numpy().view(np.uint32)


def compressed(one, other):
    """Size of the difference relative to one of the two, and seconds."""
    began = time.perf_counter()
    planes = np.ascontiguousarray((one ^ other).view(np.uint8).reshape(-1, 4).T)
    size = len(zlib.compress(planes.tobytes(), level=1))
    return size / one.nbytes, time.perf_counter() - began


def main():
    warnings.filterwarnings("ignore")
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    train, val = digits(64 * 20)
    with TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        fit("SGD, momentum", train, val, SGDInfluence(verify=0, dirpath=run_dir, snapshots="every", epochs="all"))
        trajectory = Trajectory(run_dir / "trajectory")
        last = bits(trajectory, len(trajectory.steps) - 1)
        for distance in DISTANCES:
            share, seconds = compressed(bits(trajectory, len(trajectory.steps) - 1 - distance), last)
            print(f"{distance} steps apart: {share:.0%}, at {last.nbytes / seconds / 1e6:.0f} MB/s")


if __name__ == "__main__":
    main()
