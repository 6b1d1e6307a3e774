# SPDX-License-Identifier: Apache-2.0
"""Stopped gradients: values that the parameters move, used in the loss as if they did not.

A self-distillation target, a detached weight, DoRA's norm: training follows ``g(theta, s)`` with ``s(theta)``
behind ``detach`` or ``no_grad``. What a sample did to ``s`` travels on, too, but no derivative of the
loss leads there. So whether the gradient depends on any such value is tried out: they are nudged.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

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
