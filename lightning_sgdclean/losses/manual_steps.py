# SPDX-License-Identifier: Apache-2.0
"""A ``training_step`` that optimizes by itself, evaluated again: it hands its losses over and moves nothing."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sgdclean.base.errors import LossSplitError, UnsupportedTrainingError

_GRAPH_OPTIONS = frozenset({"retain_graph", "create_graph"})  # arguments of backward that leave the gradient as it is
_ABSENT = object()


def unfollowed(found: str) -> UnsupportedTrainingError:
    """What is said of a manual optimization that is not followed."""
    return UnsupportedTrainingError(
        f"In manual optimization {found}. Followed is one opt = self.optimizers() and at most one opt.step() a "
        "training_step, behind self.manual_backward(loss) of the same training_step."
    )


class _ManualStep:
    """One call of a ``training_step``: collects what it backpropagates, and whether it has stepped."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._losses: list[Tensor] = []
        self._has_stepped = False

    @property
    def loss(self) -> Tensor:
        """The sum of what was backpropagated, whose gradient the step takes.

        Raises:
            LossSplitError: If it was nothing.
        """
        if not self._losses:
            raise LossSplitError("training_step called no manual_backward where a loss was recorded, on this batch.")
        loss = self._losses[0]
        for other in self._losses[1:]:
            loss = loss + other
        return loss

    def backward(self, loss: Tensor, *args: Any, **options: Any) -> None:
        """Stands for ``self.manual_backward``."""
        given = [*args, *(value for name, value in options.items() if name not in _GRAPH_OPTIONS)]
        if any(value is not None for value in given):
            raise unfollowed("manual_backward gets gradient= or inputs= (or another argument by its place)")
        if self._has_stepped:
            raise unfollowed("manual_backward is called after opt.step()")
        self._losses.append(loss)
        for param in params_of(self._optimizer):  # for code that reads or clips gradients; they were recorded
            if param.requires_grad and param.grad is None:
                param.grad = torch.zeros_like(param)

    def step(self, closure: Callable[[], Any] | None = None, **_: Any) -> None:
        """Stands for the ``step`` of ``self.optimizers()``."""
        if closure is not None:
            if not type(self._optimizer).__module__.startswith("torch.optim."):
                raise unfollowed(
                    f"the step of {type(self._optimizer).__name__} gets a closure, which it may call twice"
                )
            closure()
        if self._has_stepped:
            raise unfollowed("training_step calls opt.step() more than once")
        if not self._losses:
            raise unfollowed("training_step calls opt.step() before any manual_backward")
        self._has_stepped = True

    def raw_step(self, *_: Any, **__: Any) -> NoReturn:
        """Stands for the ``step`` of the optimizer within, which Lightning does not count."""
        raise unfollowed("training_step steps an optimizer that Lightning does not count (use_pl_optimizer=False, say)")

    def raw_backward(self, *_: Any, **__: Any) -> NoReturn:
        """Stands for ``loss.backward()``."""
        raise unfollowed("training_step calls loss.backward() itself; call self.manual_backward(loss)")


def params_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """All parameters of an optimizer."""
    return [param for group in optimizer.param_groups for param in group["params"]]


@contextmanager
def collecting(
    module: nn.Module, optimizer: Optimizer, wrappers: Sequence[Any], schedulers: Sequence[Any]
) -> Iterator[_ManualStep]:
    """Within the block the module's manual optimization moves neither weights nor gradients, options or schedulers.

    Args:
        module: The LightningModule.
        optimizer: The user's.
        wrappers: What ``self.optimizers()`` gives.
        schedulers: What ``self.lr_schedulers()`` gives.

    Yields:
        What the ``training_step`` called within hands over.

    Raises:
        UnsupportedTrainingError: If it optimizes in a way that is not followed.
    """
    step = _ManualStep(optimizer)
    stand_ins: list[tuple[Any, dict[str, Any]]] = [
        (module, {"manual_backward": step.backward}),
        (optimizer, {"step": step.raw_step, "zero_grad": _nothing}),
        *((wrapper, {"step": step.step, "zero_grad": _nothing}) for wrapper in wrappers),
        *((scheduler, {"step": _nothing}) for scheduler in schedulers),
    ]
    params = params_of(optimizer)
    gradients = [param.grad for param in params]
    backward = Tensor.backward, torch.autograd.backward
    saved = [[(vars(owner), name, vars(owner).get(name, _ABSENT)) for name in own] for owner, own in stand_ins]
    try:
        for param in params:
            param.grad = None
        for owner, own in stand_ins:
            vars(owner).update(own)
        Tensor.backward = torch.autograd.backward = step.raw_backward  # type: ignore[method-assign]
        yield step
    finally:
        Tensor.backward, torch.autograd.backward = backward  # type: ignore[method-assign]
        for space, name, value in (one for of_owner in saved for one in of_owner):
            space.pop(name) if value is _ABSENT else space.update({name: value})
        for param, gradient in zip(params, gradients, strict=True):
            _give(param, gradient)


def _nothing(*_: Any, **__: Any) -> None:
    """Stands for what must not happen again."""


def _give(param: nn.Parameter, gradient: Tensor | None) -> None:
    """Give a parameter its gradient back, also where it is evaluated in another precision for a while."""
    if gradient is None or gradient.dtype == param.dtype:
        param.grad = gradient
        return
    own = param.data
    param.data = torch.empty_like(gradient)
    param.grad = gradient
    param.data = own
