# SPDX-License-Identifier: Apache-2.0
"""Which tensors a training step reads and writes, while they live, and the options that it read.

Options that are tensors of one element stay tensors: a float32 learning rate makes torch round the step size to
float32.
"""

from collections.abc import Collection, Iterable, Iterator
from itertools import chain
from operator import is_, methodcaller
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sgdclean.base.errors import UnsupportedTrainingError
from lightning_sgdclean.data.fingerprints import batch_digest
from lightning_sgdclean.trajectory.records import State
from lightning_sgdclean.trajectory.teachers import teachers_of

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
    return State(dict(params), {**dict(module.named_buffers()), **teachers_of(module, [*params.values()])}, states)


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
        self._buffers = [one for module in modules for one in (module._buffers, module._parameters)]
        self._state = current_state(self._module, self._params, self._optimizer)
        self._known = self._held()

    def _held(self) -> list[Any]:
        return [*_all(self._children), *_all(self._buffers), *_all(self._optimizer.state.values())]


def _all(dicts: Iterable[Any]) -> Iterator[Any]:
    return chain.from_iterable(map(_values, dicts))


_PLAIN = (bool, int, float, str, type(None))


def is_plain(value: Any) -> bool:
    """Whether an option is a number, a string, None, a tensor of one element, or a sequence of such."""
    if isinstance(value, Tensor):
        return value.numel() == 1
    return isinstance(value, _PLAIN) or (isinstance(value, list | tuple) and all(is_plain(v) for v in value))


def noted(value: Any) -> Any:
    """A plain option as it stands now, apart from the optimizer's own: tensors copied, tuples as lists."""
    if isinstance(value, Tensor):
        return value.detach().cpu().reshape(()).clone()
    return [noted(item) for item in value] if isinstance(value, list | tuple) else value


def packed(value: Any) -> Any:
    """A noted option, or a mapping of such, as JSON can hold it."""
    if isinstance(value, Tensor):
        return {"tensor": value.item(), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, dict):
        return {key: packed(item) for key, item in value.items()}
    return [packed(item) for item in value] if isinstance(value, list) else value


def unpacked(value: Any) -> Any:
    """Undo :func:`packed`."""
    if isinstance(value, dict):
        if value.keys() == {"tensor", "dtype"}:
            return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"]))
        return {key: unpacked(item) for key, item in value.items()}
    return [unpacked(item) for item in value] if isinstance(value, list) else value


class FrozenParameters:
    """Fingerprints of a module's parameters that are not trained.

    Args:
        module: The module.
        trained: Names of the parameters that the optimizer moves.
    """

    def __init__(self, module: nn.Module, trained: Collection[str]) -> None:
        self._trained = trained
        self._prints = self._now(module)

    def check(self, module: nn.Module) -> None:
        """Are they still what they were?

        Raises:
            UnsupportedTrainingError: Naming the first that moved.
        """
        for name, now in self._now(module).items():
            if not now.equal(self._prints[name]):
                raise UnsupportedTrainingError(
                    f"The parameter {name!r} moved, although the optimizer did not hold it when training began: a "
                    "teacher or average of the weights, or a layer that was unfrozen. What samples do through it is "
                    "not followed. Keep it fixed or outside of the module, or give all parameters to the optimizer."
                )

    def _now(self, module: nn.Module) -> dict[str, Tensor]:
        held = self._trained
        return {
            name: batch_digest([param.detach()], 1) for name, param in module.named_parameters() if name not in held
        }


def hyper_parameters(optimizer: Optimizer, params: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    """All plain options of all parameter groups as they stand now, with the names of the trained parameters.

    An option by which the step counts stands as it was before the step: so the step can be made again.
    """
    names, counted = {id(param): name for name, param in params.items()}, counted_options(optimizer)
    return [
        {key: noted(value - 1 if key in counted else value) for key, value in group.items() if _is_noted(key, value)}
        | {"params": [names[id(param)] for param in group["params"] if param.requires_grad]}
        for group in optimizer.param_groups
    ]


def _is_noted(key: str, value: Any) -> bool:
    return key != "params" and is_plain(value)


def counted_options(optimizer: Optimizer) -> tuple[str, ...]:
    """Options of an optimizer by which its own step counts steps."""
    return _COUNTED.get(f"{type(optimizer).__module__}.{type(optimizer).__qualname__}", ())


_COUNTED = {"timm.optim.lamb.Lamb": ("step",)}  # others count in the state of each parameter


def is_fixed(value: Any) -> bool:
    """Whether a value cannot change unless another object takes its place."""
    return isinstance(value, bool | int | float | str | None) or (type(value) is tuple and all(map(is_fixed, value)))
