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
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sgdclean.batches import batch_digest
from lightning_sgdclean.curvature import Engine, Finite, Linearised
from lightning_sgdclean.errors import NonFiniteError, ReplayMismatchError, UnsupportedTrainingError
from lightning_sgdclean.objective import ObjectiveGradient
from lightning_sgdclean.randomness import set_random_state
from lightning_sgdclean.replay import Evaluated, SampleLosses, Surroundings, training_loss
from lightning_sgdclean.split import unit_weights
from lightning_sgdclean.store import Trajectory
from lightning_sgdclean.trajectory import MicroBatch, SampleId, State, Step
from lightning_sgdclean.updates import Update, clip, clip_transpose, full_group

_FULL_CHECK_EVERY = 32  # steps; where the engine does without the gradient, it is computed only to be checked
_UPDATE_SLACK = 100  # an update is a small difference of large numbers: its relative error is larger


@dataclass
class ReplayError:
    """How far the steps, run again, were off the record.

    Attributes:
        loss: Largest relative difference of a loss.
        update: Largest difference of an update, relative to its length, rounding of the parameters deducted.
        num_bitwise: Micro-batches whose loss came out the same to the last bit, of ``num_batches``.
        num_batches: Micro-batches replayed.
        complaints: What exceeded the tolerance, where that is only warned about.
    """

    loss: float = 0.0
    update: float = 0.0
    num_bitwise: int = 0
    num_batches: int = 0
    complaints: list[str] = field(default_factory=list)


@dataclass
class Walk:
    """Everything that a walk needs besides the trajectory; see :func:`retrace_steps`."""

    module: Any
    params: dict[str, nn.Parameter]
    surroundings: Surroundings
    batch_of: Callable[[MicroBatch], Any]
    restore_attributes: Callable[[], None]
    engine: Engine
    update: Update
    optimizer_kind: type
    tolerance: float
    on_mismatch: str
    sample_losses: SampleLosses | None = None
    error: ReplayError = field(default_factory=ReplayError)

    def mismatch(self, step: Step, text: str) -> None:
        """Refuse, or note, a replay that differs from the record."""
        message = f"Step {step.index} (epoch {step.epoch}), run again, is not what was recorded: {text}"
        if self.on_mismatch == "raise":
            raise ReplayMismatchError(f'{message} on_mismatch="warn" ranks all the same.')
        self.error.complaints.append(message)


def retrace_steps(
    trajectory: Trajectory,
    steps: list[Step],
    start: ObjectiveGradient,
    walk: Walk,
    progress: Callable[[], None],
) -> tuple[list[SampleId], list[float], list[int]]:
    """Influence of every sample drawn in ``steps`` on the objective.

    Args:
        trajectory: Gives the states between the steps.
        steps: The window, in order.
        start: Gradient of the objective at the end of the last step.
        walk: Module, engine, optimizer's rule and tolerances.
        progress: Called after every step.

    Returns:
        Sample ids, their influences (unit of the objective; negative: harmful) and how often each was drawn.

    Raises:
        ReplayMismatchError: If a step, run again, differs from the record.
        NonFiniteError: If an influence is not finite.
    """
    _check_buffers(walk.module, trajectory, steps[0])
    rows: dict[SampleId, int] = {}
    for step in steps:
        for micro in step.micro:
            for name in micro.ids:
                rows.setdefault(name, len(rows))
    influence, visits = torch.zeros(len(rows), dtype=torch.float64), torch.zeros(len(rows), dtype=torch.int64)
    adjoint = Adjoint(dict(zip(walk.params, start.params, strict=True)), {}, dict(start.buffers))
    after = trajectory.state(steps[-1].index + 1)
    for number, step in enumerate(reversed(steps)):
        before = trajectory.state(step.index)
        for micro, scores in _retrace_step(trajectory, step, before, after, adjoint, walk, number):
            places = torch.tensor([rows[name] for name in micro.ids])
            influence.index_add_(0, places, -scores.double().cpu())
            visits.index_add_(0, places, torch.ones_like(places))
        if not bool(torch.isfinite(influence).all()):
            raise NonFiniteError(f"The influences stopped being finite at step {step.index} (epoch {step.epoch}).")
        after = before
        progress()
    return list(rows), influence.tolist(), visits.tolist()


@dataclass
class Adjoint:
    """Derivatives of the objective by what a step leaves behind: ``lambda``, ``mu`` and ``nu``."""

    params: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]
    buffers: dict[str, Tensor]


def _retrace_step(
    trajectory: Trajectory, step: Step, before: State, after: State, adjoint: Adjoint, walk: Walk, number: int
) -> list[tuple[MicroBatch, Tensor]]:
    """Carry ``adjoint`` (in place) over one step; the scores of each micro-batch."""
    load_state(walk.module, walk.params, before)
    params = list(walk.params.values())
    batches = [_MicroStep(trajectory, step, i, walk, bool(adjoint.buffers)) for i in range(len(step.micro))]
    needs_gradient = (
        not walk.update.is_linear or step.clip is not None or (number % _FULL_CHECK_EVERY == 0 and len(batches) == 1)
    )
    opened, raw = _open(batches, params, walk, needs_gradient)
    _compare_losses(step, opened, walk)
    _compare_buffers(step, after, walk)
    grads = None if raw is None else {n: g for n, g in zip(walk.params, raw, strict=True) if n not in step.unused}
    clipped = None if grads is None else clip(grads, step.clip)
    if clipped is not None:
        _compare_update(step, before, after, clipped, walk)
    cotangent = _transpose_update(step, before, clipped, adjoint, walk)
    if grads is not None:
        cotangent |= clip_transpose(grads, {name: cotangent[name] for name in grads}, step.clip)
    cotangents = [cotangent[name] for name in walk.params]
    scores = []
    for batch in reversed(batches):
        linearised = opened[0] if len(batches) == 1 else batch.open(params, walk, needs_gradient=False)
        pulled = linearised.pull_back(cotangents, adjoint.buffers)
        adjoint.buffers = pulled.buffers
        torch._foreach_add_(list(adjoint.params.values()), pulled.adjoint)
        scores.append((batch.micro, pulled.scores))
    return scores


class _MicroStep:
    """A micro-batch of a step, ready to be evaluated at the live parameters again and again."""

    def __init__(self, trajectory: Trajectory, step: Step, number: int, walk: Walk, watch: bool) -> None:
        self.micro, self._step, self._walk, self._watch = step.micro[number], step, walk, watch
        self._random = trajectory.random(step, number)
        self._batch = walk.batch_of(self.micro)
        digest = batch_digest(self._batch, len(self.micro.ids))
        if not torch.equal(digest, self.micro.digest):
            off = (digest != self.micro.digest).nonzero().flatten().tolist()
            name = self.micro.ids[off[0]]
            walk.mismatch(
                step,
                f"{len(off)} of {len(digest)} samples of its batch, fetched again, hold other data "
                f"(sample {name!r} first). Random augmentation, in the dataset, the collate function or a "
                "transfer hook, or data that changed since, is the likely cause.",
            )
        self._buffers: dict[str, Tensor] | None = None

    def open(self, params: list[nn.Parameter], walk: Walk, needs_gradient: bool) -> Linearised:
        """Evaluate with the walk's engine."""
        return walk.engine(self.evaluate, params, self.weights(), needs_gradient)

    def weights(self) -> Tensor:
        return unit_weights(len(self.micro.ids), list(self._walk.params.values()))

    def evaluate(self, weights: Tensor) -> Evaluated:
        """The loss as it counts in the step, divided by the number of accumulated micro-batches."""
        walk = self._walk
        live = dict(walk.module.named_buffers())
        if self._buffers is None:
            self._buffers = {name: buffer.detach().clone() for name, buffer in live.items()}
        for name, buffer in live.items():
            buffer.copy_(self._buffers[name])
        set_random_state(self._random, walk.surroundings.device)
        walk.surroundings.set_clock(self.micro.epoch, self._step.index)
        evaluated = training_loss(
            walk.module,
            self._batch,
            self.micro.batch_idx,
            weights,
            walk.surroundings,
            walk.sample_losses,
            walk.engine.twice_differentiable,
            self._watch,
        )
        walk.restore_attributes()
        evaluated.loss = evaluated.loss / self._step.divisor
        return evaluated


def _open(
    batches: list[_MicroStep], params: list[nn.Parameter], walk: Walk, needs_gradient: bool
) -> tuple[list[Linearised], list[Tensor] | None]:
    """Evaluate the step's batches in order; their summed gradient, where it was computed."""
    if len(batches) == 1:
        opened = [batches[0].open(params, walk, needs_gradient)]
        return opened, opened[0].gradient
    # Accumulated: the cotangent needs the sum over all batches first, and their graphs are not kept meanwhile.
    plain = Finite()
    opened = [plain(batch.evaluate, params, batch.weights(), needs_gradient=True) for batch in batches]
    total = [torch.zeros_like(param) for param in params]
    for one in opened:
        torch._foreach_add_(total, one.gradient or [])
    return opened, total


def _transpose_update(
    step: Step, before: State, clipped: dict[str, Tensor] | None, adjoint: Adjoint, walk: Walk
) -> dict[str, Tensor]:
    """Take ``lambda`` and ``mu`` back over the optimizer, and give the cotangent of the clipped gradient."""
    cotangents = {name: torch.zeros_like(lam) for name, lam in adjoint.params.items()}
    device = walk.surroundings.device
    for group in step.groups:
        options = full_group(group, walk.optimizer_kind)
        for name in group["params"]:
            if name in step.unused:
                continue
            param = before.params[name].to(device)
            state = _entries(before, name, device)
            # A linear rule reads no gradient; any tensor of its shape will do.
            grad = param if clipped is None else clipped[name]
            cotangents[name], adjoint.params[name], adjoint.optimizer[name] = walk.update.transpose(
                param, grad, state, options, adjoint.params[name], adjoint.optimizer.get(name, {})
            )
    return cotangents


def _entries(state: State, name: str, device: torch.device) -> dict[str, Tensor]:
    return {key: value if key == "step" else value.to(device) for key, value in state.optimizer.get(name, {}).items()}


@torch.no_grad()
def load_state(module: nn.Module, params: dict[str, nn.Parameter], state: State) -> None:
    """Copy recorded parameters and buffers into the live module."""
    for name, param in params.items():
        param.copy_(state.params[name])
    for name, buffer in module.named_buffers():
        buffer.copy_(state.buffers[name])


def _compare_losses(step: Step, opened: list[Linearised], walk: Walk) -> None:
    for one, micro in zip(opened, step.micro, strict=True):
        assert micro.loss is not None
        recorded, now = float(micro.loss), float(one.loss)
        walk.error.num_batches += 1
        walk.error.num_bitwise += recorded == now
        off = abs(now - recorded) / max(abs(recorded), 1e-12)
        walk.error.loss = max(walk.error.loss, off)
        if not off <= walk.tolerance:
            walk.mismatch(
                step,
                f"loss {now!r} instead of {recorded!r}. Likely causes: parameters moved between the steps by another "
                "callback, a module that keeps state of its own (an attribute annealed in a hook), or randomness that "
                "was not torch's, NumPy's or Python's.",
            )


def _compare_buffers(step: Step, after: State, walk: Walk) -> None:
    for name, buffer in walk.module.named_buffers():
        recorded = after.buffers[name].to(buffer.device)
        if buffer.is_floating_point() and not torch.allclose(buffer, recorded, rtol=1e-3, atol=1e-5):
            walk.mismatch(step, f"the buffer {name!r} came out differently; something besides the step moves it.")


def _compare_update(step: Step, before: State, after: State, grads: dict[str, Tensor], walk: Walk) -> None:
    """Hold the closed form's next parameters against the recorded ones."""
    device = walk.surroundings.device
    off = moved = size = 0.0
    for group in step.groups:
        options = full_group(group, walk.optimizer_kind)
        for name in group["params"]:
            if name in step.unused:
                continue
            param, recorded = before.params[name].to(device), after.params[name].to(device)
            now, _ = walk.update.forward(param, grads[name], _entries(before, name, device), options)
            off += float((now - recorded).double().pow(2).sum())
            moved += float((recorded - param).double().pow(2).sum())
            size += float(recorded.double().pow(2).sum())
    dtype = next(iter(before.params.values())).dtype
    beyond_rounding = max(0.0, math.sqrt(off) - 4 * torch.finfo(dtype).eps * math.sqrt(size))
    relative = beyond_rounding / math.sqrt(moved) if moved else (math.inf if beyond_rounding else 0.0)
    walk.error.update = max(walk.error.update, relative)
    if not relative <= _UPDATE_SLACK * walk.tolerance:
        walk.mismatch(
            step,
            f"the update differs by {relative:.1e} of its length though the loss agrees. Likely causes: "
            "gradients edited in a hook (on_before_optimizer_step, configure_gradient_clipping, optimizer_step), "
            "or weights moved after the step.",
        )


def check_finite(steps: list[Step]) -> None:
    """Refuse a run that diverged, before anything is computed from it.

    Raises:
        NonFiniteError: If a recorded loss is not finite; names the first such step.
    """
    for step in steps:
        for micro in step.micro:
            if micro.loss is not None and not math.isfinite(float(micro.loss)):
                raise NonFiniteError(
                    f"The training loss at step {step.index} (epoch {step.epoch}) was {float(micro.loss)}: "
                    "samples cannot be ranked by a run that diverged. Lower the learning rate or clip the gradients."
                )


def moved_buffers(module: nn.Module, before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """Buffers, BatchNorm's apart, that a training step moved."""
    norms = nn.modules.batchnorm._BatchNorm
    own = {id(buffer) for part in module.modules() if isinstance(part, norms) for buffer in part._buffers.values()}
    return [
        name
        for name, buffer in module.named_buffers()
        if id(buffer) not in own and not torch.equal(before[name], after[name])
    ]


def _check_buffers(module: nn.Module, trajectory: Trajectory, first: Step) -> None:
    moved = moved_buffers(module, trajectory.state(first.index).buffers, trajectory.state(first.index + 1).buffers)
    if moved:
        raise UnsupportedTrainingError(
            f"Training moves the buffer {moved[0]!r}, which carries influence that is not followed; only BatchNorm's "
            "running statistics are. Remove it, or freeze it for the retraced epochs."
        )
