# SPDX-License-Identifier: Apache-2.0
"""A micro-batch of a recorded step at hand again, to be trained on: as it was, or without some of its samples."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_sgdclean.base.errors import LossSplitError
from lightning_sgdclean.base.randomness import set_random_state
from lightning_sgdclean.data.batches import cloned
from lightning_sgdclean.data.fingerprints import batch_digest
from lightning_sgdclean.losses.evaluate import Evaluated, plain_training_loss, weighted_training_loss
from lightning_sgdclean.losses.weighting import LossCall, SplitPlan, is_planned, unit_weights
from lightning_sgdclean.replay.walk import Walk
from lightning_sgdclean.trajectory.records import Step


class BatchAgain:
    """A micro-batch of a recorded step at hand again, to be trained on as often as wanted.

    Attributes:
        micro: Its record.
        plan: Which rows of its loss belong to which sample, once that was found out.

    Raises:
        ReplayMismatchError: If it is not the batch that was recorded.
    """

    def __init__(self, step: Step, number: int, walk: Walk) -> None:
        self.micro, self._walk = step.micro[number], walk
        self.plan: SplitPlan | None = None
        self._batch = walk.batch_of(step, number)
        self._random = walk.random_of(step, number)
        walk.fidelity.compare_batch(step, number, batch_digest(self._batch, len(self.micro.ids)))

    def loss(self, weights: Tensor | None = None) -> Tensor:
        """The loss at the live parameters: as training had it, or with weights ``(B,)`` on its samples.

        What the step does to the module's plain attributes is left to be undone.

        Raises:
            LossSplitError: If the loss is made otherwise than when its plan was found; see :meth:`find_plan`.
        """
        if weights is not None:
            return self._weighted_loss(weights)
        return plain_training_loss(self._walk.module, self._set_up(), self.micro.batch_idx, self._walk.surroundings)

    def _weighted_loss(self, weights: Tensor) -> Tensor:
        loss, calls = self._weighted(weights, self.plan)
        if self.plan is not None and not is_planned(calls, self.plan):
            raise LossSplitError(
                f"The loss of batch {self.micro.batch_idx} of epoch {self.micro.epoch} is made by other loss calls "
                "once samples are left out, so it is not known which part of it is whose. Give sample_losses=."
            )
        return loss

    def find_plan(self) -> Tensor:
        """Prove at the live parameters which part of the loss is whose; the loss, as the parts give it.

        Raises:
            LossSplitError: If it cannot be split by sample.
        """
        walk = self._walk
        contents = {name: buffer.detach().clone() for name, buffer in walk.module.named_buffers()}

        def evaluate(plan: SplitPlan | None) -> Evaluated:
            loss, calls = self._weighted(unit_weights(len(self.micro.ids), list(walk.params.values())), plan)
            with torch.no_grad():
                for name, buffer in walk.module.named_buffers():  # by name: a step may put a new one in its place
                    buffer.copy_(contents[name])
            walk.restore_attributes()
            return Evaluated(loss, [], calls)

        if walk.split is None:
            return evaluate(None).loss.detach()
        self.plan, evaluated = walk.split.plan_for(evaluate, replace(self.micro, random=self._random), self._batch)
        return evaluated.loss.detach()

    def _weighted(self, weights: Tensor, plan: SplitPlan | None) -> tuple[Tensor, list[LossCall]]:
        walk = self._walk
        return weighted_training_loss(
            walk.module, self._set_up(), self.micro.batch_idx, weights, walk.surroundings, walk.sample_losses, plan
        )

    def _set_up(self) -> Any:
        """Random state and clock as they were, and a copy of the batch: ``training_step`` may write to it."""
        set_random_state(self._random, self._walk.surroundings.device)
        self._walk.surroundings.set_clock(self.micro.epoch, self.micro.global_step)
        return cloned(self._batch)
