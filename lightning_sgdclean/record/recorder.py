# SPDX-License-Identifier: Apache-2.0
"""Record a run, one optimizer update at a time, from what the hooks hand over."""

import math
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sgdclean.base.errors import (
    UnsupportedTrainingError,
)
from lightning_sgdclean.data.batches import cloned
from lightning_sgdclean.record.average_notes import AverageNotes
from lightning_sgdclean.trajectory.flat_state import flatten, unflatten
from lightning_sgdclean.trajectory.live_state import (
    FrozenParameters,
    LiveState,
    hyper_parameters,
    is_fixed,
    trained_parameters,
)
from lightning_sgdclean.trajectory.records import KeptStep, MicroBatch, State, Step
from lightning_sgdclean.trajectory.teachers import teachers_of
from lightning_sgdclean.trajectory.writer import TrajectoryWriter


class Recorder:
    """Collects micro-batches and writes a step whenever the optimizer has made one.

    Args:
        module: The LightningModule.
        optimizer: Its optimizer.
        writer: Takes what is recorded.
        averages: Is asked to look between the steps.
    """

    def __init__(
        self, module: nn.Module, optimizer: Optimizer, writer: TrajectoryWriter, averages: AverageNotes | None = None
    ) -> None:
        for name, buffer in module.named_buffers():
            if buffer.layout is not torch.strided:
                raise UnsupportedTrainingError(
                    f"The buffer {name!r} is a sparse tensor, which the trajectory cannot hold. Keep it as a plain "
                    "attribute of the module (it is not trained), or as a dense buffer."
                )
        self._module, self._optimizer, self._writer = module, optimizer, writer
        self._averages = averages or AverageNotes()
        self._params = trained_parameters(module, optimizer)
        self._live = LiveState(module, self._params, optimizer)
        self._pending: list[MicroBatch] = []
        self._constants: FrozenParameters | None = None
        self._options: list[Any] | None = None  # of the last step, if none can change and be the same object
        self._groups: list[dict[str, Any]] = []
        self.num_steps = self._num_skipped = 0
        self._has_noted = False  # whether teachers were, since the last step
        self._last_index = -1
        self.last_epoch = 0, False  # of the last step: its epoch, and whether it was that epoch's last

    @property
    def has_pending(self) -> bool:
        """Whether batches wait for the optimizer's step."""
        return bool(self._pending)

    def state(self) -> State:
        """The live state, not copied."""
        return self._live.now()

    def note_teachers(self) -> None:
        """Hooks that run between the steps may have moved them since the last step's state was taken."""
        self._averages.look(self._writer.next_index, is_between=not self._pending)
        if not self._pending:
            self._writer.amend(self._teachers())
            self._has_noted = True

    def note_teachers_at_end(self) -> None:
        """As :meth:`note_teachers`, unless a validation came after the last step: it saw them as they are to be."""
        self._averages.look(self._writer.next_index, is_between=not self._pending)
        if self.num_steps and not self._has_noted:
            self.note_teachers()

    def flush(self) -> None:
        """A checkpoint is written now, from which a fit may go on: have all on disk that it needs."""
        self._writer.flush()
        self._averages.look(self._writer.next_index, is_between=not self._pending)
        self._averages.save()

    def _teachers(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.state().buffers.items() if isinstance(tensor, nn.Parameter)}

    def skip_batch(self) -> None:
        """A batch was drawn that will not be trained on."""
        self._num_skipped += 1

    def begin_batch(self, micro: MicroBatch) -> None:
        """A batch is about to be trained on."""
        self.note_teachers()
        self._averages.begin_epoch(micro.epoch)
        if self.num_steps == 0 and not self._pending:
            self._writer.begin(self.state(), begins_epoch=micro.batch_idx == self._num_skipped)
            held = {*self._params, *teachers_of(self._module, [*self._params.values()])}
            self._constants = FrozenParameters(self._module, held)
        self._pending.append(micro)

    def check_frozen(self) -> None:
        """Has nothing but the optimizer moved parameters?

        Raises:
            UnsupportedTrainingError: If one that is not trained moved since the first batch.
        """
        if self._constants is not None:
            self._constants.check(self._module)

    def note_loss(self, loss: Tensor, scale: float, *, adds: bool = False) -> None:
        """The batch's loss, just before it is differentiated, and what a GradScaler had multiplied it by.

        Args:
            loss: The loss.
            scale: The factor.
            adds: Whether the losses of one batch are summed up, where it may have several.
        """
        if self._pending:
            micro, loss = self._pending[-1], loss.detach().clone()
            micro.loss, micro.scale = loss if micro.loss is None or not adds else micro.loss + loss, scale

    @property
    def has_earlier_losses(self) -> bool:
        """Whether losses of batches before the latest one wait for the optimizer's step."""
        return any(micro.loss is not None and micro.scale for micro in self._pending[:-1])

    def forget_earlier_losses(self) -> None:
        """The gradients of the batches before the latest one were thrown away; what else they moved stays."""
        for micro in self._pending[:-1]:
            micro.scale, micro.loss = 0.0, None if micro.loss is None else 0.0 * micro.loss

    def waits_for_less_than(self, global_step: int) -> bool:
        """Whether batches wait for a step before this one."""
        return bool(self._pending) and self._pending[-1].global_step < global_step

    def commit(
        self, ends_epoch: bool, clip: tuple[str, float] | None, divisor: int, last_index: int | None = None
    ) -> Step | None:
        """The optimizer has stepped: write what the step was made of and what it led to.

        Args:
            ends_epoch: Whether the last of its batches was the epoch's last.
            clip: See :class:`~lightning_sgdclean.trajectory.records.Step`.
            divisor: See there.
            last_index: Number of the step that training ends with, if that is known.

        Returns:
            The step, or None if ``training_step`` gave no loss for any of its batches.

        Raises:
            UnsupportedTrainingError: If the optimizer was given other parameters on the way.
        """
        if not self._pending:
            return None
        index = self._pending[-1].global_step
        self._check_parameters(index)
        unused = [name for name, param in self._params.items() if param.grad is None]
        step = Step(index, 0, ends_epoch, self._hyper_parameters(), clip, divisor, unused, [])
        return self._write(step, is_last=index == last_index)

    def _hyper_parameters(self) -> list[dict[str, Any]]:
        """Those of now; the same object as before where no option is another."""
        now = [value for group in self._optimizer.param_groups for key, value in group.items() if key != "params"]
        known = self._options
        if known is None or len(now) != len(known) or not all(map(is_, now, known)):
            self._groups = hyper_parameters(self._optimizer, self._params)
            self._options = now if all(map(is_fixed, now)) else None
        return self._groups

    def leave(self, index: int, ends_epoch: bool, divisor: int) -> None:
        """The batches that wait will never make a step: a GradScaler skipped it, or training stops here.

        What they did to running statistics stays, so they are written, as a step without an update.
        """
        self._write(Step(index, 0, ends_epoch, [], None, divisor, list(self._params), []))

    def _write(self, step: Step, is_last: bool = False) -> Step | None:
        step.micro = [micro for micro in self._pending if micro.loss is not None]
        self._pending = []
        if not step.micro:
            return None
        step.epoch = step.micro[-1].epoch
        if self.num_steps and step.index <= self._last_index:
            raise UnsupportedTrainingError(
                f"Batches were left over before step {step.index}, in the middle of an accumulation: does "
                "on_train_batch_start return -1 there? Let an epoch end behind a whole accumulation."
            )
        self._last_index = step.index
        self._writer.append(step, self.state, is_last)
        self._has_noted = False
        self.num_steps += 1
        self.last_epoch = step.epoch, step.ends_epoch
        return step

    def _check_parameters(self, index: int) -> None:
        now = [param for group in self._optimizer.param_groups for param in group["params"] if param.requires_grad]
        known = self._params.values()
        if len(now) == len(known) and all(map(is_, now, known)):
            return
        names = {id(param): name for name, param in self._module.named_parameters()}
        found = {names.get(id(param), "a tensor outside the module") for param in now}
        changed = ", ".join(sorted(found ^ set(self._params))[:3]) or "their order"
        raise UnsupportedTrainingError(
            f"The parameters that the optimizer trains changed before step {index} (first of all: {changed}), which is "
            "not followed. Give the optimizer all parameters from the start, those to be trained later with a learning "
            "rate of zero until then."
        )


class EarlyStep:
    """Keeps the first step that moved anything until the step after it was made, so that it can be rehearsed.

    Only then, because what a hook changes between two steps shows only then.

    Attributes:
        is_due: Whether the step after it was made.
        kept: The step, once it was made.
    """

    def __init__(self) -> None:
        self._batches: dict[int, Any] = {}
        self._before: State | None = None
        self._is_fresh = True  # whether no batch came since the step
        self.kept: KeptStep | None = None
        self.is_due = False

    def begin_batch(self, micro: MicroBatch, batch: Any, live: State) -> None:
        """A batch is about to be trained on."""
        if self.kept is not None:
            for name, tensor in live.buffers.items() if self._is_fresh else ():
                if isinstance(tensor, nn.Parameter):  # a hook may have moved a teacher
                    self.kept.after.buffers[name].copy_(tensor.detach())
            self._is_fresh = False
            return
        if self._before is None:
            self._before = _copy(live)
        self._batches[id(micro)] = cloned(batch)

    def commit(self, step: Step | None, live: State) -> None:
        """The optimizer has stepped."""
        if self.kept is not None:
            self.is_due = True
            return
        if step is not None and self._before is not None and _is_telling(step):
            batches = [self._batches[id(micro)] for micro in step.micro]
            self.kept = KeptStep(step, batches, self._before, _copy(live))
        self._forget()

    def leave(self) -> None:
        """The batches that waited will never make a step."""
        self._forget()

    def _forget(self) -> None:
        self._batches.clear()
        self._before = None


def _is_telling(step: Step) -> bool:
    """Whether the step moved anything, from losses that are numbers."""
    finite = all(micro.loss is not None and math.isfinite(float(micro.loss)) for micro in step.micro)
    return finite and step.is_update and any(_rate_of(group) != 0 for group in step.groups)


def _rate_of(group: dict[str, Any]) -> float:
    """The learning rate; 1 where the optimizer finds it by itself."""
    value = group.get("lr")
    return 1.0 if value is None else float(value.item() if isinstance(value, Tensor) else value)


def _copy(live: State) -> State:
    layout, flat = flatten(live)
    return unflatten(layout, flat)


class BestModel:
    """Looks, between two optimizer steps, whether the ModelCheckpoint has saved a better model since.

    No step lies between a save and the next look, so the step count at the look is the saved model's.

    Attributes:
        step: Optimizer steps made when the best model was saved; None before the first one.
        epoch: Epoch of the last of these steps, and whether it ended that epoch.

    Args:
        checkpoint: The ModelCheckpoint.
        known: ``step``, epoch and whether it ended, of a best model that was saved in the fit that this one continues.
    """

    def __init__(self, checkpoint: Any, known: list[int] | None = None) -> None:
        self._checkpoint = checkpoint
        self._seen = self._now()
        self.step: int | None = None if known is None else known[0]
        self.epoch: tuple[int, bool] | None = None if known is None else (known[1], bool(known[2]))

    def look(self, num_steps: int, epoch: tuple[int, bool]) -> None:
        """Note ``num_steps``, and the epoch of the last of them, if there is a new best model."""
        now = self._now()
        if bool(now[0]) and (now[0] != self._seen[0] or now[1] is not self._seen[1]):
            self.step, self.epoch, self._seen = num_steps, epoch, now

    @property
    def known(self) -> list[int] | None:
        """What a checkpoint is to say of it."""
        return None if self.step is None or self.epoch is None else [self.step, *map(int, self.epoch)]

    def _now(self) -> tuple[str, Any]:
        return self._checkpoint.best_model_path, self._checkpoint.best_model_score
