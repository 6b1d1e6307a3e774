# SPDX-License-Identifier: Apache-2.0
"""The objective and its gradient, where the walk starts."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sgdclean.adjoint.logged import Said, check_weight, logged_value, no_such_value
from lightning_sgdclean.base.errors import NonFiniteError, ObjectiveError
from lightning_sgdclean.base.lightning import batch_size_of
from lightning_sgdclean.base.options import ObjectiveFn, Options
from lightning_sgdclean.base.randomness import random_state, set_random_state
from lightning_sgdclean.data.batches import cloned, summable
from lightning_sgdclean.data.fetching import ValidationBatch
from lightning_sgdclean.losses.kernels import gradient
from lightning_sgdclean.losses.running_statistics import RunningStatistics, buffer_is_read
from lightning_sgdclean.losses.surroundings import Surroundings, eagerly, ignore, logging_to
from lightning_sgdclean.losses.watched_calls import WatchedCalls, resting_hooks
from lightning_sgdclean.replay.replay import Replay, Validation
from lightning_sgdclean.trajectory.records import State
from lightning_sgdclean.trajectory.teachers import teachers_of


@dataclass
class ObjectiveGradient:
    """``F`` and its derivatives by parameters (in their order) and running statistics (by name).

    ``as_logged`` is ``F`` summed up in the precision in which Lightning sums what is logged, ``sources`` where its
    values come from (see :class:`~lightning_sgdclean.adjoint.logged.Said`), ``names`` what was logged.
    """

    value: float
    params: list[Tensor]
    buffers: dict[str, Tensor]
    as_logged: float
    sources: set[str] = field(default_factory=set)
    names: list[str] = field(default_factory=list)


def objective_gradients(
    module: Any,
    params: list[nn.Parameter],
    batches: Iterable[ValidationBatch],
    surroundings: Surroundings,
    monitor: str,
    objectives: dict[str, ObjectiveFn | None],
    num_loaders: int,
    manners: dict[Any, int] | None = None,
    teachers: dict[str, nn.Parameter] | None = None,
) -> list[ObjectiveGradient]:
    """Each objective's mean over the validation set, weighted by batch sizes as Lightning weights, and its gradient.

    Args:
        module: The LightningModule.
        params: By which to differentiate.
        batches: The validation set.
        surroundings: What stands for the Trainer.
        monitor: The value that ``validation_step`` logs, where no callable is given.
        objectives: By name, callables ``(module, batch)`` or None.
        num_loaders: How many validation loaders there are.
        manners: Takes in the ways in which values were made, each with the number of the first batch that was.
        teachers: By which to differentiate besides, by name; by default none, since whether they move is not known.

    Raises:
        ObjectiveError: If no batch gives a value of that name, or one that cannot be differentiated.
        NonFiniteError: If the value or its gradient is not finite.
    """
    teachers = teachers or {}
    means = {name: _Mean(params) for name in objectives}
    names: list[str] = []
    module.eval()
    several = len(objectives) > 1
    with _requiring_grad(teachers.values()):
        for place, (content, batch_idx, number) in enumerate(batches):
            batch = surroundings.prepare(content, number)
            random = random_state(surroundings.device) if several else None  # each draws the same
            for name, objective in objectives.items():
                watched, calls = RunningStatistics(module), WatchedCalls(module)
                own = cloned(batch) if several else batch  # a callable may write into it
                if random is not None:
                    set_random_state(random, surroundings.device)
                with eagerly(), surroundings.val_context(), calls, watched:
                    said = value_of(objective, module, (own, batch_idx, number), monitor, num_loaders)
                names += [seen_name for seen_name in said.names if seen_name not in names]
                if said.value is not None and said.weight and means[name].takes(said):
                    if manners is not None:
                        manners.setdefault((name, calls.manner(said.value)), place)
                    means[name].add(said.value, said.weight, watched.leaves | teachers)
    return [mean.result(name, no_mean(name, objectives[name], monitor, names), names) for name, mean in means.items()]


def objectives_at(
    state: State,
    replay: Replay,
    validation: Validation,
    options: Options,
    surroundings: Surroundings,
    manners: dict[Any, int] | None = None,
) -> list[ObjectiveGradient]:
    """The objectives in a state of the run; the module is in the modes of training afterwards.

    Args:
        state: The state.
        replay: Its live module takes the state on.
        validation: Gives the validation set, and of how many loaders it comes.
        options: The callback's.
        surroundings: The run's, or those that widen it to float32.
        manners: As for :func:`objective_gradients`.

    Raises:
        ObjectiveError: As :func:`objective_gradients`.
        NonFiniteError: Likewise.
        UnsupportedTrainingError: If it reads a buffer that training moves, and nothing else reads.
    """

    def evaluated() -> list[ObjectiveGradient]:
        batches, num_loaders = validation()
        given = surroundings, options.monitor, options.objectives, num_loaders, manners, replay.teachers.live
        return objective_gradients(replay.module, list(replay.params.values()), batches, *given)

    with surroundings.as_stage("validate"):
        replay.load(state, spoiled=replay.scratch)
        try:
            found = evaluated()
        except NonFiniteError:
            _check_unread(state, replay, evaluated)
            raise
    replay.restore()  # validation had put the module into evaluation mode
    return found


def _check_unread(state: State, replay: Replay, evaluate: Callable[[], Any]) -> None:
    """The objective is not finite while scratch buffers hold NaN: refuse it by name if it reads one of them."""
    for name in sorted(replay.scratch):
        replay.load(state, spoiled=frozenset([name]))
        try:
            evaluate()
        except NonFiniteError as error:
            replay.load(state)
            evaluate()  # raises where it is not finite anyway
            raise buffer_is_read(name, "the objective") from error


def with_teachers(module: nn.Module, params: list[nn.Parameter]) -> AbstractContextManager[None]:
    """Within the block, the objective's graph leads to all that may be teachers of ``params`` as well."""
    return _requiring_grad(teachers_of(module, params).values())


@contextmanager
def _requiring_grad(tensors: Iterable[Tensor]) -> Iterator[None]:
    own = [(tensor, tensor.requires_grad) for tensor in tensors]
    for tensor, _ in own:
        tensor.requires_grad_()
    try:
        yield
    finally:
        for tensor, is_wanted in own:
            tensor.requires_grad_(is_wanted)


def value_of(
    objective: ObjectiveFn | None,
    module: Any,
    batch: ValidationBatch,
    monitor: str,
    num_loaders: int,
    needs_graph: bool = True,
) -> Said:
    """What a callable, or None for ``validation_step``, says of a batch; see :func:`logged_value`."""
    if objective is None:
        return logged_value(module, batch, monitor, num_loaders, needs_graph)
    return _called(objective, module, batch[0], needs_graph)


class _Mean:
    """A weighted mean of values, with its gradient."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        self._params = params
        self._forget()

    def _forget(self) -> None:
        params, self._sources = self._params, set[str]()
        self._total, self._weights = 0.0, 0.0
        is_double = bool(params) and params[0].dtype is torch.float64
        self._logged = torch.zeros((), dtype=torch.float64 if is_double else None)  # in 64 bits Lightning sums in these
        self._by_param = [summable(torch.zeros_like(param)) for param in params]  # sums in 16 bits stop growing
        self._by_buffer: dict[str, Tensor] = {}

    def takes(self, said: Said) -> bool:
        """Whether it takes this in: what was returned counts only if nothing was logged."""
        if said.source == "returned" and self._sources - {"returned"}:
            return False
        if said.source != "returned" and "returned" in self._sources:
            self._forget()
        self._sources.add(said.source)
        return True

    def add(self, value: Tensor, weight: float, leaves: dict[str, Tensor]) -> None:
        with resting_hooks(self._params):
            found = gradient([value], [*self._params, *leaves.values()], [torch.full_like(value, weight)])
        found = [summable(grad) for grad in found]
        torch._foreach_add_(self._by_param, found[: len(self._params)])
        for name, grad in zip(leaves, found[len(self._params) :], strict=True):
            self._by_buffer[name] = self._by_buffer[name] + grad if name in self._by_buffer else grad
        self._total, self._weights = self._total + weight * float(value.detach()), self._weights + weight
        self._logged = self._logged.to(value.device) + summable(value.detach()) * weight

    def result(self, name: str, missing: ObjectiveError, names: list[str]) -> ObjectiveGradient:
        if self._weights == 0:
            raise missing
        by_param = [grad / self._weights for grad in self._by_param]
        by_buffer = {buffer: grad / self._weights for buffer, grad in self._by_buffer.items()}
        value = self._total / self._weights
        if not math.isfinite(value) or not all(bool(torch.isfinite(grad).all()) for grad in by_param):
            raise NonFiniteError(
                f"The objective {name!r} is {value} or its gradient is not finite: nothing can be ranked by it."
            )
        as_logged = float(self._logged / self._weights)
        return ObjectiveGradient(value, by_param, by_buffer, as_logged, self._sources, names)


def no_mean(name: str, objective: ObjectiveFn | None, monitor: str, names: list[str]) -> ObjectiveError:
    """The error for an objective of which no batch said anything; ``names``: what was logged."""
    if objective is None:
        return no_such_value(monitor, names)
    return ObjectiveError(
        f"The objective {name!r} has a weight of zero in every validation batch, so it has no mean. "
        "Is there no such sample in the validation data?"
    )


def _called(objective: ObjectiveFn, module: Any, batch: Any, needs_graph: bool) -> Said:
    with logging_to(module, ignore):
        result = objective(module, batch)
    value, weight = result if isinstance(result, tuple) else (result, None)
    if not isinstance(value, Tensor) or value.numel() != 1 or (needs_graph and not value.requires_grad):
        raise ObjectiveError("objective= must return a scalar tensor that can be differentiated, or (scalar, weight).")
    check_weight(weight)
    weight = float(batch_size_of(batch) if weight is None else weight)
    if not 0 <= weight < math.inf:
        raise ObjectiveError(f"objective= gave a weight of {weight}; expected a finite one that is not negative.")
    return Said(value.reshape(()), weight, [])


Everywhere = Callable[[Callable[[], Tensor]], Tensor]


def objective_values(
    replay: Replay, batches: Iterable[ValidationBatch], num_loaders: int, options: Options, everywhere: Everywhere
) -> list[float]:
    """Mean over the validation set of the objective that ranks, in each of several states.

    Args:
        replay: Its live module is in the modes of training afterwards.
        batches: The validation set.
        num_loaders: How many validation loaders there are.
        options: The callback's.
        everywhere: Calls a function of the live module in each state, and gives its values ``(K,)``.

    Raises:
        ObjectiveError: If no batch gives such a value.
    """
    name, objective = next(iter(options.objectives.items()))
    total, weights, has_logged = torch.zeros(()), 0.0, False
    names: dict[str, None] = {}
    replay.module.eval()
    with replay.surroundings.as_stage("validate"):
        for content, batch_idx, number in batches:
            batch = replay.surroundings.prepare(content, number), batch_idx, number
            value = _Value(objective, replay, batch, options.monitor, num_loaders)
            values = everywhere(value)
            names |= dict.fromkeys(value.names)
            if value.source == "returned" and has_logged:
                continue  # what was returned counts only if nothing was logged
            if value.weight and value.source != "returned" and not has_logged:
                has_logged, total, weights = True, torch.zeros(()), 0.0
            if value.weight:
                total, weights = total + value.weight * values, weights + value.weight
    replay.restore()  # validation had put the module into evaluation mode
    if not weights:
        raise no_mean(name, objective, options.monitor, list(names))
    means: list[float] = (total / weights).tolist()
    return means


class _Value:
    """The objective of one batch, at the same random numbers wherever it is asked for.

    Attributes:
        weight: What it weighs in the mean, once it was asked for; zero if the batch says nothing of it.
        names: All values that were logged.
        source: Where the value comes from.
    """

    def __init__(
        self, objective: ObjectiveFn | None, replay: Replay, batch: ValidationBatch, monitor: str, num_loaders: int
    ) -> None:
        self._objective, self._replay, self._batch = objective, replay, batch
        self._monitor, self._num_loaders = monitor, num_loaders
        self._random = random_state(replay.surroundings.device)
        self.weight, self.source = 0.0, "logged"
        self.names: list[str] = []

    def __call__(self) -> Tensor:
        """In float64, on the CPU."""
        content, batch_idx, number = self._batch
        surroundings = self._replay.surroundings
        set_random_state(self._random, surroundings.device)
        with eagerly(), surroundings.val_context():
            found, self.weight, self.names, self.source = value_of(
                self._objective,
                self._replay.module,
                (cloned(content), batch_idx, number),
                self._monitor,
                self._num_loaders,
                needs_graph=False,
            )
        with torch._C.DisableTorchFunctionSubclass():  # a class of one's own, as MONAI's, may not let itself be indexed
            plain = torch.zeros(()) if found is None else found.detach().as_subclass(Tensor)
        return plain.double().cpu()
