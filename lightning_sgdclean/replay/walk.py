# SPDX-License-Identifier: Apache-2.0
"""What a walk over recorded steps needs besides their record: module, data, engine, the optimizer's rule."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sgdclean.adjoint.curvature import Engine, engine_named
from lightning_sgdclean.adjoint.objective import ObjectiveGradient
from lightning_sgdclean.adjoint.optimizers import update_of
from lightning_sgdclean.adjoint.updates import Update
from lightning_sgdclean.base.errors import NonFiniteError
from lightning_sgdclean.base.options import Options, SampleId, SampleLosses
from lightning_sgdclean.base.randomness import RandomState
from lightning_sgdclean.data.batches import summable
from lightning_sgdclean.losses.evaluate import Surroundings, in_float32, in_half, is_low
from lightning_sgdclean.losses.verified import VerifiedSplit
from lightning_sgdclean.replay.fidelity import Fidelity
from lightning_sgdclean.trajectory.live_state import trained_parameters
from lightning_sgdclean.trajectory.records import State, Step


@dataclass
class Walk:
    """Everything that :func:`lightning_sgdclean.adjoint.backward.retrace_steps` needs besides the trajectory.

    Attributes:
        module: The LightningModule, whose parameters and buffers the walk overwrites.
        params: Those that the optimizer moves, by name.
        surroundings: What stands for the Trainer.
        batch_of: Content of micro-batch ``i`` of a step, as ``training_step`` got it.
        random_of: Random state before micro-batch ``i`` of a step.
        restore_attributes: Undoes what a ``training_step`` did to the module's plain attributes.
        engine: Scores and Hessian's product.
        update: The optimizer's rule.
        fidelity: What the replay is held against.
        sample_losses: The user's own split of the loss.
        split: The split that was found, where the user gives none.
        widens: Whether derivatives of a run in 16 bits are taken in float32.
        labels_of: Gives labels that the samples could have had, ``(B,)``, where the influence of that is wanted.
    """

    module: Any
    params: dict[str, nn.Parameter]
    surroundings: Surroundings
    batch_of: Callable[[Step, int], Any]
    random_of: Callable[[Step, int], RandomState]
    restore_attributes: Callable[[], None]
    engine: Engine
    update: Update
    fidelity: Fidelity
    sample_losses: SampleLosses | None = None
    split: VerifiedSplit | None = None
    widens: bool = False
    labels_of: Callable[[list[SampleId]], Tensor] | None = None

    def pulling(self) -> AbstractContextManager[Surroundings]:
        """Context to take derivatives in, and what stands for the Trainer there."""
        return in_float32(self.module, self.surroundings) if self.widens else nullcontext(self.surroundings)


def walk_of(
    module: Any,
    optimizer: Optimizer,
    surroundings: Surroundings,
    options: Options,
    hooks: list[str],
    *,
    batch_of: Callable[[Step, int], Any],
    random_of: Callable[[Step, int], RandomState],
    restore_attributes: Callable[[], None],
) -> Walk:
    """Put a walk together from the callback's options; ``hooks`` are those that could edit gradients."""
    params = trained_parameters(module, optimizer)
    is_double = next(iter(params.values())).dtype is torch.float64
    tolerance = (1e-12 if is_double else 1e-5) if options.tolerance is None else options.tolerance
    return Walk(
        module=module,
        params=params,
        surroundings=surroundings,
        batch_of=batch_of,
        random_of=random_of,
        restore_attributes=restore_attributes,
        engine=engine_named(options.curvature, options.finite_radius),
        update=update_of(optimizer),
        fidelity=Fidelity(tolerance, options.on_mismatch, hooks),
        sample_losses=options.sample_losses,
        split=None if options.sample_losses else VerifiedSplit(module, list(params.values()), surroundings),
        widens=_widens(options.retrace_precision, surroundings, module),
    )


def _widens(wanted: str, surroundings: Surroundings, module: nn.Module) -> bool:
    if not is_low(surroundings, module):
        return False
    return wanted == "float32" or (wanted == "auto" and in_half(surroundings))


@dataclass
class Adjoint:
    """Derivatives of the objective by what a step leaves behind: ``lambda``, ``mu`` and ``nu``.

    They are sums over many steps, so they are kept in float32 even where the parameters are not.
    """

    params: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]
    buffers: dict[str, Tensor]


def adjoint_of(start: ObjectiveGradient, walk: Walk, sign: float = 1.0) -> Adjoint:
    """Where the walk starts: ``lambda`` and ``nu`` from the objective times ``sign``, ``mu`` zero."""
    params = {name: sign * summable(tensor) for name, tensor in zip(walk.params, start.params, strict=True)}
    return Adjoint(params, {}, {name: sign * summable(tensor) for name, tensor in start.buffers.items()})


@torch.no_grad()
def load_state(module: nn.Module, params: dict[str, nn.Parameter], state: State) -> None:
    """Copy recorded parameters and buffers into the live module."""
    for name, param in params.items():
        param.copy_(state.params[name])
    for name, buffer in module.named_buffers():
        buffer.copy_(state.buffers[name])


def check_finite(steps: list[Step]) -> None:
    """Refuse a run that diverged, before anything is computed from it.

    Raises:
        NonFiniteError: If a recorded loss is not finite; names the first such step.
    """
    for step in steps:
        for micro in step.micro if step.is_update else ():
            if micro.loss is not None and not math.isfinite(float(micro.loss)):
                raise NonFiniteError(
                    f"The training loss at step {step.index} (epoch {step.epoch}) was {float(micro.loss)}: "
                    "samples cannot be ranked by a run that diverged. Lower the learning rate or clip the gradients."
                )
