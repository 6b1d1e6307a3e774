# SPDX-License-Identifier: Apache-2.0
"""A micro-batch of a recorded step, to be evaluated and linearised at the live parameters again and again."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from lightning_sgdclean.adjoint.curvature import Engine, Finite, Linearised
from lightning_sgdclean.base.randomness import set_random_state
from lightning_sgdclean.data.batches import as_float32, cloned
from lightning_sgdclean.data.fingerprints import batch_digest
from lightning_sgdclean.losses.evaluate import Evaluated, Surroundings, training_loss
from lightning_sgdclean.losses.running_statistics import BatchStatistic
from lightning_sgdclean.losses.weighting import OtherLabels, SplitPlan, unit_weights
from lightning_sgdclean.replay.walk import Walk
from lightning_sgdclean.trajectory.records import Step


class MicroStep:
    """A micro-batch of a step, ready to be evaluated at the live parameters again and again."""

    def __init__(self, step: Step, number: int, walk: Walk) -> None:
        self.micro, self._step, self._walk = step.micro[number], step, walk
        self._random = walk.random_of(step, number)
        self._batch = walk.batch_of(step, number)
        walk.fidelity.compare_batch(step, number, batch_digest(self._batch, len(self.micro.ids)))
        self._buffers: dict[str, Tensor] | None = None
        self._plan: SplitPlan | None = None
        self._references: dict[str, dict[int, Tensor]] = {}
        self._labels = None if walk.labels_of is None else walk.labels_of(self.micro.ids)
        self._is_relabelled = True

    def open(
        self, params: list[nn.Parameter], engine: Engine, surroundings: Surroundings, needs_gradient: bool = False
    ) -> Linearised:
        """Evaluate with an engine: in the run's own surroundings, or in those that widen it to float32."""
        weights = unit_weights(len(self.micro.ids), params)
        if self._labels is not None:  # the engine does not mind that half of the weights are amounts
            weights = torch.cat([weights, torch.zeros_like(weights)]).detach().requires_grad_()
        evaluate = partial(self._evaluate, surroundings)
        return engine(evaluate, params, weights, needs_gradient)

    @property
    def unknown(self) -> Tensor:
        """Which samples' labels could not be changed, ``(B,)``."""
        assert self._labels is not None
        return (self._labels < 0) | (not self._is_relabelled)

    def statistics(self, params: list[nn.Parameter], surroundings: Surroundings) -> list[BatchStatistic]:
        """Its updates of running statistics, with their graph."""
        return self._loss(surroundings, unit_weights(len(self.micro.ids), params), None).updates

    def _evaluate(self, surroundings: Surroundings, weights: Tensor) -> Evaluated:
        """The loss as it was differentiated: divided by the number of accumulated micro-batches, and scaled."""
        split = self._walk.split
        evaluate = partial(self._loss, surroundings, weights)
        if split is None or self._plan is not None:
            evaluated = evaluate(self._plan)
        else:
            with torch.enable_grad():
                micro = replace(self.micro, random=self._random)
                self._plan, evaluated = split.plan_for(evaluate, micro, self._batch)
        evaluated.loss = evaluated.loss / self._step.divisor
        if surroundings is self._walk.surroundings and self.micro.scale != 1.0:
            evaluated.loss = evaluated.loss * self.micro.scale
        return evaluated

    def _loss(self, surroundings: Surroundings, weights: Tensor, plan: SplitPlan | None) -> Evaluated:
        walk = self._walk
        is_own = surroundings is walk.surroundings
        live = dict(walk.module.named_buffers())
        if self._buffers is None:
            self._buffers = {name: buffer.detach().clone() for name, buffer in live.items()}
        for name, buffer in live.items():
            buffer.copy_(self._buffers[name])
        set_random_state(self._random, surroundings.device)
        surroundings.set_clock(self.micro.epoch, self.micro.global_step)
        batch = cloned(self._batch)  # training_step may write to it
        num, others = len(self.micro.ids), None
        if self._labels is not None and len(weights) > num:
            others = OtherLabels(self._labels, weights[num:])
        evaluated = training_loss(
            walk.module,
            batch if is_own else as_float32(batch),
            self.micro.batch_idx,
            weights[:num],
            surroundings,
            walk.sample_losses,
            plan=plan,
            references=self._references.setdefault(surroundings.precision, {}),
            others=others,
        )
        walk.restore_attributes()
        self._is_relabelled &= others is None or (others.is_whole and walk.sample_losses is None)
        return evaluated


def open_all(
    batches: list[MicroStep], params: list[nn.Parameter], walk: Walk, needs_gradient: bool
) -> tuple[list[Linearised], list[Tensor] | None]:
    """Evaluate the step's batches in order; their summed gradient, where it was computed."""
    if len(batches) == 1:
        engine = Finite() if walk.widens else walk.engine
        opened = [batches[0].open(params, engine, walk.surroundings, needs_gradient)]
        return opened, opened[0].gradient
    # Accumulated: the cotangent needs the sum over all batches first, and their graphs are not kept meanwhile.
    opened = [batch.open(params, Finite(), walk.surroundings, needs_gradient=True) for batch in batches]
    total = [torch.zeros_like(param) for param in params]
    for one in opened:
        torch._foreach_add_(total, one.gradient or [])
    return opened, total
