# SPDX-License-Identifier: Apache-2.0
"""Callbacks that end the training with averages of the weights: which are followed, and when they average.

When an average is updated shows in the callback's own counters. By how much is asked of its function afterwards, with
numbers of our own; now and then all tensors of an update are held against the answer.
"""

import dis
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_sgdclean.base.errors import SGDInfluenceWarning, UnsupportedTrainingError
from lightning_sgdclean.base.lightning import LIGHTNING_MODULES, check_callbacks
from lightning_sgdclean.base.randomness import untouched_randomness
from lightning_sgdclean.trajectory.averages import AverageUpdate, write_averages
from lightning_sgdclean.trajectory.store import steps_written

_HOOKS = (
    "setup",
    "on_train_batch_end",
    "on_train_epoch_end",
    "on_train_end",
    "on_validation_epoch_start",
    "on_validation_epoch_end",
    "_swap_models",
    "_copy_average_to_current",
)


def averaging_of(trainer: Any, at: str, logged: dict[int, float]) -> "AverageNotes":
    """What follows the averages of a Trainer's callback, if one has them and can be followed.

    Args:
        trainer: The Trainer, with its fit set up.
        at: The end point that is asked for.
        logged: See :class:`AverageNotes`.

    Raises:
        UnsupportedTrainingError: If the average is followed, but not at the best model, or is no sum of multiples.
    """
    callbacks = check_callbacks(trainer)
    names = ", ".join(type(callback).__name__ for callback in callbacks)
    if not callbacks:
        return AverageNotes()
    why = _why_not(callbacks[0]) if len(callbacks) == 1 else "the Trainer has several such callbacks"
    if why:
        warnings.warn(
            f"{names} replaces the weights when training ends, and is not followed: {why}. The ranking is of the "
            "weights after the last optimizer step, not of the averaged ones.",
            SGDInfluenceWarning,
            stacklevel=2,
        )
        return AverageNotes(names)
    if at == "best":
        raise UnsupportedTrainingError(
            f'at="best" ends at the model that ModelCheckpoint saved, which holds the averages of {names} there. They '
            'are followed to the end of the training only. Use at="last".'
        )
    notes = AverageNotes(names, callbacks[0], trainer.lightning_module, logged)
    notes.factors(range(1, 4))  # refuses before training what no sum of multiples is
    return notes


def _why_not(callback: Any) -> str:
    """Why a callback's averages are not followed; empty where they are."""
    kinds = [kind for kind in type(callback).__mro__ if kind.__module__.startswith(LIGHTNING_MODULES)]
    base = next((kind for kind in kinds if kind.__name__ == "WeightAveraging"), None)
    if base is None:
        return "of Lightning's callbacks only WeightAveraging and EMAWeightAveraging are"
    own = [name for name in _HOOKS if getattr(type(callback), name, None) is not getattr(base, name, None)]
    if own:
        return f"it has a {own[0]} of its own"
    averaged = callback._average_model
    if type(averaged) is not AveragedModel:
        return f"its model is a {type(averaged).__name__}"
    functions = averaged.avg_fn, averaged.multi_avg_fn
    if not all(function is None or _keeps_nothing(function) for function in functions):
        return "its function may remember something between calls; it should be a plain function of its arguments"
    return ""


def _keeps_nothing(function: Any) -> bool:
    """Whether to call a function once more does nothing to later calls, as far as its code tells."""
    while isinstance(function, FunctionType) and function.__globals__["__name__"].startswith("torch."):
        if not hasattr(function, "__wrapped__"):  # as by torch.no_grad
            break
        function = function.__wrapped__
    if not isinstance(function, FunctionType):
        return False
    code, known = function.__code__, function.__globals__
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    read = [known[name] for name in code.co_names if name in known]
    fixed = (bool, int, float, str, type(None))
    held = all(isinstance(value, fixed) for value in [*cells, *(function.__defaults__ or ())])
    seen = all(isinstance(value, (*fixed, ModuleType, FunctionType, BuiltinFunctionType, type)) for value in read)
    writes = any(
        one.opname in ("STORE_GLOBAL", "STORE_ATTR", "DELETE_GLOBAL")
        or (one.opname == "STORE_DEREF" and one.argval in code.co_freevars)
        for one in dis.get_instructions(code)
    )
    return held and seen and not writes


class AverageNotes:
    """Notes after which steps a callback of Lightning's updates its averages.

    Attributes:
        names: The callback's; of several, all of theirs.
        said: What the ending is to say of the averages; None where they are not followed, or not known yet.

    Args:
        names: See there.
        callback: A WeightAveraging, whose hooks are Lightning's; None where nothing is followed.
        module: The LightningModule that is trained.
        logged: Values that were validated, by the number of steps made by then: what was validated before an update
            is not of the averages after it, and goes.
    """

    def __init__(
        self, names: str = "", callback: Any = None, module: Any = None, logged: dict[int, float] | None = None
    ) -> None:
        self.names = names
        self.said: dict[str, Any] | None = None
        self._callback, self._module, self._logged = callback, module, {} if logged is None else logged
        self._counters: tuple[int, int] | None = None  # as they were seen last
        self._num_before = self._since = 0  # updates before the first batch, and that batch's step
        self._after: list[int] = []  # step after which each update came
        self._epoch = -1  # of which an update is held against the factors
        self._was: dict[str, Tensor] = {}  # the averages before it
        self._problem: UnsupportedTrainingError | None = None  # is raised when the training is over

    def look(self, next_step: int, *, is_between: bool, is_over: bool = False) -> None:
        """Whether the averages were updated since the last look.

        Args:
            next_step: One more than the last step's number.
            is_between: Whether no batch waits for its step.
            is_over: Whether the training is, so that the module holds the averages.
        """
        if self._callback is None or self._problem is not None:
            return
        found = self._callback._latest_update_step, self._callback._latest_update_epoch
        if self._counters is None:
            self._counters, self._num_before, self._since = found, int(self._averaged.n_averaged), next_step
        num = sum(now != was for now, was in zip(found, self._counters, strict=True))
        self._counters = found
        if not num:
            return
        if not is_between:
            self._problem = UnsupportedTrainingError(
                f"{self.names} updated its averages while batches waited for their step, after step {next_step - 1}. "
                "Let should_update say yes only where a step was made."
            )
        self._after += [next_step - 1] * num
        self._logged.pop(next_step, None)
        if self._was and num == 1 and not is_over:
            self._check()
        self._was = {}

    def begin_epoch(self, epoch: int) -> None:
        """One update of each epoch is held against the factors: keep the averages before it."""
        if self._callback is not None and epoch != self._epoch:
            self._epoch, self._was = epoch, {name: tensor.clone() for name, tensor in _held(self._averaged.module)}

    def close(self, folder: Path) -> None:
        """Write the averages beside the trajectory, once the training has ended.

        Raises:
            UnsupportedTrainingError: If they were not updated as the callback's counters and its function say.
        """
        if self._problem is not None:
            raise self._problem
        if self._callback is None:
            return
        num, seen = int(self._averaged.n_averaged), self._num_before + len(self._after)
        if num != seen:
            raise UnsupportedTrainingError(
                f"{self.names} says that it updated its averages {num} times, but its counters moved {seen} times: "
                "something else updates them. Let only the callback do so."
            )
        since = max(self._since, next((step.index for step in steps_written(folder)), 0))
        matter = [number for number, step in enumerate(self._after) if step >= since]
        factors = self.factors([self._num_before + number for number in matter])
        updates = [AverageUpdate(self._after[number], *both) for number, both in zip(matter, factors, strict=True)]
        checksum = write_averages(folder, self._averaged.module, updates)
        self.said = {"by": self.names, "checksum": checksum, "since": self._since}

    @property
    def _averaged(self) -> Any:
        return self._callback._average_model

    def factors(self, numbers: Sequence[int]) -> list[tuple[tuple[float, float], tuple[float, float]]]:
        """Of parameters and of buffers, ``own`` and ``share`` of an update that so many came before.

        Raises:
            UnsupportedTrainingError: If an update is no sum of multiples of the average and of the weights.
        """
        real, weights = self._averaged, _Numbers()
        given = {"avg_fn": real.avg_fn, "multi_avg_fn": real.multi_avg_fn, "use_buffers": real.use_buffers}
        twin = AveragedModel(weights, **given)
        average: Any = twin.module
        found = []
        with untouched_randomness(torch.device("cpu")):
            for number in numbers:
                was, now = _numbers(number)
                average.fill(was)
                weights.fill(now)
                twin.n_averaged.fill_(number)
                twin.update_parameters(weights)
                params, buffers = (self._factors(one, was, now) for one in (average.param, average.buffer))
                found.append((params, buffers))
        return found

    def _factors(self, outcome: Tensor, was: Tensor, now: Tensor) -> tuple[float, float]:
        own, share = outcome[:2].tolist()
        if not torch.allclose(outcome.detach(), own * was + share * now, rtol=1e-9, atol=1e-12):
            raise UnsupportedTrainingError(
                f"The averages of {self.names} are no sums of multiples of what they were and of the weights, so what "
                "samples do through them is not followed. Average with a function that is linear in its first two "
                "arguments, such as that of EMAWeightAveraging."
            )
        return own, share

    @torch.no_grad()
    def _check(self) -> None:
        of_params, of_buffers = self.factors([self._num_before + len(self._after) - 1])[0]
        live, buffers = dict(_held(self._module)), dict(self._module.named_buffers())
        for name, now in _held(self._averaged.module):
            if not now.is_floating_point():
                continue
            own, share = of_buffers if name in buffers else of_params
            was, param = self._was[name].double(), live[name].to(now.device).double()
            eps = max(torch.finfo(one.dtype).eps for one in (now, live[name]))
            bound = _ROUNDINGS * eps * (abs(own) * was.abs() + abs(share) * param.abs())
            off = (now.double() - own * was - share * param).abs()
            if bool((off > bound).any()):
                self._problem = UnsupportedTrainingError(
                    f"The average of {name!r} that {self.names} made after step {self._after[-1]} is not what its "
                    "function makes of other numbers of the same kind. Average each number by itself, all in the same "
                    "way, as EMAWeightAveraging does."
                )


_ROUNDINGS = 16


def _held(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers, by name."""
    return [(name, one.detach()) for name, one in (*module.named_parameters(), *module.named_buffers())]


class _Numbers(nn.Module):
    """Stands for a model whose averages are known by hand."""

    buffer: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.param = nn.Parameter(torch.zeros(6, dtype=torch.float64))
        self.register_buffer("buffer", torch.zeros(6, dtype=torch.float64))

    @torch.no_grad()
    def fill(self, numbers: Tensor) -> None:
        """Have both hold these."""
        self.param.copy_(numbers)
        self.buffer.copy_(numbers)


def _numbers(seed: int) -> tuple[Tensor, Tensor]:
    """What an average was, and weights: the first two show the factors, the others whether there are any."""
    source = torch.Generator().manual_seed(seed)
    was, now = torch.randn(2, 6, dtype=torch.float64, generator=source)
    was[:2], now[:2] = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    return was, now
