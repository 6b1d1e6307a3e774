# SPDX-License-Identifier: Apache-2.0
"""Retrace one step while training is young: what cannot be followed shows now, not after hours of training."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_sgdclean.adjoint.backward import load_state, retrace_step
from lightning_sgdclean.adjoint.curvature import gradient
from lightning_sgdclean.adjoint.stop_gradients import dependence_on_stops
from lightning_sgdclean.base.errors import UnsupportedOperationError
from lightning_sgdclean.base.randomness import set_random_state, untouched_randomness
from lightning_sgdclean.data.batches import cloned
from lightning_sgdclean.losses.evaluate import Surroundings, eagerly, plain_training_loss, untouched_module
from lightning_sgdclean.losses.precision import as_float32, summable, widened
from lightning_sgdclean.replay.forward import borrowed, live_state, load_all, repeat_step
from lightning_sgdclean.replay.states import compare
from lightning_sgdclean.replay.walk import Adjoint, RetraceOptions, Walk, walk_of
from lightning_sgdclean.trajectory.flat_state import flatten, unflatten
from lightning_sgdclean.trajectory.records import MicroBatch, State, Step


class Rehearsal:
    """Keeps the first step that moved anything until the step after it was made, and then runs it again.

    Only then, because what a hook changes between two steps shows only then.
    """

    def __init__(self) -> None:
        self._batches: dict[int, Any] = {}
        self._before: State | None = None
        self._kept: tuple[Step, State, State] | None = None
        self.is_due = False

    def begin_batch(self, micro: MicroBatch, batch: Any, live: State) -> None:
        """A batch is about to be trained on."""
        if self._kept is not None:
            return
        if self._before is None:
            self._before = _copy(live)
        self._batches[id(micro)] = cloned(batch)

    def commit(self, step: Step | None, live: State) -> None:
        """The optimizer has stepped."""
        if self._kept is not None:
            self.is_due = True
            return
        if step is not None and self._before is not None and _is_telling(step):
            self._kept = step, self._before, _copy(live)
        else:
            self._batches.clear()
        self._before = None

    def leave(self) -> None:
        """The batches that waited will never make a step."""
        if self._kept is None:
            self._batches.clear()
            self._before = None

    def run(
        self,
        module: Any,
        optimizer: Any,
        surroundings: Surroundings,
        options: RetraceOptions,
        hooks: list[str],
        *,
        forward: bool = False,
    ) -> list[str]:
        """Retrace the kept step from an arbitrary adjoint, and if need be repeat it forward.

        The module, its optimizer and the random state stay as they are.

        Returns:
            Complaints, where mismatches are only warned about.

        Raises:
            SGDInfluenceError: What the retrace of the whole window would raise at this step.
        """
        assert self._kept is not None
        step, before, after = self._kept
        with (
            torch.enable_grad(),
            untouched_randomness(surroundings.device),
            untouched_module(module) as restore,
            surroundings.as_stage("train"),
        ):
            walk = walk_of(
                module,
                optimizer,
                surroundings,
                options,
                hooks,
                # Copies: a training_step may write into its batch.
                batch_of=lambda step, i: cloned(self._batches[id(step.micro[i])]),
                random_of=lambda step, i: step.micro[i].random,
                restore_attributes=restore,
            )
            ones = {name: torch.ones_like(summable(param.detach())) for name, param in walk.params.items()}
            retrace_step(step, before, after, [Adjoint(ones, {}, {})], walk, check_update=True)
            _check_stops(step, before, walk)
            if forward:
                with borrowed(optimizer) as own:
                    load_all(walk, own, before)
                    repeat_step(step, walk, own)
                    walk.fidelity.compare_segment([step], *compare(live_state(walk, own), after, before))
        return walk.fidelity.complaints


def _check_stops(step: Step, before: State, walk: Walk) -> None:
    """Does the gradient depend on values that the parameters move behind ``detach`` or ``no_grad``?"""
    micro, content, params = step.micro[0], walk.batch_of(step, 0), list(walk.params.values())
    with widened(walk.module, walk.surroundings) as surroundings:
        if surroundings is not walk.surroundings:
            content = as_float32(content)

        def gradient_under(mode: TorchFunctionMode) -> list[Tensor]:
            load_state(walk.module, walk.params, before)
            set_random_state(walk.random_of(step, 0), surroundings.device)
            surroundings.set_clock(micro.epoch, step.index)
            with eagerly(), mode:
                loss = plain_training_loss(walk.module, cloned(content), micro.batch_idx, surroundings)
            walk.restore_attributes()
            return gradient([loss], list(params))

        moved = dependence_on_stops(gradient_under, params)
    if moved:
        text = (
            "training_step stops gradients (detach, data, item or no_grad) at values that the parameters move, and the "
            f"gradient depends on them: moved by a hundredth, they move it by {moved:.1e} of its length. How a "
            "sample's effect travels through such values is not followed. Let the gradient through, or compute them "
            "from what is not trained."
        )
        if walk.fidelity.on_mismatch == "raise":
            raise UnsupportedOperationError(f'{text} on_mismatch="warn" leaves that part of the effect out.')
        walk.fidelity.complaints.append(text)


def _is_telling(step: Step) -> bool:
    """Whether the step moved anything, from losses that are numbers."""
    finite = all(micro.loss is not None and math.isfinite(float(micro.loss)) for micro in step.micro)
    return finite and step.is_update and any(_number(group.get("lr", 1.0)) != 0 for group in step.groups)


def _number(value: Any) -> float:
    return float(value.item() if isinstance(value, Tensor) else value)


def _copy(live: State) -> State:
    layout, flat = flatten(live)
    return unflatten(layout, flat)
