# SPDX-License-Identifier: Apache-2.0
"""Retraces one step while training is young."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_sgdclean.adjoint.backward import retrace_step, retrace_steps
from lightning_sgdclean.base.errors import UnsupportedOperationError
from lightning_sgdclean.base.options import Options
from lightning_sgdclean.base.randomness import set_random_state, untouched_randomness
from lightning_sgdclean.data.batches import as_float32, cloned, summable
from lightning_sgdclean.losses.evaluate import Surroundings, plain_training_loss, widened
from lightning_sgdclean.losses.kernels import gradient
from lightning_sgdclean.losses.module_state import eagerly, untouched_module
from lightning_sgdclean.replay.fidelity import Fidelity
from lightning_sgdclean.replay.forward import borrowed, live_state, load_all, repeat_step
from lightning_sgdclean.replay.states import compare
from lightning_sgdclean.replay.walk import Adjoint, Walk, load_state, walk_of
from lightning_sgdclean.trajectory.flat_state import flatten, unflatten
from lightning_sgdclean.trajectory.records import MicroBatch, State, States, Step

_STOPPING = (Tensor.detach, Tensor.data.__get__, Tensor.item, Tensor.__float__)  # type: ignore[attr-defined]
_NUDGE = 0.01


class NudgedStops(TorchFunctionMode):
    """Multiplies what leaves the graph by a factor.

    Args:
        params: The trained parameters; other leaves do not move.
        factor: 1 leaves everything as it is.
    """

    def __init__(self, params: list[nn.Parameter], factor: float) -> None:
        super().__init__()
        self._params = {id(param) for param in params}
        self._factor = factor
        self._is_stopped = False  # by the user: torch, too, records no gradient within an autograd.Function

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Nudge what ``func`` gives if it stops a gradient, or is called under ``no_grad``."""
        kwargs = kwargs or {}
        if func is torch._C._set_grad_enabled:
            self._is_stopped = not args[0] and (self._is_stopped or torch.is_grad_enabled())
        output = func(*args, **kwargs)
        stops = self._is_stopped and not getattr(func, "__name__", "").endswith("_")
        if (stops or (func in _STOPPING and torch.is_grad_enabled())) and self._reads_moving(args, kwargs):
            return torch.utils._pytree.tree_map(self._nudged, output)
        return output

    def _reads_moving(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return any(self._moves(value) for value in torch.utils._pytree.tree_leaves((args, kwargs)))

    def _moves(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.requires_grad and (not value.is_leaf or id(value) in self._params)

    def _nudged(self, value: Any) -> Any:
        is_number = type(value) is float or (isinstance(value, Tensor) and value.is_floating_point())
        return value * self._factor if is_number and self._factor != 1 else value


def dependence_on_stops(
    gradient_under: Callable[[TorchFunctionMode], list[Tensor]], params: list[nn.Parameter]
) -> float:
    """How far the gradient moves, relative to its length, when all that is stopped moves by a hundredth.

    Args:
        gradient_under: The training loss's gradient by ``params``, evaluated within a mode; repeatable.
        params: The trained parameters.

    Returns:
        0 if the gradient depends on no stopped value, but for rounding.
    """
    plain = gradient_under(NudgedStops(params, 1.0))
    nudged = gradient_under(NudgedStops(params, 1.0 + _NUDGE))
    length = torch.stack([grad.norm() for grad in plain]).norm()
    moved = torch.stack([(a - b).norm() for a, b in zip(plain, nudged, strict=True)]).norm()
    relative = float(moved / length) if length > 0 else float(moved > 0)
    return relative if relative > torch.finfo(plain[0].dtype).eps ** 0.5 else 0.0


class Rehearsal:
    """Keeps the first step that moved anything until the step after it was made, and then runs it again.

    Only then, because what a hook changes between two steps shows only then.
    """

    def __init__(self) -> None:
        self._batches: dict[int, Any] = {}
        self._before: State | None = None
        self._kept: tuple[Step, State, State] | None = None
        self.is_due = False

    def begin_batch(self, micro: MicroBatch, batch: Any, live: State) -> None:
        """A batch is about to be trained on."""
        if self._kept is not None:
            return
        if self._before is None:
            self._before = _copy(live)
        self._batches[id(micro)] = cloned(batch)

    def commit(self, step: Step | None, live: State) -> None:
        """The optimizer has stepped."""
        if self._kept is not None:
            self.is_due = True
            return
        if step is not None and self._before is not None and _is_telling(step):
            self._kept = step, self._before, _copy(live)
        else:
            self._batches.clear()
        self._before = None

    def leave(self) -> None:
        """The batches that waited will never make a step."""
        if self._kept is None:
            self._batches.clear()
            self._before = None

    def run(
        self,
        module: Any,
        optimizer: Any,
        surroundings: Surroundings,
        options: Options,
        hooks: list[str],
        *,
        forward: bool = False,
    ) -> list[str]:
        """Retrace the kept step from an arbitrary adjoint, and if need be repeat it forward.

        The module, its optimizer and the random state stay as they are.

        Returns:
            Complaints, where mismatches are only warned about.

        Raises:
            SGDInfluenceError: What the retrace of the whole window would raise at this step.
        """
        assert self._kept is not None
        step, before, after = self._kept
        with (
            torch.enable_grad(),
            untouched_randomness(surroundings.device),
            untouched_module(module) as restore,
            surroundings.as_stage("train"),
        ):
            walk = walk_of(
                module,
                optimizer,
                surroundings,
                options,
                hooks,
                # Copies: a training_step may write into its batch.
                batch_of=lambda step, i: cloned(self._batches[id(step.micro[i])]),
                random_of=lambda step, i: step.micro[i].random,
                restore_attributes=restore,
            )
            ones = {name: torch.ones_like(summable(param.detach())) for name, param in walk.params.items()}
            retrace_step(step, before, after, [Adjoint(ones, {}, {})], walk, check_update=True)
            _check_stops(step, before, walk)
            if forward:
                with borrowed(optimizer) as own:
                    load_all(walk, own, before)
                    repeat_step(step, walk, own)
                    walk.fidelity.compare_segment([step], *compare(live_state(walk, own), after, before))
        return walk.fidelity.complaints


def _check_stops(step: Step, before: State, walk: Walk) -> None:
    """Does the gradient depend on values that the parameters move behind ``detach`` or ``no_grad``?"""
    micro, content, params = step.micro[0], walk.batch_of(step, 0), list(walk.params.values())
    with widened(walk.module, walk.surroundings) as surroundings:
        if surroundings is not walk.surroundings:
            content = as_float32(content)

        def gradient_under(mode: TorchFunctionMode) -> list[Tensor]:
            load_state(walk.module, walk.params, before)
            set_random_state(walk.random_of(step, 0), surroundings.device)
            surroundings.set_clock(micro.epoch, step.index)
            with eagerly(), mode:
                loss = plain_training_loss(walk.module, cloned(content), micro.batch_idx, surroundings)
            walk.restore_attributes()
            return gradient([loss], list(params))

        moved = dependence_on_stops(gradient_under, params)
    if moved:
        text = (
            "training_step stops gradients (detach, data, item or no_grad) at values that the parameters move, and the "
            f"gradient depends on them: moved by a hundredth, they move it by {moved:.1e} of its length. How a "
            "sample's effect travels through such values is not followed. Let the gradient through, or compute them "
            "from what is not trained."
        )
        if walk.fidelity.on_mismatch == "raise":
            raise UnsupportedOperationError(f'{text} on_mismatch="warn" leaves that part of the effect out.')
        walk.fidelity.complaints.append(text)


def _is_telling(step: Step) -> bool:
    """Whether the step moved anything, from losses that are numbers."""
    finite = all(micro.loss is not None and math.isfinite(float(micro.loss)) for micro in step.micro)
    return finite and step.is_update and any(_number(group.get("lr", 1.0)) != 0 for group in step.groups)


def _number(value: Any) -> float:
    return float(value.item() if isinstance(value, Tensor) else value)


def _copy(live: State) -> State:
    layout, flat = flatten(live)
    return unflatten(layout, flat)


_MIN_STEPS, _SHARE = 16, 20  # compared: 16 steps at least, and every 20th of a long window
_NOISE_BELOW = 0.9  # cosine


@dataclass(frozen=True)
class Float32Agreement:
    """Influences over the last steps of the window, taken in the run's precision and in float32.

    Attributes:
        num_steps: How many steps were compared.
        cosine: Of the two vectors of influences; 1 is perfect, and 0 is no relation at all.
    """

    num_steps: int
    cosine: float

    @property
    def is_noise(self) -> bool:
        """Whether the ranking should not be trusted."""
        return not self.cosine >= _NOISE_BELOW

    def complaint(self, precision: str) -> str:
        """A warning in words."""
        return (
            f"The influences of this {precision} run are mostly rounding noise: over its last {self.num_steps} steps "
            f"their cosine with those of a float32 retrace is {self.cosine:.2f}. Do not trust the ranking. "
            'Use retrace_precision="float32".'
        )


def float32_agreement(
    states: States, steps: list[Step], walk: Walk, start: Callable[[Walk], list[Adjoint]]
) -> Float32Agreement:
    """Retrace the end of the window twice.

    Args:
        states: Those between the steps.
        steps: The window.
        walk: The walk in the run's own precision.
        start: Gives the adjoints that a walk starts with; the first is compared.
    """
    tail = steps[-max(_MIN_STEPS, len(steps) // _SHARE) :]
    found = []
    for widens in (False, True):
        # The same steps are compared with the record again by the walk itself; here that is nobody's concern.
        silent = replace(walk, widens=widens, fidelity=Fidelity(math.inf, "warn"))
        found.append(retrace_steps(states, tail, start(silent)[:1], silent, lambda _: None).values[0].numpy())
    lengths = [float(np.linalg.norm(values)) for values in found]
    cosine = float(found[0] @ found[1]) / (lengths[0] * lengths[1]) if all(lengths) else math.nan
    return Float32Agreement(len(tail), cosine)
