# SPDX-License-Identifier: Apache-2.0
"""States and steps that are small enough to be written down: the state before step ``i`` holds ``i``."""

import torch

from lightning_sgdclean.data.packing import pack_batch
from lightning_sgdclean.trajectory.records import MicroBatch, State, Step


def state(value, with_momentum):
    params = {"a": torch.full((2, 3), value), "b": torch.full((), value)}
    momentum = {"a": {"momentum_buffer": torch.full((2, 3), -value)}} if with_momentum else {}
    return State(params, {"count": torch.tensor(int(value))}, momentum)


def step(index, epoch, ends_epoch):
    micro = MicroBatch(
        ids=["x", "y"],
        positions=None,
        epoch=epoch,
        batch_idx=0,
        random={"torch": torch.get_rng_state()},
        digest=torch.tensor([index, -index]),
        loss=torch.tensor(0.1),
        batch=pack_batch({"x": torch.ones(2), "meta": ["p", (1, None)]}, {}),
    )
    return Step(index, epoch, ends_epoch, [{"lr": 0.1, "params": ["a", "b"]}], ("norm", 0.5), 1, [], [micro])
