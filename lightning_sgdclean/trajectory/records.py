# SPDX-License-Identifier: Apache-2.0
"""The recorded run: micro-batches, steps and the states between them, and which steps are retraced."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from lightning_sgdclean.base.options import Positions, SampleId
from lightning_sgdclean.base.randomness import RandomState

if TYPE_CHECKING:
    from lightning_sgdclean.data.packing import PackedBatch


@dataclass
class MicroBatch:
    """One call of ``training_step``.

    Attributes:
        ids: Names of the samples, one a row of the batch.
        positions: Their positions in the loader's dataset, or None where they have none; see ``Positions``.
        epoch: Epoch, counted from 0 as Lightning counts.
        batch_idx: The ``batch_idx`` that ``training_step`` got.
        random: Random state just before.
        digest: Fingerprint of the batch, ``(B,)``; None while it waits to be read.
        loss: The loss that was differentiated (already divided by the accumulation, and multiplied by
            ``scale``), or None before it is known.
        global_step: Optimizer steps made before it, as the module sees it.
        scale: What a GradScaler multiplied the loss by; 0 where the gradient was thrown away before the step, which a
            training that optimizes manually may do.
        loader: Which of the run's training loaders it came from, where they were made anew on the way.
        batch: The batch itself, packed, where it was kept; read back without its tensors.
        sizes: How many of the samples are of each of several loaders, in order; empty where there is one.
    """

    ids: list[SampleId]
    positions: Positions | None
    epoch: int
    batch_idx: int
    random: RandomState
    digest: Tensor | None = None
    loss: Tensor | None = None
    global_step: int = 0
    scale: float = 1.0
    loader: int = 0
    batch: "PackedBatch | None" = None
    sizes: list[int] = field(default_factory=list)


@dataclass
class State:
    """Everything that a step reads and writes, by name: parameters, buffers, the optimizer's state."""

    params: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        entries = [tensor for entries in self.optimizer.values() for tensor in entries.values()]
        return sum(tensor.nbytes for tensor in [*self.params.values(), *self.buffers.values(), *entries])


@dataclass
class Step:
    """One optimizer update: what went in besides the state before it.

    Attributes:
        index: ``trainer.global_step`` before the update.
        epoch: Epoch of its last micro-batch.
        ends_epoch: Whether that was the epoch's last batch.
        groups: Hyper-parameters of each parameter group, with the names of its parameters under ``params``.
            None at all where no update was made: a GradScaler skipped it, or training ended before it. What its
            batches did to running statistics is part of the run all the same.
        clip: ``(algorithm, value)`` of gradient clipping, or None.
        divisor: Number of micro-batches that the gradient was divided by.
        unused: Parameters without a gradient, which the optimizer left alone.
        micro: The micro-batches, in order.
    """

    index: int
    epoch: int
    ends_epoch: bool
    groups: list[dict[str, Any]]
    clip: tuple[str, float] | None
    divisor: int
    unused: list[str]
    micro: list[MicroBatch]

    @property
    def is_update(self) -> bool:
        """Whether the optimizer moved the parameters."""
        return bool(self.groups)

    @property
    def scale(self) -> float:
        """What a GradScaler multiplied its losses by."""
        return next((micro.scale for micro in reversed(self.micro) if micro.scale), 1.0)


@dataclass(frozen=True)
class KeptStep:
    """A step that is kept in memory whole.

    Attributes:
        step: Its record.
        batches: Its micro-batches as ``training_step`` got them.
        before: The state before it.
        after: The state after it.
    """

    step: Step
    batches: list[Any]
    before: State
    after: State


class States(Protocol):
    """Where a walk gets the states between its steps from, last first."""

    def state(self, index: int) -> State:
        """The state before step ``index``, or after the step before it."""


def first_epoch_kept(last_epoch: int, is_complete: bool, epochs: int | str) -> int:
    """First epoch of the window: the last ``epochs`` completed ones and, besides, one that was only started."""
    if epochs == "all":
        return 0
    return max(0, last_epoch - int(epochs) + (1 if is_complete else 0))


def window_in_words(first: Step, last: Step, num_in_last: int) -> str:
    """Say which steps are retraced, e.g. ``steps 812 to 1010: epoch 9 and 40 steps of epoch 10``."""
    last_whole = last.epoch if last.ends_epoch else last.epoch - 1
    parts = []
    if first.epoch == last_whole:
        parts.append(f"epoch {first.epoch}")
    elif first.epoch < last_whole:
        parts.append(f"epochs {first.epoch} to {last_whole}")
    if not last.ends_epoch:
        parts.append(f"{num_in_last} steps of epoch {last.epoch}")
    return f"steps {first.index} to {last.index}: {' and '.join(parts)}"


def copied(state: State) -> State:
    """The state in tensors of its own, where it is."""
    return State(
        {name: tensor.detach().clone() for name, tensor in state.params.items()},
        {name: tensor.detach().clone() for name, tensor in state.buffers.items()},
        {
            name: {key: tensor.detach().clone() for key, tensor in entries.items()}
            for name, entries in state.optimizer.items()
        },
    )


def same(one: State, other: State, name: str) -> bool:
    """Whether a buffer holds the same in two states; true where one of them lacks it."""
    first, second = one.buffers.get(name), other.buffers.get(name)
    if first is None or second is None:
        return True
    return first.shape == second.shape and torch.equal(first.nan_to_num(), second.nan_to_num())


def nudged(params: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Every number moved by its rounding error, up or down as the seed says."""
    source = torch.Generator().manual_seed(seed)
    moved = {}
    for name, tensor in params.items():
        signs = (2 * torch.randint(0, 2, tensor.shape, generator=source) - 1).to(tensor)
        moved[name] = tensor * (1 + torch.finfo(tensor.dtype).eps * signs)
    return moved
