# SPDX-License-Identifier: Apache-2.0
"""What a step does to its derivative: hooks that edit gradients, values that leave the graph, odd look-ups."""

import inspect
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from lightning_sgdclean.base.errors import UnsupportedOperationError
from lightning_sgdclean.losses.kernels import nodes_of
from lightning_sgdclean.losses.loss_functions import passed_on

_hooks_rest = False


def _resting(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that does nothing while the second derivative is taken."""
    return lambda *arguments: None if _hooks_rest else hook(*arguments)


@contextmanager
def resting_hooks(params: Iterable[Tensor]) -> Iterator[None]:
    """To be held where a derivative is taken that training did not take: backward hooks do nothing.

    The gradient of the training loss passes the hooks of tensors, parameters and modules. What they do to it is part
    of its graph. When that graph is differentiated, torch goes back over the loss's own graph, too, and would call
    them once more, on derivatives that they never saw in training. So it is with the objective's gradient.
    """
    global _hooks_rest  # noqa: PLW0603 - hooks are called by torch, from its own threads on a GPU
    tables = [hooks for param in params if (hooks := param._backward_hooks)]
    originals = [dict(hooks) for hooks in tables]
    for hooks in tables:
        hooks.clear()
    _hooks_rest = True
    try:
        yield
    finally:
        _hooks_rest = False
        for hooks, own in zip(tables, originals, strict=True):
            hooks.update(own)


_SIGNATURES = {look: inspect.signature(look) for look in (nn.functional.embedding, nn.functional.embedding_bag)}
_REASONS = {
    "max_norm": "rescales its weights within forward, outside of the optimizer's step",
    "scale_grad_by_freq": "has a gradient that is not the derivative of the loss",
    "sparse": "has sparse gradients, which cannot be differentiated again",
}


_STOPPING = frozenset(
    {
        Tensor.detach,
        Tensor.detach_,
        torch.detach,
        torch.detach_,
        Tensor.data.__get__,  # type: ignore[attr-defined]
        Tensor.item,
        Tensor.tolist,
        Tensor.numpy,
        Tensor.__array__,
        Tensor.__float__,
        Tensor.__int__,
        Tensor.__format__,
        Tensor.__repr__,
        Tensor.storage,
        Tensor.untyped_storage,
        Tensor.new_tensor,
        torch.tensor,
        torch.as_tensor,
        torch.asarray,
        torch.autograd.grad,
    }
)
LEAVING = frozenset({"item", "tolist", "numpy", "array", "float"})  # those of them that give no tensor


_OF_ALL_MODULES: tuple[dict[Any, Any], ...] = (
    nn.modules.module._global_backward_hooks,
    nn.modules.module._global_backward_pre_hooks,
)


class WatchedCalls(TorchFunctionMode):
    """Watches what a ``training_step`` or ``validation_step`` does to its derivative.

    ``embedding`` and ``embedding_bag`` are refused with options that cannot be followed, by the weight's name. Backward
    hooks of modules and tensors are made to rest when they have to; see :func:`resting_hooks`. Values that leave the
    graph are noted.

    Args:
        module: The LightningModule.
        locates: Whether to note the lines at which values leave the graph.
        nudge: By how much of their size to move numbers that leave torch: what rounds them hides smaller moves.

    Attributes:
        stops: How often values that the parameters move left the graph, by the function that took them; and hooks.
        places: ``detach at train.py:31``, in order, each once.
        padding: Rows of padding, by the address of the parameter that they are in.
    """

    def __init__(self, module: nn.Module, *, locates: bool = False, nudge: float = 0.0) -> None:
        super().__init__()
        self._module, self._locates, self._nudge = module, locates, nudge
        self._names = {id(param): name for name, param in module.named_parameters()}
        self._originals: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._has_graph, self._is_stopped = True, False
        self.stops: Counter[str] = Counter()
        self.places: dict[str, None] = {}
        self.padding: dict[int, int] = {}

    def __enter__(self) -> "WatchedCalls":
        """Modules hand their hooks on when they are called, so these are replaced before."""
        parts = self._module.modules()
        tables = [hooks for part in parts for hooks in (part._backward_hooks, part._backward_pre_hooks)]
        for hooks in (*tables, *_OF_ALL_MODULES):
            if hooks:
                self._originals.append((hooks, dict(hooks)))
                hooks.update({key: _resting(hook) for key, hook in hooks.items()})
        self._has_graph, self._is_stopped = torch.is_grad_enabled(), False
        self.stops["hooks"] += sum(len(hooks) for hooks, _ in self._originals)
        self.stops["hooks"] += sum(len(param._backward_hooks or ()) for param in self._module.parameters())
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        """Give the modules their own hooks back."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for hooks, own in self._originals:
            hooks.update({key: hook for key, hook in own.items() if key in hooks})  # none that was removed meanwhile
        self._originals.clear()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Pass everything on but such look-ups.

        Raises:
            UnsupportedOperationError: For these.
        """
        kwargs = kwargs or {}
        if func in _SIGNATURES:
            self._check_lookup(func, args, kwargs)
        if func is Tensor.register_hook:
            self.stops["hooks"] += 1
            return func(args[0], _resting(*args[1:], **kwargs))
        if func is torch._C._set_grad_enabled:  # by the user: torch, too, records nothing within a Function
            self._is_stopped = not args[0] and (self._is_stopped or torch.is_grad_enabled())
        elif self._has_graph and (func in _STOPPING or self._is_stopped or torch.is_inference_mode_enabled()):
            return self._stopped(func, args, kwargs)
        return passed_on(func, args, kwargs)

    def manner(self, *values: Tensor) -> tuple[frozenset[Any], frozenset[Any]]:
        """How a value was made, if need be in several parts: the operations, and what left the graph."""
        operations = sum(map(graph_of, values), Counter[str]())
        return frozenset(operations.items()), frozenset(self.stops.items())

    def _stopped(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function whose result has no graph, and note it if the parameters move it all the same."""
        output = passed_on(func, args, kwargs)
        is_followed = func is torch.autograd.grad and kwargs.get("create_graph")
        if is_followed or not any(map(self._moves, tree_leaves((args, kwargs)))):
            return output
        name = func.__name__.strip("_") if torch.is_grad_enabled() else "no_grad"
        name = "data" if name == "get" else name
        self.stops[name] += 1
        if self._locates and (place := _place()):
            self.places[f"{name} at {place}"] = None
        if self._nudge and name in LEAVING:
            return tree_map(lambda value: value if isinstance(value, int) else value * (1 + self._nudge), output)
        return output

    def _check_lookup(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        options = _SIGNATURES[func].bind(*args, **kwargs).arguments
        if options.get("padding_idx") is not None:
            self.padding[id(options["weight"])] = options["padding_idx"]
        for option, reason in _REASONS.items():
            if options.get(option):
                raise UnsupportedOperationError(
                    f"The {func.__name__} of {self._names.get(id(options['weight']), 'a tensor')!r} with "
                    f"{option}={options[option]} {reason}. Use it without {option}."
                )

    def _moves(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.requires_grad and (not value.is_leaf or id(value) in self._names)


def _place() -> str:
    """The line of the user's code that called the watched function; empty if ours did."""
    frame = sys._getframe(3)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        frame = frame.f_back
    is_ours = frame.f_globals.get("__name__", "").startswith(__name__.partition(".")[0])
    return "" if is_ours else f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"


_BETWEEN = ("torch", "numpy", "contextlib")


def graph_of(loss: Tensor) -> Counter[str]:
    """The operations that a loss was made by, as autograd names them, with their numbers."""
    return Counter(node.name() for node in nodes_of(loss))
