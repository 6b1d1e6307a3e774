# SPDX-License-Identifier: Apache-2.0
r"""Walk the recorded steps backwards: the objective's gradient in, an influence for every sample out.

At step ``t``, with the adjoints ``lambda`` (parameters), ``mu`` (optimizer's state) and ``nu``
(running statistics) of what comes after it::

    c            = (dU/dg)^T (lambda, mu)
    influence_j -= <c, grad l_j> / (k |S|)                    for every j drawn
    lambda       = (dU/dtheta)^T (lambda, mu) + H c + (dB/dtheta)^T nu
    mu, nu       = (dU/ds)^T (lambda, mu), (dB/db)^T nu

Hara, Nitanda and Maehara (NeurIPS 2019, Algorithm 2) is the case of plain SGD, where ``c = -lr * lambda``.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from lightning_sgdclean.adjoint.adjoints import Adjoint
from lightning_sgdclean.adjoint.curvature import Exact, Finite, Linearised, Problem
from lightning_sgdclean.adjoint.gauss_newton import GaussNewton
from lightning_sgdclean.adjoint.gradcheck import check_derivative
from lightning_sgdclean.adjoint.optimizers import clip, clip_transpose
from lightning_sgdclean.adjoint.updates import Group
from lightning_sgdclean.adjoint.walk import Bookmark, Carried, Influences, Walk
from lightning_sgdclean.base.errors import NonFiniteError
from lightning_sgdclean.data.batches import summable
from lightning_sgdclean.losses.evaluate import RecordedBatch
from lightning_sgdclean.losses.kernels import gradient
from lightning_sgdclean.losses.running_statistics import check_moved_buffers, pull_back_updates
from lightning_sgdclean.losses.surroundings import Surroundings
from lightning_sgdclean.losses.watched_calls import resting_hooks
from lightning_sgdclean.replay.fidelity import Changes
from lightning_sgdclean.replay.scratch import refusing_reads
from lightning_sgdclean.trajectory.records import MicroBatch, State, States, Step

_FULL_CHECK_EVERY = 32  # steps; where the engine does without the gradient, it is computed only to be checked


def retrace_steps(
    states: States,
    steps: list[Step],
    adjoints: list[Adjoint],
    walk: Walk,
    progress: Callable[[Influences], None],
    bookmark: Bookmark | None = None,
) -> Influences:
    """Influence of every sample drawn in ``steps`` on each objective, the steps gone over once for all of them.

    Args:
        states: Those between the steps.
        steps: The window, in order.
        adjoints: One an objective, at the end of the last step; carried to the window's first step in place.
        walk: Replay, engine and optimizer's rule.
        progress: Called after every step with what was found so far.
        bookmark: Where the walk is marked, and goes on from.

    Raises:
        ReplayMismatchError: If a step, run again, differs from the record.
        NonFiniteError: If an influence is not finite.
    """
    found = Influences.none_yet(steps, len(adjoints))
    carried = Carried(adjoints, found, walk.replay.fidelity)
    done = 0 if bookmark is None else bookmark.restore(carried)
    for _ in range(done):
        progress(found)
    after = None
    for number, step in list(enumerate(reversed(steps)))[done:]:
        after = states.state(step.index + 1) if after is None else after
        before = states.state(step.index)
        for adjoint in adjoints:
            adjoint.pass_by(step)
        is_checked = number % _FULL_CHECK_EVERY == 0 or step.index in walk.replay.fidelity.joints
        for micro, scores in retrace_step(step, before, after, adjoints, walk, is_checked):
            found.add(micro, scores)
        if not bool(torch.isfinite(found.values).all()):
            raise NonFiniteError(f"The influences stopped being finite at step {step.index} (epoch {step.epoch}).")
        after, position = before, len(steps) - 1 - number
        if position == 0 or steps[position - 1].epoch != step.epoch:
            found.norms[step.epoch] = adjoints[0].norm
        if bookmark is not None:
            bookmark.pass_by(number + 1, carried)
        progress(found)
    if bookmark is not None:
        bookmark.remove()
    return found


def retrace_step(
    step: Step, before: State, after: State, adjoints: list[Adjoint], walk: Walk, check_update: bool
) -> list[tuple[MicroBatch, Tensor]]:
    """Carry the objectives' adjoints (in place) over one step.

    The batch is evaluated once; each adjoint is pulled back through the same graph, to the bits it would have alone.
    Gauss-Newton evaluates it once an adjoint, when its cotangent is known, and is then compared with the record.

    Args:
        step: The step.
        before: The state before it.
        after: The state after it, for comparison.
        adjoints: Those of what the step leaves behind; afterwards, of what it started from.
        walk: Replay, engine and optimizer's rule.
        check_update: Whether to compare the update also where that alone costs the gradient.

    Returns:
        ``<c, grad l_i> / (k |S|)`` for each objective and the samples of each micro-batch, ``(K, B)``, and where other
        labels are asked for, the same for their amounts besides, ``(K, 2 B)``; none for a step without an update.

    Raises:
        ReplayMismatchError: If the step, run again, differs from the record.
        UnsupportedOperationError: If the engine cannot follow an operation.
    """
    if not step.is_update and not any(adjoint.buffers for adjoint in adjoints):
        return []
    replay, fidelity, teachers = walk.replay, walk.replay.fidelity, walk.replay.teachers
    params = list(replay.params.values())
    batches = [replay.batch(step, i) for i in range(len(step.micro))]
    teachers.begin(step, before, after, replay.load, batches)
    finish = teachers.pull_back(teachers.how(step, before, after), adjoints)
    if not step.is_update:
        with torch.no_grad():  # in the run's own precision, to compare
            for batch in batches:
                batch.evaluate_under(None, batch.weights())
        fidelity.compare_buffers(step, replay.module, after.buffers, replay.scratch)
        _pull_back_statistics(batches, params, adjoints, walk)
        finish()
        return []
    # Accumulated: the cotangent needs the sum over all batches first, and their graphs are not kept meanwhile.
    is_alone = len(batches) == 1
    is_clipped = step.clip is not None or walk.update.clipping(step.groups) is not None
    needs_gradient = not is_alone or not walk.update.is_linear or is_clipped or check_update
    first_engine = walk.engine if is_alone and not walk.widens else Finite()
    is_late = isinstance(first_engine, GaussNewton) and not is_clipped and not check_update
    recovered = _recovered(step, before, after, walk) if is_late else None
    needs_gradient &= recovered is None
    opened, problems = [], [_Problem(batch, walk) for batch in batches]
    with refusing_reads(step, before, batches, replay) as computed:
        for problem in problems:
            evaluate = problem.within(replay.surroundings)
            opened.append(first_engine.open(evaluate, params, problem.weights(), needs_gradient))
            if recovered is None:
                computed += [opened[-1].loss, *(opened[-1].gradient or ())]

    def compare() -> None:
        fidelity.compare_losses(step, [one.loss for one in opened], batches=batches)
        fidelity.compare_buffers(step, replay.module, after.buffers, replay.scratch)
        teachers.check(step, before, after)
        updates = [update for one in opened for update in one.updates]
        check_moved_buffers(step.index, before.buffers, after.buffers, updates, replay.scratch | teachers.live.keys())

    if recovered is None:
        compare()
    scale = step.scale
    grads, to_compare = (_summed(opened, replay.params, scale), after) if recovered is None else (recovered, None)
    cotangents = _cotangents(step, before, to_compare, grads, adjoints, walk)
    shrink = 1.0 if walk.widens else scale
    scores = []
    with refusing_reads(step, before, batches, replay) as pulled, walk.pulling() as surroundings:
        pulls = [[(c / shrink).to(p.dtype) for c, p in zip(one, params, strict=True)] for one in cotangents]
        for problem, first in zip(reversed(problems), reversed(opened), strict=True):
            linearised = first
            if not is_alone or walk.widens:
                linearised = walk.engine.open(problem.within(surroundings), params, problem.weights(), False)
                if linearised.gradient is None and not walk.widens:
                    linearised.gradient = first.gradient
            found = _pull_back(linearised, pulls, adjoints)
            pulled += [linearised.loss, found.clone()]
            if problem.labels is not None:
                found[:, len(problem.batch) :][:, problem.unknown] = math.nan
            scores.append((problem.batch.micro, found))
    if recovered is not None:
        compare()
    finish()
    if walk.checks is not None:
        begin = step.index % len(problems)  # not the first of each step, always
        kept = [problem for problem in problems[begin:] + problems[:begin] if problem.batch.micro.scale]
        for problem in kept:
            if walk.checks.is_due(step, problem.batch):
                check_derivative(step, before, problem.batch, walk.engine, replay, walk.checks)
                if isinstance(walk.engine, Finite) and walk.engine.num_replaced:  # Exact stands in, unchecked so far
                    check_derivative(step, before, problem.batch, Exact(), replay, walk.checks)
                break
    return scores


class _Problem:
    """What an engine linearises: a batch's loss by its samples' weights, and by the amounts of other labels."""

    def __init__(self, batch: RecordedBatch, walk: Walk) -> None:
        self.batch = batch
        self.labels = None if walk.labels_of is None else walk.labels_of(batch.micro.ids)

    def within(self, surroundings: Surroundings) -> Problem:
        """The loss as a function of :meth:`weights`, in the run's precision or widened."""
        return partial(self.batch.evaluate, labels=self.labels, surroundings=surroundings)

    def weights(self) -> Tensor:
        """Ones for the weights, zeros for the amounts; the engine treats both as inputs."""
        ones = self.batch.weights()
        if self.labels is None:
            return ones
        return torch.cat([ones, torch.zeros_like(ones)]).detach().requires_grad_()

    @property
    def unknown(self) -> Tensor:
        """Which samples' labels could not be changed, ``(B,)``."""
        assert self.labels is not None
        return (self.labels < 0) | (not self.batch.is_relabelled)


def _summed(opened: list[Linearised], params: dict[str, nn.Parameter], scale: float) -> dict[str, Tensor] | None:
    """The step's gradient, unscaled, where it was computed."""
    if len(opened) == 1:
        total = opened[0].gradient
    else:
        total = [torch.zeros_like(param) for param in params.values()]
        for one in opened:
            torch._foreach_add_(total, one.gradient or [])
    return None if total is None else {name: summable(g) / scale for name, g in zip(params, total, strict=True)}


def _pull_back(linearised: Linearised, pulls: list[list[Tensor]], adjoints: list[Adjoint]) -> Tensor:
    """Add a batch's ``H c`` to each adjoint (in place); the scores, ``(K, B)``."""
    scores = []
    for adjoint, pull in zip(adjoints, pulls, strict=True):
        pulled = linearised.pull_back(pull, adjoint.buffers, again=adjoint is not adjoints[-1])
        adjoint.buffers = pulled.buffers
        torch._foreach_add_(list(adjoint.params.values()), [summable(tensor) for tensor in pulled.adjoint])
        scores.append(pulled.scores)
    return torch.stack(scores)


def _pull_back_statistics(
    batches: list[RecordedBatch], params: list[nn.Parameter], adjoints: list[Adjoint], walk: Walk
) -> None:
    """A step without an update moved running statistics alone: ``lambda += (dB/dtheta)^T nu``."""
    with walk.pulling() as surroundings:
        evaluated = [batch.evaluate_under(None, batch.weights(), surroundings=surroundings) for batch in batches]
        updates = [update for one in evaluated for update in one.updates]
        for adjoint in adjoints:
            values, pulls, adjoint.buffers = pull_back_updates(updates, adjoint.buffers)
            with resting_hooks(params):
                moved = gradient(values, list(params), pulls, retain_graph=adjoint is not adjoints[-1])
            torch._foreach_add_(list(adjoint.params.values()), [summable(tensor) for tensor in moved])


def _recovered(step: Step, before: State, after: State, walk: Walk) -> dict[str, Tensor] | None:
    """What the states around a step say of its gradient; None where that is too little for the transpose."""
    found = {}
    for name, group, param, state in _updated(step, before, walk):
        grad = walk.update.recovered(param, state, after.optimizer.get(name, {}), group)
        if grad is None:
            return None
        found[name] = grad
    return found


def _cotangents(
    step: Step, before: State, after: State | None, grads: dict[str, Tensor] | None, adjoints: list[Adjoint], walk: Walk
) -> list[list[Tensor]]:
    """Take each ``lambda`` and ``mu`` (in place) back over clipping and the optimizer; ``c`` for every parameter."""
    used = None if grads is None else {name: grad for name, grad in grads.items() if name not in step.unused}
    # The Trainer clips before the step, and a step may clip by itself.
    ways = [step.clip, walk.update.clipping(step.groups)]
    stages = [] if used is None else [used, once := clip(used, ways[0]), clip(once, ways[1])]
    clipped = stages[-1] if stages else None
    if clipped is not None and after is not None:
        walk.replay.fidelity.compare_update(step, _changes(step, before, after, clipped, walk))
    cotangents = [{name: torch.zeros_like(lam) for name, lam in adjoint.params.items()} for adjoint in adjoints]
    for name, group, param, state in _updated(step, before, walk):
        # A linear rule reads no gradient; any tensor of its shape will do.
        grad = param if clipped is None else clipped[name]
        for adjoint, found in zip(adjoints, cotangents, strict=True):
            found[name], adjoint.params[name], adjoint.optimizer[name] = walk.update.transpose(
                param, grad, state, group, adjoint.params[name], adjoint.optimizer.get(name, {})
            )
    for grads_before, how in reversed(list(zip(stages, ways, strict=False))):
        for found in cotangents:
            found.update(clip_transpose(grads_before, {name: found[name] for name in grads_before}, how))
    return [list(found.values()) for found in cotangents]


def _updated(step: Step, before: State, walk: Walk) -> Iterator[tuple[str, Group, Tensor, dict[str, Tensor]]]:
    """Name, options, value and optimizer state of every parameter that the step moved."""
    for group in step.groups:
        for name in group["params"]:
            if name not in step.unused:
                yield name, group, _on(before.params[name], walk), _entries(before, name, walk)


def _changes(step: Step, before: State, after: State, grads: dict[str, Tensor], walk: Walk) -> Changes:
    """What the optimizer's rule makes of the step, beside what was recorded."""
    changes = Changes()
    for name, group, param, state in _updated(step, before, walk):
        now, entries = walk.update.forward(param, grads[name], state, group)
        changes.add("param", now, after.params[name].to(param.device), param)
        recorded = after.optimizer.get(name, {})
        for key in entries.keys() & recorded.keys() - {"step"}:
            changes.add(key, entries[key], recorded[key].to(param.device), state.get(key))
    return changes


def _on(tensor: Tensor, walk: Walk) -> Tensor:
    return summable(tensor.to(walk.replay.surroundings.device))


def _entries(state: State, name: str, walk: Walk) -> dict[str, Tensor]:
    entries = state.optimizer.get(name, {})
    return {key: value if key == "step" else _on(value, walk) for key, value in entries.items()}
