# SPDX-License-Identifier: Apache-2.0
"""A recorded micro-batch, evaluated again by the user's own ``training_step``: the one place where that is done."""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_sgdclean.base.errors import LossSplitError
from lightning_sgdclean.base.options import SampleLosses, WeightedLoss
from lightning_sgdclean.base.randomness import set_random_state
from lightning_sgdclean.data.batches import Variant, cloned
from lightning_sgdclean.data.parts import neighbour_variant
from lightning_sgdclean.losses.contents import write_changed
from lightning_sgdclean.losses.loss_inputs import LossInputs
from lightning_sgdclean.losses.other_labels import LabelledWeights, OtherLabels
from lightning_sgdclean.losses.own_rows import weights_under
from lightning_sgdclean.losses.running_statistics import IndependentSamples, RunningStatistics
from lightning_sgdclean.losses.stopped_values import TeachersOutputs
from lightning_sgdclean.losses.surroundings import Surroundings, eagerly, ignore, logging_to
from lightning_sgdclean.losses.watched_calls import LEAVING, WatchedCalls
from lightning_sgdclean.losses.weighting import Evaluated, SampleWeights, SplitPlan, is_planned, scalar_of, unit_weights
from lightning_sgdclean.trajectory.records import MicroBatch
from lightning_sgdclean.trajectory.teachers import teachers_of

Watchers = Sequence[AbstractContextManager[Any]]


class Split(Protocol):
    """Knows whose the parts of a loss are: :class:`lightning_sgdclean.losses.verified.VerifiedSplit`."""

    def plan_for(
        self, evaluate: Callable[[SplitPlan | None], Evaluated], batch: "RecordedBatch"
    ) -> tuple[SplitPlan, Evaluated]:
        """Evaluate a batch under the plan that holds for it."""


@dataclass(eq=False)
class RecordedBatch:
    """A micro-batch of a recorded step, evaluated at the module's present parameters as often as wanted.

    Every evaluation goes through :meth:`call`: with the step's random state and clock, on a copy of the batch.

    Attributes:
        module: The LightningModule.
        params: Its trained parameters.
        micro: The batch's record, with the random state before it.
        content: The batch as ``training_step`` gets it.
        surroundings: What stands for the Trainer.
        restore: Puts the module's plain attributes back.
        sample_losses: The user's own ``(module, batch) -> (B,)``, whose mean stands for the loss where it is weighted.
        weighted_loss: The user's own ``(module, batch, weights) -> scalar``, which stands for it likewise.
        split: Whose the parts of the loss are, where the user does not say it.
        divisor: By how much the loss is divided, since so many micro-batches are accumulated.
        scratch: Buffers that hold NaN before every evaluation by :meth:`evaluate_under`, to prove that none reads them.
        teachers: Parameters that follow the trained ones, by name; found where they are not given.
        began: What they held where the step began, where that is not the first evaluation.
        is_relabelled: Whether every evaluation with other labels found where to put them.
        manner: How the loss was made when it was last evaluated with a graph: its operations, and what left the graph.
    """

    module: Any
    params: list[nn.Parameter]
    micro: MicroBatch
    content: Any
    surroundings: Surroundings
    restore: Callable[[], None]
    sample_losses: SampleLosses | None = None
    weighted_loss: WeightedLoss | None = None
    split: Split | None = None
    divisor: int = 1
    scratch: frozenset[str] = frozenset()
    teachers: dict[str, nn.Parameter] | None = None
    began: dict[str, Tensor] = field(default_factory=dict)
    is_relabelled: bool = field(default=True, init=False)
    manner: tuple[frozenset[Any], frozenset[Any]] | None = field(default=None, init=False)
    _plan: SplitPlan | None = field(default=None, init=False)
    _buffers: dict[str, Tensor] = field(default_factory=dict, init=False)  # before the first evaluation
    _references: dict[str, dict[int, Tensor]] = field(default_factory=dict, init=False)  # by precision

    def __post_init__(self) -> None:
        self._alike = teachers_of(self.module, self.params)  # shaken parameters may move more of them than the run did
        self._teachers = self._alike if self.teachers is None else self.teachers

    def __len__(self) -> int:
        return len(self.micro.ids)

    def variant(self) -> Variant:
        """The batch with samples replaced by others that came from the same loader."""
        return neighbour_variant(self.content, self.micro.sizes)

    def weights(self) -> Tensor:
        """A weight of 1 for each sample, ``(B,)``, to differentiate by."""
        return unit_weights(len(self), self.params)

    def evaluate(
        self,
        weights: Tensor,
        labels: Tensor | None = None,
        surroundings: Surroundings | None = None,
        *,
        inputs: LossInputs | None = None,
    ) -> Evaluated:
        """The loss that was differentiated in training, divided and scaled, as a function of its samples' weights.

        Args:
            weights: ``(B,)``, all one; with ``labels`` ``(2 B,)``, the second half the amounts of the other labels.
            labels: For each sample a class that it could have had, ``(B,)``.
            surroundings: Those that widen a run in 16 bits to float32; by default the run's own.
            inputs: Cuts the graph where the loss begins.

        Raises:
            LossSplitError: If the loss cannot be split by sample, or there is none.
            UnsupportedOperationError: If an operation is used whose derivative is not followed.
        """
        under = self.evaluate_under
        evaluate = partial(under, weights=weights, labels=labels, surroundings=surroundings, inputs=inputs)
        if self.split is None or self._plan is not None:
            evaluated = evaluate(self._plan)
        else:
            with torch.enable_grad():
                self._plan, evaluated = self.split.plan_for(evaluate, self)
        evaluated.loss = evaluated.loss / self.divisor
        is_own = surroundings is None or surroundings is self.surroundings
        if self.micro.scale != 1.0 and (is_own or not self.micro.scale):
            evaluated.loss = evaluated.loss * self.micro.scale
        return evaluated

    def evaluate_under(
        self,
        plan: SplitPlan | None,
        weights: Tensor,
        labels: Tensor | None = None,
        surroundings: Surroundings | None = None,
        *,
        independent: bool = False,
        inputs: LossInputs | None = None,
    ) -> Evaluated:
        """The loss with its graph, which can be differentiated twice; neither divided nor scaled.

        Running statistics start each time from what they were before the first evaluation.

        Args:
            plan: Which rows of which loss call belong to which sample.
            weights: As for :meth:`evaluate`, and so are the next two.
            labels: See there.
            surroundings: See there.
            independent: For a probe, whether to fix BatchNorm and dropout, so that no sample moves another's loss.
            inputs: As for :meth:`evaluate`.
        """
        if not self._buffers:
            self._buffers = self._contents()
            for name in self.scratch:
                self._buffers[name].fill_(math.nan)
        self._put_back(self._buffers)
        own, others = weights[: len(self)], None
        references = self._references.setdefault((surroundings or self.surroundings).precision, {})
        stopped = TeachersOutputs(self.module, self._teachers) if self._teachers and not independent else None
        norms = IndependentSamples() if independent else RunningStatistics(self.module, stopped)
        weighing = weights_under(plan, own, {} if independent else references, self.micro.sizes)
        if labels is not None and len(weights) > len(self):
            others = OtherLabels(labels, weights[len(self) :])
            weighing = LabelledWeights(own, plan, references, others, self.micro.sizes)
        watched = WatchedCalls(self.module)
        watchers, last = [*([stopped] if stopped else ()), norms, watched], [] if inputs is None else [inputs]
        if self.own_loss is None:
            loss = weighing.weighted(self.call([*watchers, weighing, *last], surroundings))
        else:
            loss = self._own(own, [*watchers, *last], surroundings)
        self.is_relabelled &= others is None or (others.is_whole and self.own_loss is None)
        if loss.grad_fn is not None and not independent:
            self.manner = watched.manner(loss, *(one.value for cut in last for one in cut.found))
        if stopped is not None:
            named = {id(param): name for name, param in self.module.named_parameters()}
            stopped.relate(self.began or self._buffers, {named[id(param)]: param for param in self.params})
            for update in norms.updates:
                update.value = stopped.with_graph(update.value)
        return Evaluated(loss, norms.updates, weighing.calls, norms.leaves, stopped)

    @property
    def leaves_torch(self) -> bool:
        """Whether numbers that the parameters move left torch when it was last evaluated with a graph."""
        return self.manner is not None and not LEAVING.isdisjoint(name for name, _ in self.manner[1])

    def elsewhere(self) -> "RecordedBatch":
        """The same batch, split as it was here, to be evaluated at other parameters."""
        other = replace(self)
        other._plan = self._plan
        return other

    def watched(self, weighing: SampleWeights) -> Evaluated:
        """The loss with its graph and the loss calls that it is made of, to be differentiated once; any kernel."""
        return Evaluated(weighing.weighted(self.call([weighing])), [], weighing.calls)

    def find_plan(self) -> Tensor:
        """Prove at the present parameters which part of the loss is whose; the loss, as the parts give it.

        Raises:
            LossSplitError: If it cannot be split by sample.
        """
        contents = self._contents()

        def evaluate(plan: SplitPlan | None) -> Evaluated:
            evaluated = self.watched(weights_under(plan, self.weights(), sizes=self.micro.sizes))
            self._put_back(contents)
            return evaluated

        if self.split is not None:
            self._plan, evaluated = self.split.plan_for(evaluate, self)
            return evaluated.loss.detach()
        loss = self.loss(self.weights()).detach()
        self._put_back(contents)
        self.restore()
        return loss

    def loss(self, weights: Tensor | None = None) -> Tensor:
        """The loss to be trained on: as training had it, or with weights ``(B,)`` on its samples; any kernel.

        What the step did to the module's plain attributes is left to be undone after the backward pass.

        Raises:
            LossSplitError: If the loss is made otherwise than when its plan was found; see :meth:`find_plan`.
        """
        if weights is None:
            return self.call(restores=False)
        if self.own_loss is not None:
            return self._own(weights, [], restores=False)
        weighing = weights_under(self._plan, weights, sizes=self.micro.sizes)
        loss = weighing.weighted(self.call([weighing], restores=False))
        if self._plan is not None and not is_planned(weighing.calls, self._plan):
            raise LossSplitError(
                f"The loss of batch {self.micro.batch_idx} of epoch {self.micro.epoch} is made by other loss calls "
                "once samples are left out, so it is not known which part of it is whose. Give sample_losses=."
            )
        return loss

    def as_trained(self) -> Tensor:
        """The loss that ``training_step`` gives, divided and scaled, whatever stands for it elsewhere."""
        contents = self._contents()
        with torch.no_grad():
            loss = self.call() / self.divisor * self.micro.scale
        self._put_back(contents)
        return loss

    def call(
        self,
        watchers: Watchers | None = None,
        surroundings: Surroundings | None = None,
        function: SampleLosses | None = None,
        *,
        restores: bool = True,
    ) -> Tensor:
        """Call ``training_step`` as the step did, and give the loss.

        Args:
            watchers: Entered around the call, in this order. Compiled parts then run as they were written, since what
                was compiled without the watchers passes by them.
            surroundings: As for :meth:`evaluate`.
            function: Instead of ``training_step``, a callable ``(module, batch)``.
            restores: Whether to put the module's plain attributes back.

        Raises:
            LossSplitError: If ``training_step`` gives no loss.
        """
        own = surroundings or self.surroundings
        set_random_state(self.micro.random, own.device)
        own.set_clock(self.micro.epoch, self.micro.global_step)
        batch = own.widen(cloned(self.content))  # training_step may write to it
        with ExitStack() as stack:
            if restores:
                stack.callback(self.restore)
            if watchers is not None:
                stack.enter_context(eagerly())
            stack.enter_context(logging_to(self.module, ignore))
            stack.enter_context(own.train_context())
            for watcher in watchers or ():
                if isinstance(watcher, SampleWeights):
                    watcher.begin(batch)
                stack.enter_context(watcher)
            step = self.module.training_step
            arguments = (batch, self.micro.batch_idx) if takes_batch_idx(step) else (batch,)
            if function is not None:
                loss: Tensor = function(self.module, batch)
            elif own.manual_steps is not None:
                with own.manual_steps() as manual:
                    step(*arguments)
                loss = manual.loss
            else:
                loss = _loss_in(step(*arguments))
        return loss

    @property
    def own_loss(self) -> str | None:
        """What of the user's own stands for the loss where it is weighted, in words; None if nothing does."""
        if self.weighted_loss is not None:
            return "weighted_loss= at weights of 1"
        return None if self.sample_losses is None else "the mean of sample_losses="

    def _own(
        self, weights: Tensor, watchers: Watchers, surroundings: Surroundings | None = None, *, restores: bool = True
    ) -> Tensor:
        """The loss with weights ``(B,)`` on its samples, as the user's own callable gives it."""
        weighted = self.weighted_loss
        if weighted is None:
            return self._mean(self.call(watchers, surroundings, self.sample_losses, restores=restores), weights)
        given = weights.to(self.params[0].dtype)  # so that weights of 1 round nothing that training did not round

        def function(module: Any, batch: Any) -> Tensor:
            return weighted(module, batch, given)  # type: ignore[no-any-return]

        return scalar_of(self.call(watchers, surroundings, function, restores=restores))

    def _mean(self, losses: Tensor, weights: Tensor) -> Tensor:
        if losses.shape != weights.shape:
            raise LossSplitError(
                f"sample_losses= gave a tensor of shape {tuple(losses.shape)} for a batch of {len(self)} samples; "
                f"expected ({len(self)},), one loss a sample, whose mean is the training loss."
            )
        return (losses * weights).sum() / len(self)

    def _put_back(self, contents: dict[str, Tensor]) -> None:
        for name, tensor in self._moving():  # by name: a step may put a new one in its place
            write_changed(tensor, contents[name])

    def _contents(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self._moving()}

    def _moving(self) -> Iterator[tuple[str, Tensor]]:
        return chain(self.module.named_buffers(), self._alike.items())


def takes_batch_idx(step: Callable[..., Any]) -> bool:
    """Whether ``training_step`` or ``validation_step`` wants a ``batch_idx``, as Lightning decides it."""
    parameters = inspect.signature(step).parameters
    return "batch_idx" in parameters or len(parameters) >= 2


def _loss_in(output: Any) -> Tensor:
    loss = output["loss"] if isinstance(output, dict) else output
    if not isinstance(loss, Tensor):
        raise LossSplitError(f"training_step gave {type(loss).__name__} where a loss was recorded, on the same batch.")
    return loss
