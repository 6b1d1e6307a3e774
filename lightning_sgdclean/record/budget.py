# SPDX-License-Identifier: Apache-2.0
"""What is ahead of a recorded run: steps, bytes and minutes, and the policy of snapshots that follows."""

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_sgdclean.base.errors import BudgetError, warn_of
from lightning_sgdclean.base.options import Options
from lightning_sgdclean.base.resources import StepTimer, in_bytes, in_time, slots_for
from lightning_sgdclean.record.keeping import KeepPlan
from lightning_sgdclean.trajectory.records import State
from lightning_sgdclean.trajectory.schedule import interval_of, num_snapshots, repeated_steps

_SMALL = 1 << 30  # bytes; "auto" keeps the state of every step where that takes no more
_RECORD_BYTES = 8 << 10  # of a micro-batch besides kept batches: torch's random state, above all


# One step of the walk backwards, in training steps; see docs/cost.md.
_WALK_COST = {"exact": 2.7, "gauss-newton": 1.9, "finite": 2.7, "none": 2.3}
SnapshotPolicy = Literal["auto", "every", "sqrt"] | int


def has_steps_left(trainer: Any) -> bool:
    """Whether a fit that begins has anything left to train; warns if not, as of a notebook's cell that is run again."""
    loop = trainer.fit_loop
    limits = {"max_epochs": loop.epoch_progress.current.processed, "max_steps": loop.epoch_loop.global_step}
    for name, reached in limits.items():
        limit = getattr(loop, name)
        if limit not in (None, -1) and 0 < limit <= reached:
            text = f"This fit has nothing left to train, since the Trainer has reached {name}={limit}: nothing is "
            text += "recorded, and the ranking stays what it was. To train again, make a new Trainer; to train on, "
            warn_of([f"{text}raise trainer.fit_loop.{name}."])
            return False
    return True


@dataclass(frozen=True)
class Needs:
    """What is known of a run before its first step.

    Attributes:
        num_steps: Optimizer steps that the window can have, or None if that cannot be known.
        batches_a_step: Micro-batches of one.
        state_bytes: Bytes of one state.
        slots: States that fit in memory while retracing.
        max_bytes: Bytes that the trajectory may take on disk.
        curvature: The engine.
        num_epochs: Epochs whose first states are kept besides.
        num_kept: Steps that may lie on disk at once, where those are more than a window has: with ``at="best"``
            the best model's window and the latest one.
    """

    num_steps: int | None
    batches_a_step: int
    state_bytes: int
    slots: int
    max_bytes: float
    curvature: str = "exact"
    num_epochs: int = 0
    num_kept: int | None = None

    @property
    def steps_on_disk(self) -> int:
        """As many as may lie there at once."""
        return self.num_kept or self.num_steps or 0

    @property
    def record_bytes(self) -> int:
        """Bytes of all steps without their states."""
        return self.steps_on_disk * self.batches_a_step * _RECORD_BYTES


@dataclass(frozen=True)
class Budget:
    """What a policy takes.

    Attributes:
        interval: Steps from one snapshot to the next, or None for one that grows.
        snapshots: How many there may be, or None if that cannot be known.
        nbytes: Expected size of the trajectory, or None if that cannot be known.
        text: The same in words, for people.
        num_steps: Steps that the window can have, or None if that cannot be known.
        cost: What retracing one of them takes, in training steps.
    """

    interval: int | None
    snapshots: int | None
    nbytes: int | None
    text: str
    num_steps: int | None
    cost: float

    def summary(self, step_seconds: float | None) -> dict[str, Any]:
        """The same as plain values; the retrace in minutes where it is known how long a step of training takes."""
        minutes = None
        if step_seconds is not None and self.num_steps is not None:
            minutes = self.cost * self.num_steps * step_seconds / 60
        return {
            "bytes": self.nbytes,
            "snapshots": self.snapshots,
            "interval": self.interval,
            "steps": self.num_steps,
            "cost": self.cost,
            "minutes": minutes,
        }

    def at_pace(self, step_seconds: float, num_steps: int | None) -> str:
        """What training in all, if its steps can be known, and the retrace take at that pace, in words."""
        training = "" if num_steps is None else f"training about {in_time(num_steps * step_seconds)}, "
        what, steps = ("retrace", self.num_steps) if self.num_steps else ("retrace of a step", 1)
        seconds = self.cost * steps * step_seconds
        return f"At the pace of the first batches: {training}{what} about {in_time(seconds)}."


def window_length(
    num_batches: float,
    accumulated: int,
    max_epochs: int | None,
    max_steps: int,
    epochs: int | str,
    num_windows: int = 1,
) -> int | None:
    """Optimizer steps that a window, or so many of them, can have, or None if that cannot be known.

    Args:
        num_batches: Training batches an epoch, infinite where the loader has no length.
        accumulated: Batches a step.
        max_epochs: The Trainer's; None or -1 for no limit.
        max_steps: Likewise; -1 for no limit.
        epochs: The callback's option. A started epoch comes on top.
        num_windows: Windows that lie apart, at most.
    """
    longest = math.inf if max_epochs is None or max_epochs < 0 else max_epochs
    wanted = longest if epochs == "all" else min(longest, num_windows * (int(epochs) + 1))
    num_steps = math.ceil(num_batches / accumulated) * wanted if math.isfinite(num_batches) else math.inf
    if max_steps >= 0:
        num_steps = min(num_steps, max_steps)
    return int(num_steps) if math.isfinite(num_steps) else None


def expected_state_bytes(state: State, optimizer: Optimizer) -> int:
    """Bytes of a state once the optimizer has its own, found by one step of its class on small parameters."""
    if state.optimizer:
        return state.nbytes
    copies = sum(tensor.nbytes for tensor in state.params.values()) * _entries_a_parameter(optimizer)
    return state.nbytes + copies


def _entries_a_parameter(optimizer: Optimizer) -> int:
    twin = nn.Parameter(torch.ones(2, 3))
    twin.grad = torch.ones_like(twin)
    group: dict[str, Any] = optimizer.param_groups[0] | {"params": [twin], "capturable": False, "fused": None}
    try:
        model = type(optimizer)([group])  # type: ignore[call-arg]
        model.step()
    except Exception:  # theirs, of any kind: some cannot be made from their options alone
        return 2  # as many as Adam's
    entries = model.state.get(twin, {}).values()
    return sum(isinstance(entry, torch.Tensor) and entry.shape == twin.shape for entry in entries)


def budget_for(policy: SnapshotPolicy, needs: Needs) -> Budget:
    """Plan the snapshots.

    ``"auto"`` keeps every state where that takes 1 GiB at most, since then no step is repeated; else one in the
    square root of their number, or as many as fit.

    Raises:
        BudgetError: If the policy, or for ``"auto"`` any, takes more than there may be taken.
    """
    if needs.num_steps is None:
        cost = _WALK_COST[needs.curvature] + 1
        return Budget(
            interval_of("sqrt" if policy == "auto" else policy, None), None, None, _unknown(needs, cost), None, cost
        )
    candidates = _auto_intervals(needs.num_steps, needs) if policy == "auto" else [interval_of(policy, needs.num_steps)]
    for interval in candidates:
        nbytes = _nbytes(interval, needs)
        if nbytes <= needs.max_bytes:
            cost = _cost(interval, needs)
            text = _in_words(interval, nbytes, needs, cost)
            return Budget(interval, _num_states(interval, needs), nbytes, text, needs.num_steps, cost)
    raise BudgetError(
        f"The trajectory would take about {in_bytes(nbytes)} ({_counts(interval, needs)}), of "
        f"{in_bytes(needs.max_bytes)} that it may take. Choose {'' if policy == 'auto' else 'fewer snapshots, '}"
        "a shorter window (epochs=), another disk (dirpath=) or more bytes (max_bytes=)."
    )


def _auto_intervals(num_steps: int, needs: Needs) -> list[int | None]:
    """From most snapshots to fewest."""
    fitting = (needs.max_bytes - needs.record_bytes) // max(1, needs.state_bytes) - needs.num_epochs
    num_kept = needs.steps_on_disk
    num_fitting = int(min(num_kept, fitting))
    sparse = -(-num_kept // (num_fitting - 1)) if num_fitting >= 2 else max(1, num_kept)
    dense: list[int | None] = [1] if num_kept * needs.state_bytes <= _SMALL else []
    return [*dense, interval_of("sqrt", num_steps), sparse]


def _nbytes(interval: int | None, needs: Needs) -> int:
    return _num_states(interval, needs) * needs.state_bytes + needs.record_bytes


def _num_states(interval: int | None, needs: Needs) -> int:
    """Snapshots; those before an epoch come on top unless every state is kept."""
    return num_snapshots(needs.steps_on_disk or 1, interval) + (0 if interval == 1 else needs.num_epochs)


def _counts(interval: int | None, needs: Needs) -> str:
    snapshots = f"{_num_states(interval, needs)} snapshots of {in_bytes(needs.state_bytes)}"
    windows = " in two windows, the best model's and the latest" if needs.num_kept else ""
    return f"{snapshots} and {in_bytes(needs.record_bytes)} of records{windows}"


def _cost(interval: int | None, needs: Needs) -> float:
    cost = _WALK_COST[needs.curvature]
    if interval is not None and interval > 1:
        cost += (repeated_steps(interval, needs.slots) + 1) / interval
    return cost


def _in_words(interval: int | None, nbytes: int, needs: Needs, cost: float) -> str:
    return (
        f"Trajectory: about {in_bytes(nbytes)} ({_counts(interval, needs)}). "
        f"Retrace: about {cost:.1f} times the training of at most {needs.num_steps} steps."
    )


def _unknown(needs: Needs, cost: float) -> str:
    return (
        f"Trajectory: snapshots of {in_bytes(needs.state_bytes)}, as many as the run turns out to need. "
        f"Retrace: about {cost:.1f} times the training of the window."
    )


class Forecast:
    """Foresees what a trajectory takes, from what a Trainer is to do.

    Args:
        folder: Where the trajectory goes.
        options: The callback's.
        say: Prints a line.

    Attributes:
        budget: What the trajectory will take, once training has started.
    """

    def __init__(
        self,
        folder: Path,
        options: Options,
        say: Callable[[str], None],
    ) -> None:
        self._folder, self._snapshots, self._max_bytes, self._say = folder, options.snapshots, options.max_bytes, say
        self._epochs, self._curvature, self._is_at_best = options.epochs, options.curvature, options.at == "best"
        self.budget: Budget | None = None
        self._pace = StepTimer()

    def plan(self, trainer: Any, state: State, bytes_written: int) -> Budget:
        """Say what the trajectory will take.

        Args:
            trainer: The Trainer.
            state: The state before the first step.
            bytes_written: Bytes of the trajectory that are on disk by now.

        Raises:
            BudgetError: If that is too much.
        """
        state_bytes = expected_state_bytes(state, trainer.optimizers[0])
        num_windows = 2 if self._is_at_best and self._epochs != "all" else 1
        needs = Needs(
            num_steps=self._num_steps(trainer, trainer.max_epochs),
            batches_a_step=trainer.accumulate_grad_batches,
            state_bytes=state_bytes,
            slots=slots_for(state_bytes),
            max_bytes=self._allowed_bytes(bytes_written),
            curvature=self._curvature,
            num_epochs=0 if self._epochs == "all" else num_windows * (int(self._epochs) + 1),
            num_kept=None if num_windows == 1 else self._num_steps(trainer, trainer.max_epochs, num_windows),
        )
        self.budget = budget_for(self._snapshots, needs)
        self._say(self.budget.text)
        return self.budget

    def batch_begins(self, trainer: Any) -> None:
        """Once the first batches were timed, say how long it all will take."""
        if self._pace.batch_begins() and self.budget is not None:
            num_batches, accumulated = trainer.num_training_batches, trainer.accumulate_grad_batches
            in_all = window_length(num_batches, accumulated, trainer.max_epochs, trainer.max_steps, "all")
            self._say(self.budget.at_pace(accumulated * (self._pace.seconds or 0.0), in_all))

    def is_interrupted(self) -> None:
        """More than loading happens before the next batch: validation, or another epoch."""
        self._pace.is_interrupted()

    def summary(self, trainer: Any) -> dict[str, Any] | None:
        """The budget as plain values."""
        batch = self._pace.seconds
        step = None if batch is None else batch * trainer.accumulate_grad_batches
        return None if self.budget is None else self.budget.summary(step)

    def of_batches(self, trainer: Any, bytes_written: int) -> KeepPlan:
        """What is known of the run when batches are first to be kept."""
        is_endless = trainer.max_epochs in (None, -1)
        left = -1 if is_endless else trainer.max_epochs - trainer.current_epoch
        num_steps = self._num_steps(trainer, left, num_windows=1 + self._is_at_best)
        num_batches = math.inf if num_steps is None else num_steps * trainer.accumulate_grad_batches
        reaches_all = self._epochs == "all" or self._is_at_best
        first_epoch = 0 if reaches_all else (math.inf if is_endless else trainer.max_epochs) - int(self._epochs)
        planned = 0 if self.budget is None else self.budget.nbytes or 0
        return KeepPlan(num_batches, first_epoch, max(0, self._allowed_bytes(bytes_written) - planned))

    def _allowed_bytes(self, bytes_written: int) -> float:
        """Bytes that the trajectory may take, those already written included."""
        free = shutil.disk_usage(self._folder).free + bytes_written
        return min(free, self._max_bytes or math.inf)

    def _num_steps(self, trainer: Any, max_epochs: int | None, num_windows: int = 1) -> int | None:
        """Steps that a window, or so many of them, can have in so many epochs."""
        num_batches, accumulated = trainer.num_training_batches, trainer.accumulate_grad_batches
        return window_length(num_batches, accumulated, max_epochs, trainer.max_steps, self._epochs, num_windows)
