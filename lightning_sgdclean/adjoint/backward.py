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

import torch
from torch import Tensor, nn

from lightning_sgdclean.adjoint.bookmark import Bookmark, Carried
from lightning_sgdclean.adjoint.curvature import Linearised
from lightning_sgdclean.adjoint.influences import Influences
from lightning_sgdclean.adjoint.micro_step import MicroStep, open_all
from lightning_sgdclean.adjoint.optimizers import clip, clip_transpose
from lightning_sgdclean.adjoint.updates import Group
from lightning_sgdclean.base.errors import NonFiniteError
from lightning_sgdclean.data.batches import summable
from lightning_sgdclean.losses.kernels import gradient
from lightning_sgdclean.losses.running_statistics import check_moved_buffers, pull_back_updates
from lightning_sgdclean.replay.fidelity import Changes
from lightning_sgdclean.replay.walk import Adjoint, Walk, load_state
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
        walk: Module, engine, optimizer's rule and tolerances.
        progress: Called after every step with what was found so far.
        bookmark: Where the walk is marked, and goes on from.

    Raises:
        ReplayMismatchError: If a step, run again, differs from the record.
        NonFiniteError: If an influence is not finite.
    """
    found = Influences.none_yet(steps, len(adjoints))
    carried = Carried(adjoints, found, walk.fidelity)
    done = 0 if bookmark is None else bookmark.restore(carried)
    for _ in range(done):
        progress(found)
    after = None
    for number, step in list(enumerate(reversed(steps)))[done:]:
        after = states.state(step.index + 1) if after is None else after
        before = states.state(step.index)
        is_checked = number % _FULL_CHECK_EVERY == 0 or step.index in walk.fidelity.joints
        for micro, scores in retrace_step(step, before, after, adjoints, walk, is_checked):
            found.add(micro, scores)
        if not bool(torch.isfinite(found.values).all()):
            raise NonFiniteError(f"The influences stopped being finite at step {step.index} (epoch {step.epoch}).")
        after = before
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

    Args:
        step: The step.
        before: The state before it.
        after: The state after it, for comparison.
        adjoints: Those of what the step leaves behind; afterwards, of what it started from.
        walk: Module, engine, optimizer's rule and tolerances.
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
    load_state(walk.module, walk.params, before)
    params = list(walk.params.values())
    batches = [MicroStep(step, i, walk) for i in range(len(step.micro))]
    if not step.is_update:
        with torch.no_grad():  # in the run's own precision, to compare
            for batch in batches:
                batch.statistics(params, walk.surroundings)
        walk.fidelity.compare_buffers(step, walk.module, after.buffers)
        _pull_back_statistics(batches, params, adjoints, walk)
        return []
    needs_gradient = not walk.update.is_linear or step.clip is not None or (check_update and len(batches) == 1)
    opened, raw = open_all(batches, params, walk, needs_gradient)
    walk.fidelity.compare_losses(step, [one.loss for one in opened])
    walk.fidelity.compare_buffers(step, walk.module, after.buffers)
    check_moved_buffers(step.index, before.buffers, after.buffers, [u for one in opened for u in one.updates])
    scale = step.micro[0].scale
    grads = None if raw is None else {n: summable(g) / scale for n, g in zip(walk.params, raw, strict=True)}
    cotangents = _cotangents(step, before, after, grads, adjoints, walk)
    shrink = 1.0 if walk.widens else scale
    scores = []
    with walk.pulling() as surroundings:
        pulls = [[(c / shrink).to(p.dtype) for c, p in zip(one, params, strict=True)] for one in cotangents]
        for batch in reversed(batches):
            keeps = len(batches) == 1 and not walk.widens
            linearised = opened[0] if keeps else batch.open(params, walk.engine, surroundings)
            found = _pull_back(linearised, pulls, adjoints)
            if walk.labels_of is not None:
                found[:, len(batch.micro.ids) :][:, batch.unknown] = math.nan
            scores.append((batch.micro, found))
    return scores


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
    batches: list[MicroStep], params: list[nn.Parameter], adjoints: list[Adjoint], walk: Walk
) -> None:
    """A step without an update moved running statistics alone: ``lambda += (dB/dtheta)^T nu``."""
    with walk.pulling() as surroundings:
        updates = [update for batch in batches for update in batch.statistics(params, surroundings)]
        for adjoint in adjoints:
            values, pulls, adjoint.buffers = pull_back_updates(updates, adjoint.buffers)
            moved = gradient(values, list(params), pulls, retain_graph=adjoint is not adjoints[-1])
            torch._foreach_add_(list(adjoint.params.values()), [summable(tensor) for tensor in moved])


def _cotangents(
    step: Step, before: State, after: State, grads: dict[str, Tensor] | None, adjoints: list[Adjoint], walk: Walk
) -> list[list[Tensor]]:
    """Take each ``lambda`` and ``mu`` (in place) back over clipping and the optimizer; ``c`` for every parameter."""
    used = None if grads is None else {name: grad for name, grad in grads.items() if name not in step.unused}
    clipped = None if used is None else clip(used, step.clip)
    if clipped is not None:
        walk.fidelity.compare_update(step, _changes(step, before, after, clipped, walk))
    cotangents = [{name: torch.zeros_like(lam) for name, lam in adjoint.params.items()} for adjoint in adjoints]
    for name, group, param, state in _updated(step, before, walk):
        # A linear rule reads no gradient; any tensor of its shape will do.
        grad = param if clipped is None else clipped[name]
        for adjoint, found in zip(adjoints, cotangents, strict=True):
            found[name], adjoint.params[name], adjoint.optimizer[name] = walk.update.transpose(
                param, grad, state, group, adjoint.params[name], adjoint.optimizer.get(name, {})
            )
    if used is not None:
        for found in cotangents:
            found.update(clip_transpose(used, {name: found[name] for name in used}, step.clip))
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
    return summable(tensor.to(walk.surroundings.device))


def _entries(state: State, name: str, walk: Walk) -> dict[str, Tensor]:
    entries = state.optimizer.get(name, {})
    return {key: value if key == "step" else _on(value, walk) for key, value in entries.items()}
