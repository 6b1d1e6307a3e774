# SPDX-License-Identifier: Apache-2.0
"""How many steps a window will have, how many bytes a state, and what policy of snapshots that suggests."""

import math
from typing import Literal

from lightning_sgdclean.schedule import interval_of

_SMALL = 1 << 30  # bytes; snapshots of every step are kept where they are no more than that

SnapshotPolicy = Literal["auto", "every", "sqrt"] | int


def window_length(
    num_batches: float, accumulated: int, max_epochs: int | None, max_steps: int, epochs: int | str
) -> int | None:
    """Optimizer steps that a window can have, or None if that cannot be known.

    Args:
        num_batches: Training batches an epoch, infinite where the loader has no length.
        accumulated: Batches a step.
        max_epochs: The Trainer's; None or -1 for no limit.
        max_steps: Likewise; -1 for no limit.
        epochs: The callback's option. A started epoch comes on top.
    """
    longest = math.inf if max_epochs is None or max_epochs < 0 else max_epochs
    wanted = longest if epochs == "all" else min(longest, int(epochs) + 1)
    num_steps = math.ceil(num_batches / accumulated) * wanted if math.isfinite(num_batches) else math.inf
    if max_steps >= 0:
        num_steps = min(num_steps, max_steps)
    return int(num_steps) if math.isfinite(num_steps) else None


def snapshot_interval(policy: SnapshotPolicy, num_steps: int | None, state_bytes: int) -> int | None:
    """Steps from one snapshot to the next, or None for an interval that grows.

    ``"auto"`` keeps every state where all of them are small, since that saves repeating steps.
    """
    if policy == "auto":
        policy = "every" if num_steps is not None and num_steps * state_bytes <= _SMALL else "sqrt"
    return interval_of(policy, num_steps)
