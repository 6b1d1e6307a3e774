# SPDX-License-Identifier: Apache-2.0
"""Embedding look-ups whose gradient is not the derivative of what they compute, or that move weights on their way."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from lightning_sgdclean.base.errors import UnsupportedOperationError
from lightning_sgdclean.losses.loss_functions import passed_on

_SIGNATURES = {look: inspect.signature(look) for look in (nn.functional.embedding, nn.functional.embedding_bag)}
_REASONS = {
    "max_norm": "rescales its weights within forward, outside of the optimizer's step",
    "scale_grad_by_freq": "has a gradient that is not the derivative of the loss",
    "sparse": "has sparse gradients, which cannot be differentiated again",
}


class RefusedLookups(TorchFunctionMode):
    """Refuses ``embedding`` and ``embedding_bag`` with options that cannot be followed, by the weight's name."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._names = {id(param): name for name, param in module.named_parameters()}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Pass everything on but such look-ups.

        Raises:
            UnsupportedOperationError: For these.
        """
        kwargs = kwargs or {}
        if func in _SIGNATURES:
            options = _SIGNATURES[func].bind(*args, **kwargs).arguments
            for option, reason in _REASONS.items():
                if options.get(option):
                    raise UnsupportedOperationError(
                        f"The {func.__name__} of {self._names.get(id(options['weight']), 'a tensor')!r} with "
                        f"{option}={options[option]} {reason}. Use it without {option}."
                    )
        return passed_on(func, args, kwargs)
