# SPDX-License-Identifier: Apache-2.0
"""What it takes to run recorded steps again: the module, its data, what stands for the Trainer, and the record."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_sgdclean.base.errors import NonFiniteError
from lightning_sgdclean.base.lightning import Hooks
from lightning_sgdclean.base.options import Options, SampleLosses, WeightedLoss
from lightning_sgdclean.base.randomness import RandomState
from lightning_sgdclean.data.fetching import ValidationBatch
from lightning_sgdclean.data.fingerprints import batch_digest
from lightning_sgdclean.data.packing import Classes
from lightning_sgdclean.losses.evaluate import RecordedBatch
from lightning_sgdclean.losses.surroundings import Surroundings
from lightning_sgdclean.losses.verified import VerifiedSplit
from lightning_sgdclean.replay.fidelity import Fidelity
from lightning_sgdclean.replay.teachers import Teachers
from lightning_sgdclean.trajectory.averages import Averages, read_averages
from lightning_sgdclean.trajectory.live_state import trained_parameters
from lightning_sgdclean.trajectory.records import MicroBatch, State, States, Step
from lightning_sgdclean.trajectory.store import FitEnd, Trajectory
from lightning_sgdclean.trajectory.teachers import teachers_of


@dataclass(frozen=True)
class Replay:
    """A live module whose recorded steps can be run again.

    Attributes:
        module: The LightningModule, whose parameters and buffers a replay overwrites.
        params: Those that the optimizer moves, by name.
        surroundings: What stands for the Trainer.
        content_of: Content of micro-batch ``i`` of a step, as ``training_step`` got it.
        random_of: Random state before micro-batch ``i`` of a step.
        restore: Puts the module's modes and plain attributes back.
        fidelity: What the replay is held against.
        sample_losses: The user's own split of the loss.
        weighted_loss: The user's own loss with weights on its samples.
        split: The split that was found, where the user gives none.
        scratch: Buffers that training moves and nothing reads; see :mod:`lightning_sgdclean.replay.scratch`.
        teachers: Parameters that follow the trained ones.
    """

    module: Any
    params: dict[str, nn.Parameter]
    surroundings: Surroundings
    content_of: Callable[[Step, int], Any]
    random_of: Callable[[Step, int], RandomState]
    restore: Callable[[], None]
    fidelity: Fidelity
    sample_losses: SampleLosses | None = None
    weighted_loss: WeightedLoss | None = None
    split: VerifiedSplit | None = None
    scratch: frozenset[str] = frozenset()
    teachers: Teachers = field(default_factory=Teachers)

    def batch(self, step: Step, number: int) -> RecordedBatch:
        """Micro-batch ``number`` of a step, to be evaluated.

        Raises:
            ReplayMismatchError: If it is not the batch that was recorded.
        """
        content = self.content_of(step, number)
        self.fidelity.compare_batch(step, number, batch_digest(content, len(step.micro[number].ids)))
        return self.batch_of(self.micro(step, number), content, step.divisor)

    def micro(self, step: Step, number: int) -> MicroBatch:
        """The record of a micro-batch, with the random state before it."""
        return replace(step.micro[number], random=self.random_of(step, number))

    def batch_of(self, micro: MicroBatch, content: Any, divisor: int = 1) -> RecordedBatch:
        """A batch of any content, to be evaluated as if it had been trained on there."""
        return RecordedBatch(
            self.module,
            list(self.params.values()),
            micro,
            content,
            self.surroundings,
            self.restore,
            sample_losses=self.sample_losses,
            weighted_loss=self.weighted_loss,
            split=self.split,
            divisor=divisor,
            scratch=self.scratch,
            teachers=self.teachers.live,
            began=self.teachers.began,
        )

    def load(self, state: State, spoiled: frozenset[str] = frozenset()) -> None:
        """Copy a recorded state's parameters and buffers into the live module, NaN into the ``spoiled`` ones."""
        load_state(self.module, self.params, state)
        self.teachers.put(state)
        for name, buffer in self.module.named_buffers() if spoiled else ():
            if name in spoiled:
                buffer.fill_(math.nan)


def replay_of(
    module: Any,
    optimizer: Optimizer,
    surroundings: Surroundings,
    options: Options,
    hooks: Hooks,
    *,
    content_of: Callable[[Step, int], Any],
    random_of: Callable[[Step, int], RandomState],
    restore: Callable[[], None],
    split: VerifiedSplit | None = None,
) -> Replay:
    """Put a replay together.

    Args:
        module: The LightningModule.
        optimizer: Its optimizer.
        surroundings: What stands for the Trainer.
        options: The callback's.
        hooks: Hooks of the user's.
        content_of: See :class:`Replay`, and so for the next two.
        random_of: See there.
        restore: See there.
        split: What was proved of the loss by now, if anything was.
    """
    params = trained_parameters(module, optimizer)
    is_double = next(iter(params.values())).dtype is torch.float64
    tolerance = (1e-12 if is_double else 1e-5) if options.tolerance is None else options.tolerance
    return Replay(
        module=module,
        params=params,
        surroundings=surroundings,
        content_of=content_of,
        random_of=random_of,
        restore=restore,
        fidelity=Fidelity(tolerance, options.on_mismatch, hooks, module),
        sample_losses=options.sample_losses,
        weighted_loss=options.weighted_loss,
        split=split or VerifiedSplit() if options.finds_split else None,
        teachers=Teachers(teachers_of(module, [*params.values()])),
    )


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


def drawn_from(run: "RecordedRun", trajectory: Trajectory, steps: list[Step]) -> RandomState:
    """The random state to validate from: that of the fit's validation at the end point, or one that is always the same.

    So each evaluation of the objective draws the same numbers, and a validation that the fit made draws its own.

    Args:
        run: The run.
        trajectory: What was recorded of it.
        steps: The window, which ends at the end point.
    """
    found = run.ending.random.get(steps[-1].index + 1)
    last = next(step for step in reversed(steps) if step.micro)
    return trajectory.random(last, 0) if found is None else found


def averages_of(run: "RecordedRun", trajectory: Trajectory, steps: list[Step]) -> Averages | None:
    """The averages of the weights that a run ended with; None where there are none, or they were not followed.

    Raises:
        RunDirectoryError: If their file is damaged.
        UnsupportedTrainingError: If what the window counts in them is not known.
    """
    said = run.ending.averages
    return None if said is None else read_averages(trajectory.folder, said, steps[0].index)


Validation = Callable[[], tuple[Iterator[ValidationBatch], int]]


@dataclass(frozen=True)
class RecordedRun:
    """What the recording left.

    Attributes:
        folder: The run directory.
        loaders: The training loaders, whose datasets hold the samples; several if they were made anew.
        optimizer: The user's optimizer.
        ending: How its fit ended.
        val_dataloaders: The validation loaders that the Trainer had; None where it made none.
        limits: How many batches of each of them count; None: all.
        is_of_fit: Whether those are surely the data that were validated on.
        hooks: Hooks of the user's.
        classes: Classes that kept batches are made of, by name.
        as_delivered: A loader's batch as the Trainer delivers it: in a dict, say, where the loader was given in one.
        fit: Name of the fit that recorded its last steps; empty where that may be any.
        split: What was proved of the loss during the fit.
    """

    folder: Path
    loaders: list[Any]
    optimizer: Optimizer
    ending: FitEnd
    val_dataloaders: Any
    limits: list[float] | None
    is_of_fit: bool
    hooks: Hooks
    classes: Classes
    as_delivered: Callable[[Any], Any]
    fit: str = ""
    split: VerifiedSplit | None = None


@dataclass(frozen=True)
class OpenedRun:
    """A recorded run, ready for its steps to be run again; see :mod:`lightning_sgdclean.replay.open`.

    Attributes:
        run: What the recording left.
        options: What is asked of it.
        trajectory: What was recorded.
        steps: The window.
        replay: The live module and what its steps need.
        states: The states between the steps.
        end: The state at the window's end.
        complaints: What is to be said of the window.
        validation: Gives what the objectives are means over, and of how many loaders it comes.
        loader_of: The loader that delivered a batch; what a fit before this one had is gone, and this one's stands
            for it.
        averages: The averages of the weights, where these are the end point.
    """

    run: RecordedRun
    options: Options
    trajectory: Trajectory
    steps: list[Step]
    replay: Replay
    states: States
    end: State
    complaints: list[str]
    validation: Validation
    loader_of: Callable[[MicroBatch], Any]
    averages: Averages | None = None

    @property
    def end_point(self) -> State:
        """What the objectives are of: the state at the window's end, or the averages there."""
        return self.end if self.averages is None else self.averages.state(self.end)

    @property
    def unfollowed(self) -> str:
        """Callbacks whose averages of the weights are not the end point."""
        return "" if self.averages is not None else self.trajectory.trained.get("averaging", "")

    @property
    def is_partial(self) -> bool:
        """Whether the fit did not come to its end, as far as its files say."""
        return not self.run.ending.is_complete

    def partial_in_words(self) -> list[str]:
        """What is to be said of a run whose fit did not come to its end."""
        if not self.is_partial:
            return []
        last = self.trajectory.steps[-1]
        return [
            f"The fit of {self.run.folder} did not come to its end, as far as its files say: it was killed, or ended "
            "by an exception, or could not be recorded any further (a full disk, say). Its recorded steps end with "
            f"step {last.index}, {'the last' if last.ends_epoch else 'inside'} of epoch {last.epoch}. Window and end "
            "point are taken from these steps: what is said is of a model that was not trained to its end. For the "
            "whole run, go on from a checkpoint (fit with ckpt_path=) or train again."
        ]

    def rates(self) -> tuple[dict[str, Any], list[str]]:
        """What the summary says of learning rates, momenta and the like, and what is to be warned of."""
        updates = [step.groups for step in self.steps if step.is_update]
        varies = any(groups is not updates[0] and groups != updates[0] for groups in updates)
        found = self.run.ending.unexplained
        if not varies or (found is not None and found.get("last", -1) <= self.steps[0].index):
            words = "functions of the step alone" if varies else "constant"
            return {"of_step_alone": True, "words": words}, []
        if found is None:
            text = (
                "Whether the learning rates of this run follow its training is not known, since its fit did not come "
                "to its end. They count as constants, which is right if they are functions of the step alone."
            )
            return {"of_step_alone": None, "words": text}, [text]
        cause = "no scheduler set it"
        if found["by"]:
            cause = f"{found['by']} gave other values when asked again at the end of the training"
        raised = f" (and raised {found['raised']})" if found["raised"] else ""
        text = (
            f"The option {found['option']!r} of parameter group {found['group']}, which changed from step "
            f"{found['first']} on (last at step {found['last']}), may follow the training: {cause}{raised}. Rates "
            "count as constants: what a sample does through a rate that is computed from losses or weights is not in "
            "its influence. Where the rate follows nothing but the step, or moves in jumps only, the influences are "
            "right; a scheduler of the step (LambdaLR, say) is recognised as such. Otherwise train with one."
        )
        return {"of_step_alone": False, "words": text}, [text]

    def prepare(self, batch: Any) -> Any:
        """A training loader's batch as ``training_step`` gets it."""
        return self.replay.surroundings.prepare(self.run.as_delivered(batch), 0)
