# SPDX-License-Identifier: Apache-2.0
"""Hold the objective's gradient against differences of its value: a part of it may be detached, or a Python number."""

import math
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sgdclean.adjoint.logged import (
    FAR,
    is_close,
    logged_value,
    no_such_value,
    plain,
    returned_loss,
    said_again,
    unlike,
)
from lightning_sgdclean.adjoint.objective import (
    ObjectiveGradient,
    objective_gradients,
    objectives_at,
    value_of,
    with_teachers,
)
from lightning_sgdclean.adjoint.quotients import TOLERANCE, Movable, difference, normal, towards, without_padding
from lightning_sgdclean.base.errors import ObjectiveError, ReplayMismatchError, SGDInfluenceError, warn_of
from lightning_sgdclean.base.options import Options
from lightning_sgdclean.base.randomness import random_state, set_random_state, untouched_randomness
from lightning_sgdclean.data.batches import cloned
from lightning_sgdclean.data.fetching import ValidationBatch, loaders_in
from lightning_sgdclean.losses.kernels import dot, length_of
from lightning_sgdclean.losses.module_state import untouched_module
from lightning_sgdclean.losses.precision import in_float64, is_low
from lightning_sgdclean.losses.surroundings import Surroundings
from lightning_sgdclean.losses.watched_calls import WatchedCalls
from lightning_sgdclean.replay.replay import OpenedRun, RecordedRun

_MOVES = (1e-6, 1e-7, 1e-5, 1e-4)  # relative to what is moved; at kinks the objective bends, but does not jump


def check_objectives(
    module: Any,
    params: list[nn.Parameter],
    batches: list[ValidationBatch],
    num_loaders: int,
    options: Options,
    surroundings: Surroundings,
    teachers: dict[str, nn.Parameter] | None = None,
) -> list[str]:
    """Check the gradients of all objectives on a few batches; parameters and buffers are as before.

    Args:
        module: The LightningModule, in the state to check it in.
        params: By which the objectives are differentiated.
        batches: Some of the validation set.
        num_loaders: How many validation loaders there are.
        options: The callback's.
        surroundings: What stands for the Trainer.
        teachers: As for :func:`objective_gradients`.

    Returns:
        What is wrong, where mismatches are only warned about.

    Raises:
        ObjectiveError: If an objective's gradient is not the derivative of its value.
    """
    if not batches:
        return []
    contents = [(tensor, tensor.detach().clone()) for tensor in (*module.parameters(), *module.buffers())]
    complaints = []
    try:
        with in_float64(module, surroundings) as wide, surroundings.as_stage("validate"), with_teachers(module, params):
            point = _Point(module, params, batches, num_loaders, options, wide, teachers)
            for name in options.objectives:
                off = point.difference(name)
                if off is not None and off > TOLERANCE:
                    complaints.append(_complaint(name, off, point.places(name)))
    except SGDInfluenceError:
        raise
    except Exception as error:  # theirs: code that wants float32, a kernel without float64
        where = f"in float64 it cannot be evaluated ({type(error).__name__}: {error})"
        text = f"Whether the objective's gradient is the derivative of its value could not be told: {where}."
        return [*complaints, text]
    finally:
        with torch.no_grad():
            for tensor, content in contents:
                tensor.copy_(content)
    if complaints and options.on_mismatch == "raise":
        raise ObjectiveError(f'{complaints[0]} on_mismatch="warn" leaves that part out.')
    return complaints


class SanityCheck:
    """In the sanity check already: what ``validation_step`` says is the objective, again and again, and all of it.

    Args:
        options: The callback's. A callable, or loaders of the user's, leave nothing to check.

    Attributes:
        is_done: Whether nothing is left to look at.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self.is_done = options.objective is not None or options.val_dataloaders is not None
        self._names: list[str] | None = None  # logged beside a value that comes at the epoch's end only
        self._returned: list[Tensor | None] = []

    def batch_ends(
        self,
        module: Any,
        params: list[nn.Parameter],
        output: Any,
        batch: ValidationBatch,
        num_loaders: int,
        around: Surroundings,
    ) -> None:
        """Look at a batch that was validated on; module and random state stay as they are.

        Args:
            module: The LightningModule.
            params: Its trained parameters.
            output: What ``validation_step`` returned.
            batch: A batch as ``validation_step`` gets it.
            num_loaders: How many validation loaders there are.
            around: What stands for the Trainer.

        Raises:
            ObjectiveError: If there is no such value, though there is one loader only; if its gradient is wrong; or if
                it is another one each time.
        """
        if self.is_done:
            return
        self._returned.append(returned_loss(output))
        if self._names is not None:
            return
        as_it_is = replace(around, prepare=lambda batch, number: batch)
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            untouched_randomness(around.device),
            untouched_module(module) as restore,
            with_teachers(module, params),
        ):
            content, *numbers = batch
            own = (cloned(content), *numbers)  # out of inference mode
            said = said_again(module, own, num_loaders, self._options, around, restore)
            if said.value is None:
                return
            warn_of(check_objectives(module, params, [own], num_loaders, self._options, as_it_is))
        self.is_done = said.source != "returned"
        self._names = None if self.is_done else said.names

    def run_ends(self, logged: Any) -> None:
        """Hold what was returned against the value that was logged once all batches were through; None: none was.

        Raises:
            ObjectiveError: If that is not the mean of what was returned.
        """
        if self.is_done or self._names is None:
            return
        self.is_done = True
        found = [plain(value) for value in self._returned if value is not None]
        mean = sum(found) / len(found) if found else math.nan
        if logged is None or not is_close(mean, plain(logged), logged, *self._returned):
            raise no_such_value(self._options.monitor, self._names, unlike(mean, logged))


_NUM_CHECKED = 4  # validation batches at most


def check_at_end(this: OpenedRun, manners: dict[Any, int]) -> list[str]:
    """:func:`check_objectives` at the end of a run's window, on the first validation batch of each manner."""
    replay = this.replay
    replay.load(this.end_point)
    batches, num_loaders = this.validation()
    chosen = sorted(set(manners.values()))[:_NUM_CHECKED]
    some = [batch for place, batch in enumerate(islice(batches, max(chosen, default=-1) + 1)) if place in chosen]
    params = list(replay.params.values())
    given = this.options, replay.surroundings, replay.teachers.live
    complaints = check_objectives(replay.module, params, some, num_loaders, *given)
    replay.restore()  # validation had put the module into evaluation mode
    return complaints


_ROUNDINGS = 16  # of the logged value


def compare_with_logged(found: ObjectiveGradient, this: OpenedRun) -> list[str]:
    """Hold the recomputed objective against the logged one, where both are of the same weights and data.

    Args:
        found: The first objective at the end of the window.
        this: The run.

    Returns:
        That they differ by more than rounding, if so.

    Raises:
        ReplayMismatchError: If they differ by far, on the data of the fit itself.
        ObjectiveError: If the value was not logged for each batch, and there is nothing to compare with, or they differ
            by far.
    """
    run, replay, options = this.run, this.replay, this.options
    is_sure = found.sources <= {"logged"}
    if options.objective is not None or (is_sure and (options.val_dataloaders is not None or this.unfollowed)):
        return []
    logged = run.ending.logged_at(options.monitor, this.steps[-1].index + 1)
    if options.val_dataloaders is not None or this.unfollowed:
        logged = None  # it was of other data, or of other weights
    eps = max(torch.finfo(param.dtype).eps for param in replay.params.values())
    eps = max(eps, torch.finfo(torch.bfloat16).eps) if is_low(replay.surroundings, replay.module) else eps
    if logged is None and not is_sure:
        return _refused_or_said(no_such_value(options.monitor, found.names, unlike(found.value, None)), options)
    if logged is None or math.isclose(found.as_logged, logged, rel_tol=_ROUNDINGS * eps, abs_tol=1e-12):
        return []
    text = (
        f"{options.monitor!r} recomputed on the final weights is {found.as_logged!r}, but {logged!r} was logged for "
        f"them, which is more than rounding. Likely causes: {_causes(found, run)}."
    )
    is_far = not math.isclose(found.as_logged, logged, rel_tol=max(FAR, 4 * eps), abs_tol=1e-12)
    if not (is_far and (run.is_of_fit or not is_sure)):
        return [text]
    if is_sure:
        return _refused_or_said(ReplayMismatchError(text), options)
    return _refused_or_said(ObjectiveError(f"{text} Log the loss itself for each batch, or give objective=."), options)


def compare_where_unsure(this: OpenedRun) -> list[str]:
    """:func:`compare_with_logged`, for those who only need values: where a batch's value is not surely the logged one.

    Raises:
        ReplayMismatchError: As :func:`compare_with_logged`.
        ObjectiveError: Likewise.
    """
    options, replay = this.options, this.replay
    if options.objective is not None:
        return []
    batches, num_loaders = this.validation()
    replay.load(this.end_point)
    replay.module.eval()
    with replay.surroundings.as_stage("validate"), replay.surroundings.val_context():
        some = [(replay.surroundings.prepare(content, number), i, number) for content, i, number in islice(batches, 1)]
        said = [logged_value(replay.module, one, options.monitor, num_loaders, needs_graph=False) for one in some]
    replay.restore()
    if all(one.source == "logged" for one in said):
        return []
    return compare_with_logged(
        objectives_at(this.end_point, replay, this.validation, options, replay.surroundings)[0], this
    )


def _refused_or_said(error: SGDInfluenceError, options: Options) -> list[str]:
    if options.on_mismatch == "raise":
        raise type(error)(f'{error} on_mismatch="warn" ranks all the same.')
    return [str(error)]


def _causes(found: ObjectiveGradient, run: RecordedRun) -> str:
    """What can be behind a value that is not the logged one, in this run."""
    loaders = loaders_in(run.val_dataloaders)
    causes = {
        "validation data that workers make random": any(getattr(one, "num_workers", 0) for one in loaders),
        "weights moved after the last step": True,
        "other validation data than the fit had": not run.is_of_fit,
        "an average that is not by batch size": found.sources <= {"logged"},
        "a metric that is no mean over samples": "metric" in found.sources,
        "an epoch's value that is not the mean of what validation_step returned": "returned" in found.sources,
    }
    *some, last = [cause for cause, is_possible in causes.items() if is_possible]
    return f"{', '.join(some)} or {last}" if some else last


def _complaint(name: str, off: float, places: list[str]) -> str:
    seen = ", ".join(places[:3])
    stops = f"The objective stops gradients ({seen}) at values that the parameters move. " if seen else ""
    return (
        f"{stops}The gradient of the objective {name!r} is not the derivative of its value: it is off by {off:.1%}. "
        "Log the loss itself, self.log(name, loss), or give objective=, a callable (pl_module, batch) -> scalar whose "
        "parts can all be differentiated."
    )


class _Point:
    """Objectives on a few batches, at parameters and buffers that can be moved."""

    def __init__(
        self,
        module: Any,
        params: list[nn.Parameter],
        batches: list[ValidationBatch],
        num_loaders: int,
        options: Options,
        wide: Surroundings,
        teachers: dict[str, nn.Parameter] | None,
    ) -> None:
        self._module, self._params, self._batches, self._num_loaders = module, params, batches, num_loaders
        self._options, self._wide, self._teachers = options, wide, teachers
        self._random = random_state(wide.device)
        self._source = torch.Generator().manual_seed(0)
        self._tensors = Movable(params, module, self._source)
        self._found = self._gradients(list(options.objectives))

    def difference(self, name: str) -> float | None:
        """How far the gradient is off, relatively; None where it cannot be told."""
        found = self._found[name]
        padding = self._watched(name).padding
        at = self._tensors
        moves = without_padding(towards(self._source, at.params, found.params), self._params, found.params, padding)
        buffers = {
            key: normal(self._source, grad) * length_of([at.buffers[key]]) for key, grad in found.buffers.items()
        }
        expected = dot(found.params, moves) + dot(found.buffers.values(), buffers.values())

        def quotient(e: float) -> tuple[float, float]:
            plus, minus = (self._value(name, sign * e, moves, buffers) for sign in (1, -1))
            return (plus - minus) / (2 * e), abs(plus) / (2 * e)

        return difference(expected, quotient, _MOVES)

    def _value(self, name: str, e: float, moves: list[Tensor], buffers: dict[str, Tensor]) -> float:
        self._tensors.move(e, moves, buffers)
        return self._gradients([name])[name].value

    def _gradients(self, names: list[str]) -> dict[str, ObjectiveGradient]:
        set_random_state(self._random, self._wide.device)
        batches = [(cloned(content), *numbers) for content, *numbers in self._batches]
        objectives = {name: self._options.objectives[name] for name in names}
        given = self._wide, self._options.monitor, objectives, self._num_loaders
        found = objective_gradients(self._module, self._params, batches, *given, teachers=self._teachers)
        return dict(zip(names, found, strict=True))

    def places(self, name: str) -> list[str]:
        """The lines at which values leave the graph."""
        return [*self._watched(name).places]

    def _watched(self, name: str) -> WatchedCalls:
        watched = WatchedCalls(self._module, locates=True)
        for content, batch_idx, number in self._batches:
            batch = self._wide.prepare(cloned(content), number), batch_idx, number
            with self._wide.val_context(), watched:
                value_of(self._options.objectives[name], self._module, batch, self._options.monitor, self._num_loaders)
        return watched
