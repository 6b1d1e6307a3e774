# SPDX-License-Identifier: Apache-2.0
"""The loop of a training while it trains: which losses make a step, and how its gradients are clipped."""

import inspect
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import wraps
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from lightning_sgdclean.base.lightning import clipping_of, is_at_end_of_epoch
from lightning_sgdclean.losses.manual_steps import unfollowed
from lightning_sgdclean.record.recorder import Recorder
from lightning_sgdclean.trajectory.live_state import trained_parameters

Clip = tuple[str, float] | None
Refusing = Callable[[], AbstractContextManager[None]]


class Guard:
    """Whatever goes wrong within is handed on and goes no further: a lack of memory or disk, a fault of ours."""

    def __init__(self, stop: Callable[[Exception], None]) -> None:
        self._stop = stop

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if not isinstance(error, Exception):
            return False
        self._stop(error)
        return True


class AutomaticLoop:
    """Lightning's own: one loss a batch, a step every ``accumulate_grad_batches`` of them and at the epoch's end.

    Attributes:
        carries_over: Whether a step may have batches of the epoch before.
    """

    carries_over = False

    def __init__(self, trainer: Any, recorder: Recorder) -> None:
        self._trainer, self._recorder = trainer, recorder

    def was_passed(self, batch_idx: int) -> bool:
        """Whether the batches that wait will make no step, now that this one comes."""
        return batch_idx % self._trainer.accumulate_grad_batches == 0 and self._recorder.has_pending

    def left_at_end_of_epoch(self) -> int | None:
        """The number to write batches under that make no step, now that the epoch is over; None: there are none."""
        return self._trainer.global_step - is_at_end_of_epoch(self._trainer) if self._recorder.has_pending else None

    def left_at_end(self) -> int | None:
        """The same, now that the training is over."""
        return None

    def batch_begins(self) -> None:
        """A ``training_step`` comes."""

    def batch_ends(self) -> None:
        """It is over."""

    def note_loss(self, loss: Tensor, *, is_early: bool) -> None:
        """A loss is about to be backpropagated.

        Args:
            loss: The loss, as it is differentiated.
            is_early: Whether no step was rehearsed yet.
        """
        self._recorder.note_loss(loss, self._scale)

    @property
    def _scale(self) -> float:
        """What a GradScaler multiplies losses by."""
        scaler = getattr(self._trainer.precision_plugin, "scaler", None)
        return 1.0 if scaler is None else float(scaler.get_scale())

    def stepped(self) -> Clip:
        """The optimizer made a step: how its gradients were clipped, as a ``Step`` says it."""
        return clipping_of(self._trainer)

    def unwatch(self) -> None:
        """Leave everything as it was."""


_CLIPPING = {"clip_grad_norm_": "norm", "clip_grad_value_": "value"}  # torch's functions, and what the record says


class ManualLoop(AutomaticLoop):
    """The module's own, ``automatic_optimization = False``.

    Holds the calls of every ``training_step`` against what is followed: backward, clip, step, in this order.

    Lightning's hooks tell of each ``manual_backward``, torch's of each ``step``. Clipping has no hook: torch's two
    functions are replaced, wherever they go by a name, by ones that note their arguments first.

    Args:
        trainer: The Trainer.
        recorder: Writes the steps.
        params: The trained parameters.
        guard: Gives the context that takes what is refused.
    """

    carries_over = True

    def __init__(self, trainer: Any, recorder: Recorder, params: Sequence[nn.Parameter], guard: Refusing) -> None:
        super().__init__(trainer, recorder)
        self._params, self._ids, self._guard = params, {id(param) for param in params}, guard
        self._progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total
        self._clips: list[tuple[str, float]] = []
        self._is_open = self._has_backward = self._has_stepped = False
        self._replaced: list[tuple[dict[str, Any], str, Any]] = []

        self._watch()

    def _watch(self) -> None:
        for name, kind in _CLIPPING.items():
            original = getattr(nn.utils, name)
            stand_in = self._noting(original, kind)
            spaces = [vars(module) for module in [*sys.modules.values()] if isinstance(module, ModuleType)]
            places = [(space, key) for space in spaces for key, value in [*space.items()] if value is original]
            for space, key in places:
                space[key] = stand_in
                self._replaced.append((space, key, original))

    def unwatch(self) -> None:
        """Leave torch's functions as they were."""
        self._is_open = False
        for space, key, original in self._replaced:
            space[key] = original
        self._replaced.clear()

    def _noting(self, original: Callable[..., Any], kind: str) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @wraps(original)
        def clip(parameters: Any, *args: Any, **options: Any) -> Any:
            given = parameters if isinstance(parameters, Tensor) else list(parameters)
            if self._is_open:
                with self._guard():
                    self._note_clip(kind, [given] if isinstance(given, Tensor) else given, signature, args, options)
            return original(given, *args, **options)

        return clip

    def _note_clip(
        self,
        kind: str,
        given: list[Tensor],
        signature: inspect.Signature,
        args: tuple[Any, ...],
        options: dict[str, Any],
    ) -> None:
        how = signature.bind(given, *args, **options)
        how.apply_defaults()
        clipped = {id(param) for param in given if param.grad is not None}
        if not clipped & self._ids:  # of another network
            return
        if clipped != {id(param) for param in self._params if param.grad is not None}:
            raise unfollowed("gradients of some parameters are clipped by themselves, or with those of others")
        if kind == "norm" and float(how.arguments["norm_type"]) != 2.0:
            raise unfollowed(f"gradients are clipped by norm_type={how.arguments['norm_type']}, not by the length (2)")
        value = float(how.arguments["max_norm" if kind == "norm" else "clip_value"])
        if value < math.inf:  # else only the length was asked for
            self._clips.append((kind, value))

    def was_passed(self, batch_idx: int) -> bool:
        """Only a GradScaler's skipped step was counted without being made; else they wait on."""
        return self._recorder.waits_for_less_than(self._trainer.global_step)

    def left_at_end_of_epoch(self) -> int | None:
        """They wait on across epochs, as their gradients do, unless the step was skipped."""
        return self._trainer.global_step - 1 if self.was_passed(0) else None

    def left_at_end(self) -> int | None:
        """What waits when the training is over makes no step any more."""
        return self._trainer.global_step if self._recorder.has_pending else None

    def batch_begins(self) -> None:
        """See the base class."""
        self._is_open, self._has_backward, self._has_stepped = True, False, False

    def batch_ends(self) -> None:
        """See the base class."""
        self._is_open = False

    def note_loss(self, loss: Tensor, *, is_early: bool) -> None:
        """See the base class.

        Raises:
            UnsupportedTrainingError: If the losses of a step are backpropagated in a way that is not followed, unless
                the guard takes it.
        """
        with self._guard():
            self._check_backward(is_early)
        self._recorder.note_loss(loss, self._scale, adds=True)

    def _check_backward(self, is_early: bool) -> None:
        if not self._is_open:
            raise unfollowed("manual_backward is called outside of training_step")
        if self._has_stepped:
            raise unfollowed("manual_backward is called after opt.step()")
        is_first, self._has_backward = not self._has_backward, True
        has_earlier = self._recorder.has_earlier_losses
        if is_first and (has_earlier or is_early):
            if self._are_gone():
                self._clips.clear()
                self._recorder.forget_earlier_losses()
            elif not has_earlier:
                raise unfollowed("the gradients of a step that was made are left when the next loss is backpropagated")
        if self._clips:
            raise unfollowed("gradients are clipped before another loss is backpropagated for the same step")

    def _are_gone(self) -> bool:
        """Whether no gradient is left that the coming ones would be added to."""
        return all(param.grad is None or not bool(param.grad.any()) for param in self._params)

    def stepped(self) -> Clip:
        """See the base class.

        Raises:
            UnsupportedTrainingError: If the step cannot be followed, unless the guard takes it.
        """
        clips, self._clips = self._clips, []
        with self._guard():
            self._check_step(clips)
        return clips[0] if clips else None

    def _check_step(self, clips: list[tuple[str, float]]) -> None:
        if not self._is_open:
            raise unfollowed("opt.step() is called outside of training_step")
        if self._progress.ready <= self._progress.completed:
            raise unfollowed("an optimizer is stepped that Lightning does not count (use_pl_optimizer=False, say)")
        if self._has_stepped:
            raise unfollowed("training_step calls opt.step() more than once")
        if not self._has_backward:
            raise unfollowed("opt.step() comes without self.manual_backward(loss) before it (loss.backward(), say)")
        self._has_stepped = True
        if len(clips) > 1:
            raise unfollowed(f"the gradients of one step are clipped {len(clips)} times")
        if clips and self._scale != 1.0:
            raise unfollowed("gradients are clipped while a GradScaler's factor is on them")


def loop_of(trainer: Any, module: Any, recorder: Recorder, guard: Refusing) -> AutomaticLoop:
    """The loop that a module is trained by."""
    if module.automatic_optimization:
        return AutomaticLoop(trainer, recorder)
    params = [*trained_parameters(module, trainer.optimizers[0]).values()]
    return ManualLoop(trainer, recorder, params, guard)
