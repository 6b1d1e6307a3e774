# SPDX-License-Identifier: Apache-2.0
"""Buffers that a step moved: running statistics, whose updates are followed, and others, which are refused."""

import torch
from torch import Tensor

from lightning_sgdclean.base.errors import UnsupportedTrainingError
from lightning_sgdclean.losses.running_statistics import BatchStatistic


def check_moved_buffers(
    index: int, before: dict[str, Tensor], after: dict[str, Tensor], updates: list[BatchStatistic]
) -> None:
    """Did the step move buffers only as the updates that are followed backwards say?

    Buffers of integers and of bool, such as counters, carry no derivative and may move.

    Args:
        index: The step's number, for the message.
        before: The buffers as they were recorded before the step, by name.
        after: Likewise after it.
        updates: Those that the step's batches made when it was run again, in order.

    Raises:
        UnsupportedTrainingError: Naming the first buffer that moved otherwise.
    """
    followed = {update.name for update in updates}
    for name, was in before.items():
        if not was.is_floating_point() and not was.is_complex():
            continue
        if name not in followed:
            if not torch.equal(was.nan_to_num(), after[name].nan_to_num()):
                raise UnsupportedTrainingError(
                    f"Training moves the buffer {name!r} (step {index}), which carries influence that is not "
                    "followed; only the running statistics of BatchNorm and InstanceNorm are. Remove it, or keep it "
                    "fixed in the retraced epochs."
                )
        elif not torch.allclose(
            _moved(name, was, updates), after[name], rtol=_tolerance(was), atol=_tolerance(was) / 100
        ):
            raise UnsupportedTrainingError(
                f"Step {index} moves the running statistics {name!r} otherwise than the norm layer's calls in "
                "training_step say. Likely causes: activation checkpointing, which runs BatchNorm once more within "
                "backward (move it out of the checkpointed part), or code that writes into them."
            )


def _tolerance(buffer: Tensor) -> float:
    return max(1e-3, 4 * torch.finfo(buffer.dtype).eps)


def _moved(name: str, was: Tensor, updates: list[BatchStatistic]) -> Tensor:
    for update in updates:
        if update.name == name:
            was = (1 - update.momentum) * was + update.momentum * update.value.detach().to(was)
    return was
