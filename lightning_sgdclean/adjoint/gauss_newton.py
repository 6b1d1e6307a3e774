# SPDX-License-Identifier: Apache-2.0
r"""The engine whose curvature is that of the loss alone: ``J^T H_L J c``.

``z`` is what enters the loss calls, ``J`` its derivative by the parameters, ``H_L`` the Hessian of the loss by ``z``.
What the loss knows of the parameters otherwise (a penalty on the weights, a learned factor) is part of ``H_L``, as if
the parameters entered it beside ``z``. The network's own second derivative is left out::

    J c                    one pass in forward mode, beside the ordinary one
    <grad L, (J c, c)>     differentiated by the weights: the scores, exact; by z and the parameters: H_L (J c, c)
    J^T                    one backward pass
"""

import torch
from torch import Tensor, nn

from lightning_sgdclean.adjoint.curvature import Problem, Pulled, with_read
from lightning_sgdclean.base.errors import UnsupportedOperationError
from lightning_sgdclean.losses.kernels import (
    dot,
    gradient,
    length_of,
    refuse_cut_graphs,
    refusing_by_name,
    twice_differentiable_kernels,
)
from lightning_sgdclean.losses.loss_inputs import LossInput, LossInputs
from lightning_sgdclean.losses.running_statistics import BatchStatistic, pull_back_updates
from lightning_sgdclean.losses.stopped_values import TeachersOutputs
from lightning_sgdclean.losses.watched_calls import resting_hooks


class GaussNewton:
    """Scores as :class:`Exact` has them, and a product that does without the network's second derivative.

    Where an operation has no forward mode, ``J c`` is had by two backward passes, from then on in all batches.

    Attributes:
        has_forward_mode: Whether all operations had it so far.
        num_pulled: How many batches were pulled back.
        num_flat: In how many of them the loss had no curvature by what enters its calls.
    """

    with_hessian = True

    def __init__(self) -> None:
        self.has_forward_mode = True
        self.num_pulled = self.num_flat = 0

    def open(self, problem: Problem, params: list[nn.Parameter], weights: Tensor, needs_gradient: bool) -> "_Late":
        """Evaluate the batch if its gradient is needed; else nothing is done before ``c`` is known."""
        late = _Late(problem, params, weights, self)
        if needs_gradient:
            with torch.enable_grad():
                evaluated = problem(weights)
                late.gradient = gradient([evaluated.loss], list(params))
            late.loss, late.updates = evaluated.loss.detach(), evaluated.updates
        return late

    def complaints(self) -> list[str]:
        """That nothing was curved, if so."""
        if not self.num_flat or self.num_flat < self.num_pulled:
            return []
        return [
            'curvature="gauss-newton" found no curvature in any batch: the loss is piecewise linear in what enters it '
            '(l1_loss, a hinge, a ranking loss), so that the influences are those of curvature="none". Use "exact".'
        ]


class _Late:
    """A batch that is evaluated with each cotangent anew, once that is known."""

    def __init__(self, problem: Problem, params: list[nn.Parameter], weights: Tensor, engine: GaussNewton) -> None:
        self._problem, self._params, self._weights, self._engine = problem, params, weights, engine
        self.loss: Tensor = torch.tensor(torch.nan)
        self.gradient: list[Tensor] | None = None
        self.updates: list[BatchStatistic] = []

    def pull_back(self, cotangent: list[Tensor], buffers: dict[str, Tensor], again: bool = False) -> Pulled:
        engine = self._engine
        if engine.has_forward_mode:
            try:
                return self._pulled(cotangent, buffers, in_forward_mode=True)
            except torch.OutOfMemoryError:
                raise
            except Exception:  # an operation without it, or code of theirs that knows no tangents
                pulled = self._pulled(cotangent, buffers, in_forward_mode=False)  # says it if it was something else
                engine.has_forward_mode = False
                return pulled
        return self._pulled(cotangent, buffers, in_forward_mode=False)

    def _pulled(self, cotangent: list[Tensor], buffers: dict[str, Tensor], in_forward_mode: bool) -> Pulled:
        params: list[Tensor] = list(self._params)
        with twice_differentiable_kernels(), torch.enable_grad():
            inputs = LossInputs(self._params, cotangent if in_forward_mode else None, self._weights)
            evaluated = self._problem(self._weights, inputs=inputs)
            self.loss, self.updates = evaluated.loss.detach(), evaluated.updates
            _refuse_teachers(evaluated.stopped)
            refuse_cut_graphs(evaluated.loss)
            values, pulls, before = pull_back_updates(evaluated.updates, buffers)
            num, read_leaves = len(params), list(evaluated.leaves.values())
            with resting_hooks(params):
                found = inputs.found
                directions = [one.tangent for one in found if one.tangent is not None]
                if not in_forward_mode:
                    directions = _moved(found, params, cotangent)
                scores, curved, direct = self._by_loss(evaluated.loss, found, directions, cotangent, read_leaves)
                outputs = [*(one.value for one in found), *values]
                adjoint = gradient(outputs, [*params, *read_leaves], [*curved, *pulls])
        torch._foreach_add_(adjoint, direct)
        self._engine.num_pulled += 1
        self._engine.num_flat += not any(bool(one.any()) for one in (*curved, *direct))
        return Pulled(scores, adjoint[:num], with_read(before, evaluated.leaves, adjoint[num:]))

    def _by_loss(
        self,
        loss: Tensor,
        found: list[LossInput],
        directions: list[Tensor],
        cotangent: list[Tensor],
        read_leaves: list[Tensor],
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The scores, and ``H_L (J c, c)``: by ``z``, and by parameters and running statistics that enter directly."""
        leaves = [one.leaf for one in found]
        inputs = [*leaves, *self._params]
        first: tuple[Tensor | None, ...] = (None,) * len(inputs)
        if loss.requires_grad:
            with refusing_by_name():
                first = torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True)
        if all(grad is None for grad in first[: len(leaves)]):
            raise UnsupportedOperationError(
                'curvature="gauss-newton" needs to know where the loss begins, and found no loss call of '
                "torch.nn.functional (or module of torch.nn that makes one) whose value is part of it. Compute the "
                'loss by one, or use curvature="exact".'
            )
        is_direct = any(grad is not None for grad in first[len(leaves) :])
        pairs = [(g, d) for g, d in zip(first, [*directions, *cotangent], strict=True) if g is not None]
        second_inputs = [
            self._weights,
            *leaves,
            *(self._params if is_direct else []),
            *(read_leaves if is_direct else []),
        ]
        # A loss that knows the network otherwise, too, shares a graph with the pass to come.
        second = gradient([g for g, _ in pairs], second_inputs, [d for _, d in pairs], retain_graph=is_direct)
        curved, direct = second[1 : len(leaves) + 1], second[len(leaves) + 1 :]
        return second[0], curved, direct or [torch.zeros_like(t) for t in (*self._params, *read_leaves)]


def _refuse_teachers(stopped: TeachersOutputs | None) -> None:
    """What a teacher does to the gradient lies behind what stops gradients, where the graph is not followed here."""
    if stopped is not None and stopped.reads:
        raise UnsupportedOperationError(
            f"training_step reads {stopped.reads[0][0]!r}, which follows the trained parameters, and "
            'curvature="gauss-newton" does not follow it. Use curvature="exact", which does.'
        )


def _moved(found: list[LossInput], params: list[Tensor], cotangent: list[Tensor]) -> list[Tensor]:
    """``J c`` by two backward passes: ``J^T v`` is linear in ``v``, and its transpose is ``J``."""
    values = [one.value for one in found]
    for value in values:
        refuse_cut_graphs(value)
    dummies = [torch.zeros_like(value, requires_grad=True) for value in values]
    back = gradient(values, params, dummies, create_graph=True)
    return gradient(back, dummies, cotangent, retain_graph=True)


def contradictions(
    problem: Problem,
    params: list[nn.Parameter],
    weights: Tensor,
    cotangent: list[Tensor],
    used: list[Tensor],
    scores: Tensor,
) -> dict[str, float]:
    """How far what the engine takes for granted is off, by its parts; relative.

    Its ``J^T`` must be that of the training, hooks included, and its ``J`` the transpose: else the product is not
    symmetric. They differ where a value is stopped, or an ``autograd.Function`` says two things.

    Args:
        problem: A batch, in float64.
        params: The parameters.
        weights: Of its samples.
        cotangent: Of the gradient.
        used: The gradient that training uses.
        scores: The samples' scores for that cotangent.
    """
    engine = GaussNewton()

    def pulled(direction: list[Tensor]) -> Pulled:
        return engine.open(problem, params, weights, False).pull_back(direction, {})

    with resting_hooks(params):
        plain = gradient([problem(weights).loss], list(params))
    one, other = pulled(cotangent), pulled(used)
    size = length_of(one.adjoint) * length_of(used) + length_of(other.adjoint) * length_of(cotangent)
    return {
        "the gradient, once backward hooks rest,": _off(used, plain),
        "the product, seen from its other side,": abs(dot(one.adjoint, used) - dot(other.adjoint, cotangent))
        / (size or 1.0),
        "what the samples' gradients do": _off([scores], [one.scores]),
    }


def _off(expected: list[Tensor], found: list[Tensor]) -> float:
    return length_of(one - other for one, other in zip(expected, found, strict=True)) / (length_of(expected) or 1.0)
