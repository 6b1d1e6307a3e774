# SPDX-License-Identifier: Apache-2.0
"""A recorded micro-batch, evaluated again by the user's own ``training_step``: the one place where that is done."""

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_sgdclean.base.errors import LossSplitError
from lightning_sgdclean.base.options import SampleLosses
from lightning_sgdclean.base.randomness import set_random_state
from lightning_sgdclean.data.batches import cloned
from lightning_sgdclean.losses.contents import write_changed
from lightning_sgdclean.losses.loss_inputs import LossInputs
from lightning_sgdclean.losses.running_statistics import IndependentSamples, RunningStatistics
from lightning_sgdclean.losses.surroundings import Surroundings, eagerly, ignore, logging_to
from lightning_sgdclean.losses.watched_calls import LEAVING, WatchedCalls
from lightning_sgdclean.losses.weighting import (
    Evaluated,
    LabelledWeights,
    OtherLabels,
    SampleWeights,
    SplitPlan,
    is_planned,
    unit_weights,
)
from lightning_sgdclean.trajectory.records import MicroBatch

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

    Every evaluation goes through :meth:`call`: random state and clock as the step had them, a copy of the batch,
    the module's plain attributes put back afterwards.

    Attributes:
        module: The LightningModule.
        params: Its trained parameters.
        micro: The batch's record, with the random state before it.
        content: The batch as ``training_step`` gets it.
        surroundings: What stands for the Trainer.
        restore: Puts the module's plain attributes back.
        sample_losses: The user's own ``(module, batch) -> (B,)``, whose mean stands for the loss where it is weighted.
        split: Whose the parts of the loss are, where the user does not say it.
        divisor: By how much the loss is divided, since so many micro-batches are accumulated.
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
    split: Split | None = None
    divisor: int = 1
    is_relabelled: bool = field(default=True, init=False)
    manner: tuple[frozenset[Any], frozenset[Any]] | None = field(default=None, init=False)
    _plan: SplitPlan | None = field(default=None, init=False)
    _buffers: dict[str, Tensor] = field(default_factory=dict, init=False)  # before the first evaluation
    _references: dict[str, dict[int, Tensor]] = field(default_factory=dict, init=False)  # by precision

    def __len__(self) -> int:
        return len(self.micro.ids)

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
        if is_own and self.micro.scale != 1.0:
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
            self._buffers = {name: buffer.detach().clone() for name, buffer in self.module.named_buffers()}
        self._put_back(self._buffers)
        own, others = weights[: len(self)], None
        references = self._references.setdefault((surroundings or self.surroundings).precision, {})
        norms = IndependentSamples() if independent else RunningStatistics(self.module)
        weighing = SampleWeights(own, plan, {} if independent else references)
        if labels is not None and len(weights) > len(self):
            others = OtherLabels(labels, weights[len(self) :])
            weighing = LabelledWeights(own, plan, references, others)
        watched = WatchedCalls(self.module)
        watchers, last = [norms, watched], [] if inputs is None else [inputs]
        if self.sample_losses is None:
            loss = self.call([*watchers, weighing, *last], surroundings)
        else:
            loss = self._mean(self.call([*watchers, *last], surroundings, self.sample_losses), own)
        self.is_relabelled &= others is None or (others.is_whole and self.sample_losses is None)
        if loss.grad_fn is not None and not independent:
            self.manner = watched.manner(loss, *(one.value for cut in last for one in cut.found))
        return Evaluated(loss, norms.updates, weighing.calls, norms.leaves)

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
        return Evaluated(self.call([weighing]), [], weighing.calls)

    def find_plan(self) -> Tensor:
        """Prove at the present parameters which part of the loss is whose; the loss, as the parts give it.

        Raises:
            LossSplitError: If it cannot be split by sample.
        """
        contents = {name: buffer.detach().clone() for name, buffer in self.module.named_buffers()}

        def evaluate(plan: SplitPlan | None) -> Evaluated:
            evaluated = self.watched(SampleWeights(self.weights(), plan))
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
        if self.sample_losses is not None:
            return self._mean(self.call([], function=self.sample_losses, restores=False), weights)
        weighing = SampleWeights(weights, self._plan)
        loss = self.call([weighing], restores=False)
        if self._plan is not None and not is_planned(weighing.calls, self._plan):
            raise LossSplitError(
                f"The loss of batch {self.micro.batch_idx} of epoch {self.micro.epoch} is made by other loss calls "
                "once samples are left out, so it is not known which part of it is whose. Give sample_losses=."
            )
        return loss

    def as_trained(self) -> Tensor:
        """The loss that ``training_step`` gives, divided and scaled, whatever stands for it elsewhere."""
        contents = {name: buffer.detach().clone() for name, buffer in self.module.named_buffers()}
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
                stack.enter_context(watcher)
            if function is not None:
                loss: Tensor = function(self.module, batch)
            else:
                step = self.module.training_step
                loss = _loss_in(step(batch, self.micro.batch_idx) if takes_batch_idx(step) else step(batch))
        return loss

    def _mean(self, losses: Tensor, weights: Tensor) -> Tensor:
        if losses.shape != weights.shape:
            raise LossSplitError(
                f"sample_losses= gave a tensor of shape {tuple(losses.shape)} for a batch of {len(self)} samples; "
                f"expected ({len(self)},), one loss a sample, whose mean is the training loss."
            )
        return (losses * weights).sum() / len(self)

    def _put_back(self, contents: dict[str, Tensor]) -> None:
        for name, buffer in self.module.named_buffers():  # by name: a step may put a new one in its place
            write_changed(buffer, contents[name])


_TIMES = 12  # what a graph saves: in twice the bits, differentiated twice, with as much in between


def bytes_in_float64(batch: RecordedBatch) -> int:
    """What a second derivative takes in float64 at most, by what the graph of the loss saves and by the parameters."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    # Not under torch.func, which forbids the hooks; there it is not known.
    with suppress(RuntimeError), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        batch.call([])
    return _TIMES * (sum(saved.values()) + sum(param.nbytes for param in batch.params))


def takes_batch_idx(step: Callable[..., Any]) -> bool:
    """Whether ``training_step`` or ``validation_step`` wants a ``batch_idx``, as Lightning decides it."""
    parameters = inspect.signature(step).parameters
    return "batch_idx" in parameters or len(parameters) >= 2


def _loss_in(output: Any) -> Tensor:
    loss = output["loss"] if isinstance(output, dict) else output
    if not isinstance(loss, Tensor):
        raise LossSplitError(f"training_step gave {type(loss).__name__} where a loss was recorded, on the same batch.")
    return loss
