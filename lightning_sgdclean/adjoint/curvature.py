# SPDX-License-Identifier: Apache-2.0
r"""Engines: from a cotangent ``c`` of a batch's gradient to the samples' scores and ``H c``.

Each takes a *problem*, a callable from weights ``(B,)`` to the batch's loss at the live parameters,
and gives a linearisation with two moments: first its gradient, which the optimizer's transpose may
need to find ``c``, then :meth:`Linearised.pull_back`.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from lightning_sgdclean.base.errors import NonFiniteError, UnsupportedOperationError
from lightning_sgdclean.losses.kernels import dot, gradient, length_of, refuse_cut_graphs, twice_differentiable_kernels
from lightning_sgdclean.losses.loss_inputs import LossInputs
from lightning_sgdclean.losses.running_statistics import BatchStatistic, pull_back_updates
from lightning_sgdclean.losses.stopped_values import TeacherRead, TeachersOutputs, pull_back_through
from lightning_sgdclean.losses.watched_calls import resting_hooks
from lightning_sgdclean.losses.weighting import Evaluated


class Problem(Protocol):
    """A batch's loss as a function of its samples' weights, at the live parameters."""

    def __call__(self, weights: Tensor, *, inputs: LossInputs | None = None) -> Evaluated:
        """Evaluate it; with ``inputs`` the graph is cut where the loss begins."""


@dataclass
class Pulled:
    """What a batch adds: ``<c, grad l_i> / divisor`` for each sample, to the adjoint, and ``nu`` before it."""

    scores: Tensor
    adjoint: list[Tensor]
    buffers: dict[str, Tensor]


class Linearised(Protocol):
    """A batch's loss at the parameters of its step."""

    loss: Tensor
    gradient: list[Tensor] | None
    updates: list[BatchStatistic]

    def pull_back(self, cotangent: list[Tensor], buffers: dict[str, Tensor], again: bool = False) -> Pulled:
        """Scores, adjoint and ``nu`` for a cotangent of the gradient and one of the buffers.

        Args:
            cotangent: Of each parameter's gradient.
            buffers: ``nu`` after the batch.
            again: Whether another cotangent is to follow.
        """


class Engine(Protocol):
    """A way to have the scores and the Hessian-vector product.

    Attributes:
        with_hessian: Whether it has the latter.
    """

    with_hessian: bool

    def open(self, problem: Problem, params: list[nn.Parameter], weights: Tensor, needs_gradient: bool) -> Linearised:
        """Evaluate a batch; with ``needs_gradient`` also its gradient."""


class Exact:
    """One double backward with the sample weights as inputs, or its part without the Hessian.

    ``g(theta, w)`` is built with its graph; differentiating ``<c, g>`` with respect to ``w`` gives the
    scores, with respect to ``theta`` the Hessian's product.
    """

    def __init__(self, with_hessian: bool = True) -> None:
        self.with_hessian = with_hessian

    def open(self, problem: Problem, params: list[nn.Parameter], weights: Tensor, needs_gradient: bool) -> "_Twice":
        """Evaluate the batch and its gradient, both with graph."""
        with twice_differentiable_kernels():
            evaluated = problem(weights)
            refuse_cut_graphs(evaluated.loss)
            graph = gradient([evaluated.loss], list(params), create_graph=True)
        return _Twice(evaluated, graph, list(params), weights, self.with_hessian)


class _Twice:
    def __init__(
        self, evaluated: Evaluated, graph: list[Tensor], params: list[Tensor], weights: Tensor, with_hessian: bool
    ) -> None:
        self._graph, self._params, self._weights, self._with_hessian = graph, params, weights, with_hessian
        self.loss, self.updates, self._leaves = evaluated.loss.detach(), evaluated.updates, evaluated.leaves
        self._stopped = evaluated.stopped
        self.gradient: list[Tensor] | None = [grad.detach() for grad in graph]

    def pull_back(self, cotangent: list[Tensor], buffers: dict[str, Tensor], again: bool = False) -> Pulled:
        values, pulls, before = pull_back_updates(self.updates, buffers)
        with twice_differentiable_kernels(), resting_hooks(self._params):
            if not self._with_hessian:
                (scores,) = gradient(self._graph, [self._weights], cotangent, retain_graph=again or bool(values))
                return Pulled(scores, gradient(values, self._params, pulls, retain_graph=again), before)
            inputs = [self._weights, *self._params, *self._leaves.values()]
            outputs, pulls = [*self._graph, *values], [*cotangent, *pulls]
            found, reads = pull_back_through(outputs, pulls, inputs, self._stopped, retain_graph=again)
        num = len(self._params)
        adjoint, before = found[1 : num + 1], with_read(before, self._leaves, found[num + 1 :])
        for one in reads:
            one.add_to(before, adjoint)
        return Pulled(found[0], adjoint, before)


def with_read(buffers: dict[str, Tensor], leaves: dict[str, Tensor], found: list[Tensor]) -> dict[str, Tensor]:
    """``nu`` before a batch whose gradient was computed with running statistics: frozen norms read them."""
    for name, grad in zip(leaves, found, strict=True):
        buffers[name] = buffers[name] + grad if name in buffers else grad
    return buffers


_BENT = 0.3  # of what slope and curvature say the loss does along the move
_WOKEN = 0.1  # of the curvature found


class Finite:
    """Central difference along ``c``: two ordinary passes, any operation that trains.

    Where the batch's gradient is at hand, it is checked at no cost that the loss does along the move what its slope and
    the curvature found say. Where it does not, kinks were crossed, and the batch is pulled back by :class:`Exact`.

    Args:
        radius: Length of the move relative to that of the parameters.
        falls_back: Whether :class:`Exact` stands in where the differences cannot be trusted.

    Attributes:
        num_pulled: How many batches were pulled back.
        num_replaced: How many of them by :class:`Exact`.
        num_doubtful: How many should have been, but cannot.
        why: Why they cannot.
    """

    with_hessian = True

    def __init__(self, radius: float = 0.03, *, falls_back: bool = True) -> None:
        self.radius, self.falls_back = radius, falls_back
        self.num_pulled = self.num_replaced = self.num_doubtful = 0
        self.why = ""

    def open(
        self, problem: Problem, params: list[nn.Parameter], weights: Tensor, needs_gradient: bool
    ) -> "_Difference":
        """Evaluate the batch, without a gradient unless it is needed."""
        found: list[Tensor] | None = None
        with torch.set_grad_enabled(needs_gradient):
            evaluated = problem(weights)
            if needs_gradient:
                found = gradient([evaluated.loss], list(params))
        return _Difference(problem, evaluated, found, params, weights, self)

    def complaints(self) -> list[str]:
        """That differences were used which cannot be trusted, if so."""
        if not self.num_doubtful:
            return []
        return [
            f'curvature="finite" cannot be trusted here: in {self.num_doubtful} of {self.num_pulled} batches the loss, '
            "along the move, is not what its slope and the curvature found say, since kinks of ReLU or pooling were "
            f"crossed. The exact derivative, which would stand in for it, cannot be had: {self.why}"
        ]


class _Difference:
    def __init__(
        self,
        problem: Problem,
        evaluated: Evaluated,
        found: list[Tensor] | None,
        params: list[nn.Parameter],
        weights: Tensor,
        engine: Finite,
    ) -> None:
        self._problem, self._params, self._weights, self._engine = problem, params, weights, engine
        self.gradient = found
        self.loss, self.updates = evaluated.loss.detach(), evaluated.updates

    def pull_back(self, cotangent: list[Tensor], buffers: dict[str, Tensor], again: bool = False) -> Pulled:
        direction = self._live(cotangent)
        length = length_of(direction)
        start = [param.detach().clone() for param in self._params]
        move = self._engine.radius * (length_of(start) or 1.0) / (length or 1.0)
        if not 0 < move < math.inf:
            raise NonFiniteError(
                f"The derivative stopped being finite on the way back: the adjoint's length is {length}."
            )
        scores = torch.zeros_like(self._weights)
        adjoint = [torch.zeros_like(param) for param in self._params]
        before, read, losses = dict(buffers), dict[str, Tensor](), dict[int, float]()
        reads: list[TeacherRead] = []
        for sign in (1, -1):
            with torch.no_grad():
                for param, origin, c in zip(self._params, start, direction, strict=True):
                    param.copy_(origin + sign * move * c)
            evaluated = self._problem(self._weights)
            losses[sign] = float(evaluated.loss.detach())
            _refuse_moving(evaluated.stopped)
            values, pulls, before = pull_back_updates(evaluated.updates, buffers)
            factor = sign / (2 * move)
            # The statistics' term needs no difference: its mean over the two passes rides along.
            found, some = pull_back_through(
                [evaluated.loss, *values],
                [torch.full_like(evaluated.loss, factor), *(pull / 2 for pull in pulls)],
                [self._weights, *self._params, *evaluated.leaves.values()],
                evaluated.stopped,
            )
            reads += some
            scores += found[0]
            torch._foreach_add_(adjoint, found[1 : len(adjoint) + 1])
            read = with_read(read, evaluated.leaves, found[len(adjoint) + 1 :])
        with torch.no_grad():
            for param, origin in zip(self._params, start, strict=True):
                param.copy_(origin)
        self._engine.num_pulled += 1
        if self._engine.falls_back and self._is_bent(direction, adjoint, losses, move):
            exact = self._exact(cotangent, buffers)
            if exact is not None:
                return exact
        before = with_read(before, read, list(read.values()))
        for one in reads:
            one.add_to(before, adjoint)
        return Pulled(scores, adjoint, before)

    def _live(self, cotangent: list[Tensor]) -> list[Tensor]:
        """The part of ``c`` that the batch's gradient knows of.

        Where a gradient is zero, as at units that are dead for all samples, so is its curvature. After Adam's division
        by the root of a second moment that is zero, too, ``c`` is huge just there: the move would be all along it.
        """
        if self.gradient is None:
            return cotangent
        live = [torch.where(grad != 0, c, 0.0) for grad, c in zip(self.gradient, cotangent, strict=True)]
        return live if any(bool(c.any()) for c in live) else cotangent

    def _is_bent(self, cotangent: list[Tensor], curved: list[Tensor], losses: dict[int, float], move: float) -> bool:
        """Whether the loss, along the move, is far from the parabola of its slope and of the curvature found.

        Or whether gradients that were zero are not any more: a dead unit woke, or factors that began at zero moved.
        """
        if self.gradient is None:
            return False
        woken = [torch.where(grad == 0, h, 0.0) for grad, h in zip(self.gradient, curved, strict=True)]
        if length_of(woken) > _WOKEN * length_of(curved):
            return True
        slope, curvature, loss = dot(self.gradient, cotangent), dot(curved, cotangent), float(self.loss)
        rounding = 16 * torch.finfo(self.loss.dtype).eps * abs(loss)
        for sign, there in losses.items():
            rise, bend = sign * move * slope, move**2 * curvature / 2
            if abs(there - loss - rise - bend) > _BENT * (abs(rise) + abs(bend)) + rounding:
                return True
        return False

    def _exact(self, cotangent: list[Tensor], buffers: dict[str, Tensor]) -> Pulled | None:
        try:
            linearised = Exact().open(self._problem, self._params, self._weights, needs_gradient=True)
            pulled = linearised.pull_back(cotangent, dict(buffers))
        except (UnsupportedOperationError, torch.OutOfMemoryError) as error:
            self._engine.num_doubtful += 1
            self._engine.why = str(error)
            return None
        self._engine.num_replaced += 1
        return pulled


def _refuse_moving(stopped: TeachersOutputs | None) -> None:
    """A teacher that moves with the parameters moves along the differences, and what that does is no Hessian's."""
    for (name, _), (how, _) in zip(stopped.reads, stopped.hows, strict=True) if stopped else ():
        if how.share:
            raise UnsupportedOperationError(
                f'training_step moves {name!r} towards the trained parameters and then reads it, which "finite" does '
                'not follow. Use curvature="exact", or move it after it is read.'
            )
