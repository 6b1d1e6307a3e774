# SPDX-License-Identifier: Apache-2.0
"""What a walk carries back: derivatives of an objective by what each step left behind."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_sgdclean.adjoint.objective import ObjectiveGradient
from lightning_sgdclean.data.batches import summable
from lightning_sgdclean.trajectory.averages import Averages
from lightning_sgdclean.trajectory.records import Step


@dataclass
class Adjoint:
    """Derivatives of the objective by what a step leaves behind: ``lambda``, ``mu`` and ``nu``.

    They are sums over many steps, so they are kept in float32 even where the parameters are not.

    Attributes:
        params: ``lambda``, by parameter.
        optimizer: ``mu``, by parameter and entry.
        buffers: ``nu``, by buffer and teacher.
        entering: What of the objective's derivative comes in on the way, where it is of averages of the weights.
    """

    params: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]
    buffers: dict[str, Tensor]
    entering: "Entering | None" = None

    def pass_by(self, step: Step) -> None:
        """Take in what the averages hold of what a step left behind; to be called before the step is taken back."""
        if self.entering is not None:
            self.params = self.entering.added(self.params, self.entering.params, step)
            self.buffers = self.entering.added(self.buffers, self.entering.buffers, step)

    @property
    def norm(self) -> float:
        """Length of ``lambda``."""
        return float(torch.stack(torch._foreach_norm([*self.params.values()])).norm())


@dataclass(frozen=True)
class Entering:
    """The objective's derivative by averages of the weights, which comes in where these were averaged.

    Attributes:
        averages: The averages.
        params: Derivative by each averaged parameter that is trained.
        buffers: By each averaged buffer and teacher.
    """

    averages: Averages
    params: dict[str, Tensor]
    buffers: dict[str, Tensor]

    def added(self, adjoint: dict[str, Tensor], by: dict[str, Tensor], step: Step) -> dict[str, Tensor]:
        """A part of an adjoint, and what comes in of what a step left behind."""
        weights = {name: self.averages.weight_of(name, step.index) for name in by}
        new = {name: weight * by[name] for name, weight in weights.items() if weight}
        return adjoint | {name: adjoint[name] + one if name in adjoint else one for name, one in new.items()}

    @property
    def norm(self) -> float:
        """Length of the derivative by parameters."""
        return Adjoint(self.params, {}, {}).norm


def adjoint_of(
    start: ObjectiveGradient, params: dict[str, nn.Parameter], sign: float = 1.0, averages: Averages | None = None
) -> Adjoint:
    """Where the walk starts: ``lambda`` and ``nu`` from the objective times ``sign``, ``mu`` zero.

    Args:
        start: The objective.
        params: The trained parameters.
        sign: The factor.
        averages: Those that the objective is of, if it is: then ``lambda`` and ``nu`` start from zero.
    """
    by_param = {name: sign * summable(tensor) for name, tensor in zip(params, start.params, strict=True)}
    by_buffer = {name: sign * summable(tensor) for name, tensor in start.buffers.items()}
    if averages is None:
        return Adjoint(by_param, {}, by_buffer)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in by_param.items()}
    return Adjoint(zeros, {}, {}, Entering(averages, by_param, by_buffer))
