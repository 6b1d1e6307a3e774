# SPDX-License-Identifier: Apache-2.0
r"""Engines: from a cotangent ``c`` of a batch's gradient to the samples' scores and ``H c``.

Each takes a *problem*, a callable from weights ``(B,)`` to the batch's loss at the live parameters,
and gives a linearisation with two moments: first its gradient, which the optimizer's transpose may
need to find ``c``, then :meth:`Linearised.pull_back`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from lightning_sgdclean.losses.kernels import (
    gradient,
    length_of,
    refuse_cut_graphs,
    resting_hooks,
    twice_differentiable_kernels,
)
from lightning_sgdclean.losses.running_statistics import BatchStatistic, pull_back_updates
from lightning_sgdclean.losses.weighting import Evaluated

Problem = Callable[[Tensor], Evaluated]


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
        self.gradient: list[Tensor] | None = [grad.detach() for grad in graph]

    def pull_back(self, cotangent: list[Tensor], buffers: dict[str, Tensor], again: bool = False) -> Pulled:
        values, pulls, before = pull_back_updates(self.updates, buffers)
        with twice_differentiable_kernels(), resting_hooks(self._params):
            if not self._with_hessian:
                (scores,) = gradient(self._graph, [self._weights], cotangent, retain_graph=again or bool(values))
                return Pulled(scores, gradient(values, self._params, pulls, retain_graph=again), before)
            inputs = [self._weights, *self._params, *self._leaves.values()]
            found = gradient([*self._graph, *values], inputs, [*cotangent, *pulls], retain_graph=again)
        num = len(self._params)
        return Pulled(found[0], found[1 : num + 1], _read(before, self._leaves, found[num + 1 :]))


def _read(buffers: dict[str, Tensor], leaves: dict[str, Tensor], found: list[Tensor]) -> dict[str, Tensor]:
    """``nu`` before a batch whose gradient was computed with running statistics: frozen norms read them."""
    for name, grad in zip(leaves, found, strict=True):
        buffers[name] = buffers[name] + grad if name in buffers else grad
    return buffers


class Finite:
    """Central difference along ``c``: two ordinary passes, any operation that trains.

    Args:
        radius: Length of the move relative to that of the parameters.
    """

    with_hessian = True

    def __init__(self, radius: float = 0.01) -> None:
        self._radius = radius

    def open(
        self, problem: Problem, params: list[nn.Parameter], weights: Tensor, needs_gradient: bool
    ) -> "_Difference":
        """Evaluate the batch, without a gradient unless it is needed."""
        found: list[Tensor] | None = None
        with torch.set_grad_enabled(needs_gradient):
            evaluated = problem(weights)
            if needs_gradient:
                found = gradient([evaluated.loss], list(params))
        return _Difference(problem, evaluated, found, params, weights, self._radius)


class _Difference:
    def __init__(
        self,
        problem: Problem,
        evaluated: Evaluated,
        found: list[Tensor] | None,
        params: list[nn.Parameter],
        weights: Tensor,
        radius: float,
    ) -> None:
        self._problem, self._params, self._weights, self._radius = problem, params, weights, radius
        self.gradient = found
        self.loss, self.updates = evaluated.loss.detach(), evaluated.updates

    def pull_back(self, cotangent: list[Tensor], buffers: dict[str, Tensor], again: bool = False) -> Pulled:
        length = length_of(cotangent)
        start = [param.detach().clone() for param in self._params]
        move = self._radius * (length_of(start) or 1.0) / (length or 1.0)
        scores = torch.zeros_like(self._weights)
        adjoint = [torch.zeros_like(param) for param in self._params]
        before, read = dict(buffers), dict[str, Tensor]()
        for sign in (1, -1):
            with torch.no_grad():
                for param, origin, c in zip(self._params, start, cotangent, strict=True):
                    param.copy_(origin + sign * move * c)
            evaluated = self._problem(self._weights)
            values, pulls, before = pull_back_updates(evaluated.updates, buffers)
            factor = sign / (2 * move)
            # The statistics' term needs no difference: its mean over the two passes rides along.
            found = gradient(
                [evaluated.loss, *values],
                [self._weights, *self._params, *evaluated.leaves.values()],
                [torch.full_like(evaluated.loss, factor), *(pull / 2 for pull in pulls)],
            )
            scores += found[0]
            torch._foreach_add_(adjoint, found[1 : len(adjoint) + 1])
            read = _read(read, evaluated.leaves, found[len(adjoint) + 1 :])
        with torch.no_grad():
            for param, origin in zip(self._params, start, strict=True):
                param.copy_(origin)
        return Pulled(scores, adjoint, _read(before, read, list(read.values())))


def engine_named(name: str, radius: float) -> Engine:
    """``"exact"``, ``"finite"`` or ``"none"`` (no Hessian, for comparison)."""
    if name == "finite":
        return Finite(radius)
    return Exact(with_hessian=name == "exact")
