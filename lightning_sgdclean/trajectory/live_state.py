# SPDX-License-Identifier: Apache-2.0
"""The state of a run while it lives: which parameters are trained, and all the tensors that a step reads and writes."""

from collections.abc import Iterable, Iterator
from itertools import chain
from operator import is_, methodcaller
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sgdclean.base.errors import UnsupportedTrainingError
from lightning_sgdclean.trajectory.records import State

_values = methodcaller("values")


def trained_parameters(module: nn.Module, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """The parameters that the optimizer moves, by their names in the module, in the optimizer's order.

    Raises:
        UnsupportedTrainingError: If the optimizer holds a tensor that is no parameter of the module.
    """
    names = {id(param): name for name, param in module.named_parameters()}
    found: dict[str, nn.Parameter] = {}
    for number, group in enumerate(optimizer.param_groups):
        for param in group["params"]:
            if id(param) not in names:
                raise UnsupportedTrainingError(
                    f"Group {number} of the optimizer holds a tensor of shape {tuple(param.shape)} that is no "
                    "parameter of the LightningModule. Make it one (self.name = nn.Parameter(...))."
                )
            if param.requires_grad:
                found[names[id(param)]] = param
    return found


def current_state(module: nn.Module, params: dict[str, nn.Parameter], optimizer: Optimizer) -> State:
    """The live state, not copied."""
    states: dict[str, dict[str, Tensor]] = {}
    for name, param in params.items():
        entries = optimizer.state.get(param)
        if entries:
            states[name] = {
                key: value if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)
                for key, value in entries.items()
                if isinstance(value, Tensor | int | float)
            }
    return State(dict(params), dict(module.named_buffers()), states)


class LiveState:
    """The live state of one run, asked for at every step; the same object while it is made of the same tensors.

    To look them up takes longer than to copy those of a small model, and they hardly ever change: what is compared
    are the objects in the module's and the optimizer's own dicts.
    """

    def __init__(self, module: nn.Module, params: dict[str, nn.Parameter], optimizer: Optimizer) -> None:
        self._module, self._params, self._optimizer = module, params, optimizer
        self._look()

    def now(self) -> State:
        """As :func:`current_state`; not to be changed."""
        held = self._held()
        if len(held) != len(self._known) or not all(map(is_, held, self._known)):
            self._look()
        return self._state

    def _look(self) -> None:
        modules = list(self._module.modules())
        self._children = [module._modules for module in modules]
        self._buffers = [module._buffers for module in modules]
        self._state = current_state(self._module, self._params, self._optimizer)
        self._known = self._held()

    def _held(self) -> list[Any]:
        return [*_all(self._children), *_all(self._buffers), *_all(self._optimizer.state.values())]


def _all(dicts: Iterable[Any]) -> Iterator[Any]:
    return chain.from_iterable(map(_values, dicts))
