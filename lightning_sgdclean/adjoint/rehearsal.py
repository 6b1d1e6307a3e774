# SPDX-License-Identifier: Apache-2.0
"""Retraces one step while training is young.

Part of it is a look at stopped gradients: a self-distillation target, a detached weight, DoRA's norm. Training follows
``g(theta, s)`` with ``s(theta)`` behind ``detach`` or ``no_grad``. What a sample did to ``s`` travels on, too, but no
derivative of the loss leads there. So the stopped values are nudged, to see whether the gradient depends on any.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_sgdclean.adjoint.backward import retrace_step
from lightning_sgdclean.adjoint.walk import Adjoint, walk_of
from lightning_sgdclean.base.errors import UnsupportedOperationError
from lightning_sgdclean.base.options import Options
from lightning_sgdclean.base.randomness import untouched_randomness
from lightning_sgdclean.data.batches import cloned, summable
from lightning_sgdclean.losses.kernels import gradient
from lightning_sgdclean.losses.surroundings import Surroundings, untouched_module, widened
from lightning_sgdclean.losses.verified import VerifiedSplit
from lightning_sgdclean.replay.fidelity import compare
from lightning_sgdclean.replay.forward import borrowed, live_state, load_all, repeat_step
from lightning_sgdclean.replay.replay import Replay, replay_of
from lightning_sgdclean.trajectory.records import KeptStep, State, Step

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


def rehearse(
    kept: KeptStep,
    module: Any,
    optimizer: Any,
    surroundings: Surroundings,
    options: Options,
    hooks: list[str],
    split: VerifiedSplit | None,
    *,
    forward: bool = False,
) -> list[str]:
    """Retrace an early step from an arbitrary adjoint, and if need be repeat it forward.

    The module, its optimizer and the random state stay as they are.

    Args:
        kept: The step, with its batches and the states around it.
        module: The LightningModule.
        optimizer: Its optimizer.
        surroundings: What stands for the Trainer.
        options: The callback's.
        hooks: Hooks of the user's that could edit gradients.
        split: What was proved of the loss on the first batch.
        forward: Whether steps will have to be repeated forward.

    Returns:
        Complaints, where mismatches are only warned about.

    Raises:
        SGDInfluenceError: What the retrace of the whole window would raise at this step.
    """
    step, before, after = kept.step, kept.before, kept.after
    with (
        torch.enable_grad(),
        untouched_randomness(surroundings.device),
        untouched_module(module) as restore,
        surroundings.as_stage("train"),
    ):
        replay = replay_of(
            module,
            optimizer,
            surroundings,
            options,
            hooks,
            content_of=lambda step, i: cloned(kept.batches[i]),  # a training_step may write into its batch
            random_of=lambda step, i: step.micro[i].random,
            restore=restore,
            split=split,
        )
        ones = {name: torch.ones_like(summable(param.detach())) for name, param in replay.params.items()}
        walk = walk_of(replay, optimizer, options)
        retrace_step(step, before, after, [Adjoint(ones, {}, {})], walk, check_update=True)
        _check_stops(step, before, replay)
        if forward:
            with borrowed(optimizer) as own:
                load_all(replay, own, before)
                repeat_step(step, replay, own)
                replay.fidelity.compare_segment([step], *compare(live_state(replay, own), after, before))
    return replay.fidelity.complaints


def _check_stops(step: Step, before: State, replay: Replay) -> None:
    """Does the gradient depend on values that the parameters move behind ``detach`` or ``no_grad``?"""
    batch, params = replay.batch(step, 0), list(replay.params.values())
    with widened(replay.module, replay.surroundings) as surroundings:

        def gradient_under(mode: TorchFunctionMode) -> list[Tensor]:
            replay.load(before)
            return gradient([batch.call([mode], surroundings)], list(params))

        moved = dependence_on_stops(gradient_under, params)
    if moved:
        text = (
            "training_step stops gradients (detach, data, item or no_grad) at values that the parameters move, and the "
            f"gradient depends on them: moved by a hundredth, they move it by {moved:.1e} of its length. How a "
            "sample's effect travels through such values is not followed. Let the gradient through, or compute them "
            "from what is not trained."
        )
        if replay.fidelity.on_mismatch == "raise":
            raise UnsupportedOperationError(f'{text} on_mismatch="warn" leaves that part of the effect out.')
        replay.fidelity.complaints.append(text)
