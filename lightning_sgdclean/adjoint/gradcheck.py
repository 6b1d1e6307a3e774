# SPDX-License-Identifier: Apache-2.0
"""Hold what the engine makes of a step against differences of the gradient that training really used.

A derivative can be right for the loss and wrong for the training: a hook edits the gradient, an ``autograd.Function``
gives another one than the loss has, a value that the parameters move is used behind ``detach``, ``item`` or
``no_grad``. All of it shows when the parameters are moved a little and the module's own ``backward`` is asked again::

    <w, J^T v>  =  <v, g(theta + e w) - g(theta - e w)> / 2 e

``J`` is the Jacobian of the gradient ``g`` by parameters and running statistics, or by the samples' weights. ``v`` and
``w`` are random, and besides have a share along ``g``, where a factor shows that is no constant, and ``w`` along
``J^T v``, where most of the derivative lies. Everything is computed in float64, and ``e`` is so small that hardly a
ReLU is crossed: those kinks are what no exact Hessian sees.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_sgdclean.adjoint.curvature import Engine, Exact, Finite, Linearised, Pulled
from lightning_sgdclean.adjoint.gauss_newton import GaussNewton, contradictions
from lightning_sgdclean.adjoint.quotients import TOLERANCE, Movable, difference, normal, towards, without_padding
from lightning_sgdclean.base.errors import SGDInfluenceError, UnsupportedOperationError
from lightning_sgdclean.losses.evaluate import RecordedBatch
from lightning_sgdclean.losses.kernels import dot, length_of
from lightning_sgdclean.losses.module_state import own_gradients
from lightning_sgdclean.losses.precision import in_float64, lack_of_memory
from lightning_sgdclean.losses.surroundings import Surroundings
from lightning_sgdclean.losses.watched_calls import WatchedCalls, graph_of
from lightning_sgdclean.replay.replay import Replay
from lightning_sgdclean.trajectory.records import State, Step

_MOVES = (1e-8, 1e-9, 1e-10, 1e-11, 1e-7, 1e-6, 1e-5)  # relative to what is moved


@dataclass
class DerivativeChecks:
    """Which steps of a walk are checked: the first and the last of each epoch, and those made in a new manner.

    A check takes as long as four to ten retraced steps. So there are few: three, and one more for each 1,024 steps.

    Args:
        steps: The window; none for a single step, which is then checked.

    Attributes:
        num_checked: Steps whose derivative was held against differences.
        unknown: Why it could not be told of others, in words.
        largest: Largest relative difference.
    """

    steps: Sequence[Step] = ()
    num_checked: int = 0
    unknown: list[str] = field(default_factory=list)
    largest: float = 0.0

    def __post_init__(self) -> None:
        self._num = _FEW + len(self.steps) // _STEPS_A_CHECK
        last = {step.epoch: step.index for step in self.steps if step.is_update}
        first = {step.epoch: step.index for step in reversed(self.steps) if step.is_update}
        ends = sorted({*first.values(), *last.values()})
        self._planned = {ends[round(i * (len(ends) - 1) / (self._num - 1))] for i in range(self._num)} if ends else None
        self._manners: set[Any] = set()
        self._num_new = 0
        batches = [micro for step in self.steps for micro in step.micro if micro.scale]
        losses = [abs(float(micro.loss) / micro.scale) for micro in batches if micro.loss is not None]
        self.largest_loss = max(filter(math.isfinite, losses), default=0.0)

    def is_due(self, step: Step, batch: RecordedBatch) -> bool:
        """Whether a batch that was just evaluated is to be checked; not asked twice of one."""
        is_new = batch.manner not in self._manners
        self._manners.add(batch.manner)
        if self._planned is None or step.index in self._planned:
            return True
        self._num_new += is_new
        return is_new and self._num_new <= self._num

    @property
    def is_told(self) -> bool:
        """Whether any step's derivative could be checked as a whole."""
        return self.num_checked > len(self.unknown)

    @property
    def words(self) -> str:
        """How it went."""
        if not self.num_checked:
            return "no step was checked"
        steps = "1 step" if self.num_checked == 1 else f"{self.num_checked} steps"
        of = f"; of {len(self.unknown)} it could not be told: {self.unknown[0]}" if self.unknown else ""
        return f"{steps} held against differences of training's own gradient, off by {self.largest:.1g} at most{of}"

    def complaints(self) -> list[str]:
        """That nothing could be told, if so."""
        if self.is_told or not self.num_checked:
            return []
        return [f"Whether the influences follow the gradient that training used could not be told: {self.unknown[0]}."]


_FEW, _STEPS_A_CHECK = 3, 1024


def check_derivative(
    step: Step, before: State, batch: RecordedBatch, engine: Engine, replay: Replay, checks: DerivativeChecks
) -> None:
    """Check the derivative of one batch; the module is left at other parameters.

    Args:
        step: The step that the batch is of.
        before: The state before it.
        batch: The batch, evaluated before.
        engine: What is checked.
        replay: The live module.
        checks: Takes in the outcome.

    Raises:
        UnsupportedOperationError: If the engine's derivative is not that of the training, unless mismatches are only
            warned about.
    """
    checks.num_checked += 1
    try:
        lacking = lack_of_memory(partial(batch.call, []), batch.params)
        if lacking:
            checks.unknown.append(lacking)
            return
        with own_gradients(replay.module), in_float64(replay.module, replay.surroundings) as wide:
            point = _Point(batch.elsewhere(), before, engine, wide, replay)
            if point.reach <= _NOTHING * max(1e-3, checks.largest_loss):
                return  # the step moves nothing, and says nothing of any sample
            found = point.differences()
            told = {part: off for part, off in found.items() if off is not None}
            wrong = next((part for part, off in told.items() if off > TOLERANCE), None)
            causes = point.causes(wrong) if wrong is not None else _Causes()
    except SGDInfluenceError:
        raise
    except Exception as error:  # theirs: code that wants float32, a kernel without float64, too little memory
        checks.unknown.append(f"in float64 the step cannot be evaluated ({type(error).__name__}: {error})"[:300])
        return
    checks.largest = max(checks.largest, *told.values(), 0.0)
    if len(told) < len(found):
        checks.unknown.append("differences of two sizes contradict each other")
    if wrong is None:
        return
    text = (
        f"{causes.words} At step {step.index} (epoch {step.epoch}) {wrong} is off by "
        f"{told[wrong]:.1%}. {causes.way_out(engine)}"
    )
    if replay.fidelity.on_mismatch == "raise":
        raise UnsupportedOperationError(f'{text} on_mismatch="warn" leaves that part of the effect out.')
    if text not in replay.fidelity.complaints:
        replay.fidelity.complaints.append(text)


_NOTHING = 1e-10  # of the largest loss: so small a gradient of saturated outputs is rounding, and so is its change


@dataclass
class _Causes:
    """What could make the derivative of the loss another one than that of the training."""

    own: str = ""
    stops: list[str] = field(default_factory=list)
    edits: list[str] = field(default_factory=list)

    @property
    def words(self) -> str:
        if self.own:
            return self.own
        if self.stops:
            return (
                f"training_step stops gradients ({', '.join(self.stops[:_NUM_NAMED])}) at values that the parameters "
                "move, and the gradient depends on them."
            )
        seen = f" ({', '.join(self.edits[:_NUM_NAMED])})" if self.edits else ""
        return f"The gradient that training uses is not the derivative of its loss{seen}."

    def way_out(self, engine: Engine) -> str:
        if self.own:
            return "Let the weights, and what they multiply, reach the loss through the graph alone."
        if self.stops:
            return "Let the gradient through, or compute these values from what is not trained."
        if isinstance(engine, Finite | GaussNewton):
            return 'Use curvature="exact", which follows hooks of tensors, parameters and modules.'
        return (
            "Edit gradients by a hook of the tensor, x.register_hook(lambda grad: -grad) say, of operations that "
            "autograd can differentiate: such hooks are followed."
        )


_NUM_NAMED = 3
_BY_WEIGHTS = "the gradient's change with the samples' weights"


class _Point:
    """A batch at the parameters of its step, shaken a little, since zeros may hide what is wrong, or sit on a kink."""

    def __init__(self, batch: RecordedBatch, before: State, engine: Engine, wide: Surroundings, replay: Replay) -> None:
        self._batch, self._wide, self._engine, self._module = batch, wide, engine, replay.module
        replay.load(before)
        self._params = list(replay.params.values())
        self._source = torch.Generator().manual_seed(len(batch.micro.ids) + batch.micro.global_step)
        self._tensors = Movable(self._params, replay.module, self._source)
        self._padding = self._watched().padding
        self._weights = batch.weights()
        try:  # Gauss-Newton is no derivative: that which it approximates is checked
            self._pulled = self._pull_back(Exact() if isinstance(engine, GaussNewton) else engine)
        except UnsupportedOperationError:
            if not isinstance(engine, GaussNewton):
                raise
            self._pulled = self._pull_back(Finite())

    def _pull_back(self, engine: Engine) -> Pulled:
        self._tensors.put_back()
        engine = Finite(_MOVES[0], falls_back=False) if isinstance(engine, Finite) else engine
        evaluate = partial(self._batch.evaluate, surroundings=self._wide)
        linearised: Linearised = engine.open(evaluate, self._params, self._weights, needs_gradient=True)
        self._gradient = linearised.gradient or []
        self._v = self._without_padding(towards(self._source, self._gradient, self._gradient))
        self._nu = {update.name: self._buffer_along(update.name, *self._gradient) for update in linearised.updates}
        return linearised.pull_back(self._v, dict(self._nu))

    @property
    def reach(self) -> float:
        """What moving all parameters by their own length could do to the loss, to first order."""
        return length_of(self._gradient) * length_of(self._tensors.params)

    def differences(self) -> dict[str, float | None]:
        """How far the derivative is off, by its parts; None where it could not be told."""
        found: dict[str, float | None] = {}
        if self._engine.with_hessian:
            found["the gradient's change with the parameters"] = self._difference_by_parameters()
        found[_BY_WEIGHTS] = self._difference_by_weights()
        self._tensors.put_back()
        used = self._used()
        off = length_of(one - other for one, other in zip(used.gradient, self._gradient, strict=True))
        found["the gradient"] = off / (length_of(used.gradient) or 1.0)
        if isinstance(self._engine, GaussNewton):
            evaluate = partial(self._batch.evaluate, surroundings=self._wide)
            found |= contradictions(evaluate, self._params, self._weights, self._v, used.gradient, self._pulled.scores)
        if self._batch.leaves_torch:
            found["the gradient's change with numbers that leave torch"] = self._difference_by_numbers(used)
        return found

    def _difference_by_parameters(self) -> float | None:
        found = self._pulled
        moves = self._without_padding(towards(self._source, self._tensors.params, found.adjoint, self._gradient))
        buffers = {name: self._buffer_along(name, self._tensors.buffers[name]) for name in found.buffers}
        expected = dot(found.adjoint, moves) + dot(found.buffers.values(), buffers.values())

        def moved(e: float) -> _Answer:
            self._tensors.move(e, moves, buffers)
            return self._used()

        return self._compare(moved, expected)

    def _buffer_along(self, name: str, *like: Tensor) -> Tensor:
        """A random tensor for a buffer, as long as others."""
        found = normal(self._source, self._tensors.buffers[name])
        return found * (length_of(like) / (length_of([found]) or 1.0))

    def _without_padding(self, moves: list[Tensor]) -> list[Tensor]:
        return without_padding(moves, self._params, self._gradient, self._padding)

    def _difference_by_weights(self) -> float | None:
        weights, scores = self._weights.detach(), self._pulled.scores
        (move,) = towards(self._source, [weights], [scores])
        return self._compare(lambda e: self._weighted(weights + e * move), dot([scores], [move]))

    def _difference_by_numbers(self, used: "_Answer") -> float:
        """It must not change with them. Code that rounds them to float32 hides moves as small as the others."""
        watched = WatchedCalls(self._module, nudge=_NUDGE)
        self._tensors.put_back()
        nudged = self._used(watched)
        off = length_of(one - other for one, other in zip(used.gradient, nudged.gradient, strict=True))
        return max(0.0, off / (length_of(used.gradient) or 1.0) - 1e-10) / _NUDGE

    def _compare(self, answer: Callable[[float], "_Answer"], expected: float) -> float | None:
        def quotient(e: float) -> tuple[float, float]:
            plus, minus = answer(e), answer(-e)
            return (self._against(plus) - self._against(minus)) / (2 * e), self._size(plus) / (2 * e)

        return difference(expected, quotient, _MOVES)

    def _against(self, answer: "_Answer") -> float:
        return dot(self._v, answer.gradient) + dot(self._nu.values(), [answer.buffers[name] for name in self._nu])

    def _size(self, answer: "_Answer") -> float:
        buffers = [answer.buffers[name] for name in self._nu]
        return length_of(self._v) * length_of(answer.gradient) + length_of(self._nu.values()) * length_of(buffers)

    def _used(self, *watchers: WatchedCalls) -> "_Answer":
        """What training gets at the present parameters and running statistics, by the module's own ``backward``."""
        return self._backward(self._batch.call(watchers, self._wide, restores=False) / self._batch.divisor)

    def _weighted(self, weights: Tensor) -> "_Answer":
        """The same with other weights on the samples' losses."""
        self._tensors.put_back()
        return self._backward(self._batch.evaluate(weights, surroundings=self._wide).loss)

    def _backward(self, loss: Tensor) -> "_Answer":
        for param in self._module.parameters():  # as Lightning does between training_step and backward
            param.grad = None
        self._module.backward(loss)
        self._batch.restore()
        gradient = [torch.zeros_like(param) if param.grad is None else param.grad for param in self._params]
        return _Answer(gradient, {name: buffer.clone() for name, buffer in self._module.named_buffers()})

    def _watched(self) -> WatchedCalls:
        watched = WatchedCalls(self._module, locates=True)
        self._tensors.put_back()
        self._names = graph_of(self._batch.call([watched], self._wide))
        self._tensors.put_back()  # it moved running statistics
        return watched

    def causes(self, wrong: str) -> _Causes:
        """What the module, or the user's own loss, does that could explain a difference."""
        if wrong == _BY_WEIGHTS and self._batch.weighted_loss is not None:
            return _Causes(
                "weighted_loss= has values that change otherwise with the weights than its derivative by them says: "
                "some of them leave the graph on their way (detach, item, tolist, numpy, no_grad)."
            )
        watched, names = self._watched(), self._names
        functions = [name.removesuffix("Backward") for name in names if name.endswith("Backward")]
        edits = [f"torch.autograd.Function {name!r}" for name in functions if name != "BackwardHookFunction"]
        for name, param in self._module.named_parameters():
            if param._backward_hooks or getattr(param, "_post_accumulate_grad_hooks", None):
                edits.append(f"a hook of the parameter {name!r}")
        for name, part in self._module.named_modules():
            if part._backward_hooks or part._backward_pre_hooks:
                edits.append(f"a backward hook of the module {name or type(part).__name__!r}")
        return _Causes("", [*watched.places], edits)


_NUDGE = 1e-5


@dataclass
class _Answer:
    """A gradient as training would use it, and the buffers after it."""

    gradient: list[Tensor]
    buffers: dict[str, Tensor]
