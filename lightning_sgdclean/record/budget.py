# SPDX-License-Identifier: Apache-2.0
"""Before the first step: what the trajectory will take, and the policy of snapshots that fits."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_sgdclean.base.errors import BudgetError
from lightning_sgdclean.record.keeping import in_bytes
from lightning_sgdclean.record.pace import in_time
from lightning_sgdclean.trajectory.records import State
from lightning_sgdclean.trajectory.schedule import interval_of, num_snapshots, repeated_steps

_SMALL = 1 << 30  # bytes; "auto" keeps the state of every step where that takes no more
_RECORD_BYTES = 8 << 10  # of a micro-batch besides kept batches: torch's random state, above all
# One step of the walk backwards, in training steps; see docs/cost.md.
_WALK_COST = {"exact": 2.7, "finite": 2.7, "none": 2.3}

SnapshotPolicy = Literal["auto", "every", "sqrt"] | int


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
