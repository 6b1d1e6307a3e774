# SPDX-License-Identifier: Apache-2.0
"""Kernels that can be differentiated twice, and the refusal by name where there are none."""

import inspect
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import CheckpointError

from lightning_sgdclean.base.errors import UnsupportedOperationError
from lightning_sgdclean.losses.loss_functions import passed_on

_RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
_NO_SECOND = re.compile(r"derivative for|double backward|twice|not implemented", re.IGNORECASE)
_OPERATION = re.compile(r"(?:aten::|')(\w+?)(?:_backward)?\b")
_FINITE = 'Use curvature="finite", which needs first derivatives only.'


class _Substitutes(TorchFunctionMode):
    """Computes the same by other means where torch's kernel has no second derivative, or a wrong one."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch._weight_norm:
            return _weight_norm(*args, **kwargs or {})
        # cuDNN's recurrent layers have none; torch's own have, on every device.
        with torch.backends.cudnn.flags(enabled=False) if func in _RECURRENT else nullcontext():
            return func(*args, **kwargs or {})


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``torch._weight_norm``, whose second derivative takes the norm of ``v`` for a constant (torch 2.13)."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


@contextmanager
def twice_differentiable_kernels() -> Iterator[None]:
    """Plain attention, plain recurrent layers, plain weight norm.

    To be held while the loss is computed and while it is differentiated: checkpointed parts of a model
    are computed again within backward.
    """
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_Substitutes())
        yield


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


@contextmanager
def refusing_by_name() -> Iterator[None]:
    """Turn torch's complaints about derivatives that it does not have into ours.

    Raises:
        UnsupportedOperationError: Naming the operation, and what to do instead.
    """
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        text = str(error).partition("\n")[0]
        if isinstance(error, CheckpointError):
            raise UnsupportedOperationError(
                f"A checkpointed part of the model was not computed again as it was before: {text} Loss functions and "
                "norm layers with running statistics cannot be followed inside torch.utils.checkpoint (BatchNorm "
                "moves its statistics twice there): move them out of the checkpointed part."
            ) from error
        if "use_reentrant=True" in text:
            raise UnsupportedOperationError(
                "Activation checkpointing with use_reentrant=True allows no derivative by chosen tensors. "
                "Call torch.utils.checkpoint.checkpoint(..., use_reentrant=False), which computes the same."
            ) from error
        if _NO_SECOND.search(text):
            named = _OPERATION.search(text)
            raise UnsupportedOperationError(
                f"The operation {named[1] if named else 'named here'!r} has no second derivative: {text} {_FINITE}"
            ) from error
        raise


def refuse_cut_graphs(loss: Tensor) -> None:
    """See to it that an ``autograd.Function`` whose backward has no graph is refused when the loss is differentiated.

    Asked for the second derivative by chosen tensors, torch takes what such a function leaves out for zero.

    Args:
        loss: With its graph, about to be differentiated with ``create_graph=True``.
    """
    nodes = [loss.grad_fn]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if node is None:
            continue
        if isinstance(node, BackwardCFunction):
            node.register_hook(partial(_refuse_cut, node.name()))
        for following, _ in node.next_functions:
            if following not in seen:
                seen.add(following)
                nodes.append(following)


def _refuse_cut(name: str, found: tuple[Tensor | None, ...], given: tuple[Tensor | None, ...]) -> None:
    if not any(grad is not None and grad.requires_grad for grad in given):
        return
    for grad in found:
        if grad is not None and (grad.grad_fn is None or grad.grad_fn.name().endswith("Error")):
            raise UnsupportedOperationError(
                f"The torch.autograd.Function {name.removesuffix('Backward')!r} cannot be differentiated twice: its "
                f"backward is once_differentiable, or leaves autograd's sight. {_FINITE}"
            )


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
        Tensor.data.__get__,  # type: ignore[attr-defined]
        Tensor.item,
        Tensor.tolist,
        Tensor.numpy,
        Tensor.__array__,
        Tensor.__float__,
        torch.tensor,
        torch.as_tensor,
        torch.autograd.grad,
    }
)
LEAVING = frozenset({"item", "tolist", "numpy", "array", "float"})  # those of them that give no tensor


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
    """

    def __init__(self, module: nn.Module, *, locates: bool = False, nudge: float = 0.0) -> None:
        super().__init__()
        self._module, self._locates, self._nudge = module, locates, nudge
        self._names = {id(param): name for name, param in module.named_parameters()}
        self._originals: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._has_graph, self._is_stopped = True, False
        self.stops: Counter[str] = Counter()
        self.places: dict[str, None] = {}

    def __enter__(self) -> "WatchedCalls":
        """Modules hand their hooks on when they are called, so these are replaced before."""
        for part in self._module.modules():
            for hooks in (part._backward_hooks, part._backward_pre_hooks):
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
            hooks.update(own)
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
    nodes = [loss.grad_fn]
    seen, names = set(nodes), Counter[str]()
    while nodes:
        node = nodes.pop()
        if node is None:
            continue
        names[node.name()] += 1
        for following, _ in node.next_functions:
            if following not in seen:
                seen.add(following)
                nodes.append(following)
    return names


def gradient(
    outputs: list[Tensor], inputs: list[Tensor], cotangents: list[Tensor] | None = None, **options: bool
) -> list[Tensor]:
    """``torch.autograd.grad`` with zeros for what is not reached, and no outputs at all allowed."""
    pairs = [(o, None if cotangents is None else cotangents[i]) for i, o in enumerate(outputs) if o.requires_grad]
    if not pairs:
        return [torch.zeros_like(tensor) for tensor in inputs]
    wanted, given = [output for output, _ in pairs], [cotangent for _, cotangent in pairs]
    with refusing_by_name():
        found = torch.autograd.grad(wanted, inputs, given, allow_unused=True, **options)
    return [torch.zeros_like(tensor) if grad is None else grad for grad, tensor in zip(found, inputs, strict=True)]


def length_of(tensors: Iterable[Tensor]) -> float:
    """The length of tensors as one vector."""
    return math.sqrt(sum(float(tensor.detach().double().pow(2).sum()) for tensor in tensors))
