# SPDX-License-Identifier: Apache-2.0
"""Whether a retrace in 16 bits says anything: its last steps beside the same in float32."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from lightning_sgdclean.adjoint.adjoints import Adjoint
from lightning_sgdclean.adjoint.backward import retrace_steps
from lightning_sgdclean.adjoint.walk import Walk
from lightning_sgdclean.replay.fidelity import Fidelity
from lightning_sgdclean.trajectory.records import States, Step

_MIN_STEPS, _SHARE = 16, 20  # compared: 16 steps at least, and every 20th of a long window
_NOISE_BELOW = 0.9  # cosine


@dataclass(frozen=True)
class Float32Agreement:
    """Influences over the last steps of the window, taken in the run's precision and in float32.

    Attributes:
        num_steps: How many steps were compared.
        cosine: Of the two vectors of influences; 1 is perfect, and 0 is no relation at all.
    """

    num_steps: int
    cosine: float

    @property
    def is_noise(self) -> bool:
        """Whether the ranking should not be trusted."""
        return not self.cosine >= _NOISE_BELOW

    def complaint(self, precision: str) -> str:
        """A warning in words."""
        return (
            f"The influences of this {precision} run are mostly rounding noise: over its last {self.num_steps} steps "
            f"their cosine with those of a float32 retrace is {self.cosine:.2f}. Do not trust the ranking. "
            'Use retrace_precision="float32".'
        )


def float32_agreement(
    states: States, steps: list[Step], walk: Walk, start: Callable[[Walk], list[Adjoint]]
) -> Float32Agreement:
    """Retrace the end of the window twice.

    Args:
        states: Those between the steps.
        steps: The window.
        walk: The walk in the run's own precision.
        start: Gives the adjoints that a walk starts with; the first is compared.
    """
    tail = steps[-max(_MIN_STEPS, len(steps) // _SHARE) :]
    found = []
    for widens in (False, True):
        # Mismatches are ignored here; the walk itself checks these steps.
        silent = replace(
            walk, widens=widens, checks=None, replay=replace(walk.replay, fidelity=Fidelity(math.inf, "warn"))
        )
        found.append(retrace_steps(states, tail, start(silent)[:1], silent, lambda _: None).values[0].numpy())
    lengths = [float(np.linalg.norm(values)) for values in found]
    cosine = float(found[0] @ found[1]) / (lengths[0] * lengths[1]) if all(lengths) else math.nan
    return Float32Agreement(len(tail), cosine)
