# SPDX-License-Identifier: Apache-2.0
"""Where the loss begins: what enters the loss calls of a ``training_step``, and how the parameters move it."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lightning_sgdclean.base.errors import UnsupportedOperationError
from lightning_sgdclean.losses.kernels import nodes_of
from lightning_sgdclean.losses.loss_functions import SIGNATURES, lost_weight, passed_on

_LOG_SOFTMAX: tuple[Callable[..., Any], ...] = (functional.log_softmax, torch.log_softmax, Tensor.log_softmax)
_make_dual: Callable[..., Tensor] = forward_ad.make_dual
_unpack_dual: Callable[..., tuple[Tensor, Tensor | None]] = forward_ad.unpack_dual
_LINEAR = (functional.nll_loss, functional.kl_div)  # in their first argument


@dataclass
class LossInput:
    """A tensor that enters a loss call.

    Attributes:
        value: With the graph that it was made by.
        leaf: The same numbers without a graph, which entered in its place.
        tangent: How it moves with the parameters; None where that was not asked for.
    """

    value: Tensor
    leaf: Tensor
    tangent: Tensor | None


class LossInputs(TorchFunctionMode):
    """Cuts the graph of a loss where tensors enter a loss call, and takes their tangents on the way.

    ``nll_loss`` and ``kl_div`` are linear in log-probabilities: there the logits count that ``log_softmax`` made these
    of. What was computed from another call's loss is not cut again, and neither is a parameter itself, nor what depends
    on the samples' weights: a loss of the user's own may give a call its rows' weights.

    To be entered last of all modes around a ``training_step``, so that it sees the calls first. It may be entered
    again, and then begins anew.

    Args:
        params: The parameters.
        tangents: How they move, each like its parameter; None: no tangents are taken.
        weights: Of the samples, by which the loss is differentiated, too.

    Attributes:
        found: What was cut, in order.
    """

    def __init__(
        self, params: Sequence[nn.Parameter], tangents: Sequence[Tensor] | None = None, weights: Tensor | None = None
    ) -> None:
        super().__init__()
        self._params, self._tangents, self._weights = params, tangents, weights
        self._level: Any = None
        self._made: list[tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]] = []  # log-probabilities, and of what
        self.found: list[LossInput] = []

    def __enter__(self) -> "LossInputs":
        """Let the parameters move."""
        self.found, self._made = [], []
        if self._tangents is not None:
            _load_forward_mode()
            self._level = forward_ad.dual_level()
            self._level.__enter__()
            try:
                self._move(self._tangents)
            except BaseException:
                self._rest()
                raise
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        """Take the tangents off all tensors again: a backward pass must not meet them."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._made = []
        self._rest()

    def _move(self, tangents: Sequence[Tensor]) -> None:
        """Written in place, so that whoever holds a parameter holds its tangent: tied weights, ``nn.LSTM``, lists."""
        with torch._C.DisableTorchFunction(), torch.no_grad():
            for param, tangent in zip(self._params, tangents, strict=True):
                param.copy_(_make_dual(param.detach(), tangent.detach()))

    def _rest(self) -> None:
        if self._level is not None:
            self._level.__exit__(None, None, None)
            self._level = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Pass everything on, losses with leaves in the place of what enters them.

        Raises:
            UnsupportedOperationError: If log-probabilities enter a loss that is linear in them, and it is not seen what
                they were made of; or if a loss is differentiated within the step.
        """
        kwargs = kwargs or {}
        if func is torch.autograd.grad:
            self._check_differentiated(args[0] if args else kwargs["outputs"])
        if not torch.is_grad_enabled() or (func not in SIGNATURES and func not in _LOG_SOFTMAX):
            return passed_on(func, args, kwargs)
        if func in _LOG_SOFTMAX:
            logits, rest, named = _taken_out(args, kwargs)
            output = func(logits, *rest, **named)
            self._made.append((output, logits, lambda leaf: func(leaf, *rest, **named)))
            return output
        options = SIGNATURES[func].bind(*args, **kwargs).arguments
        weight = lost_weight() if func is functional.l1_loss else None
        if weight is not None:
            options["weight"] = weight
        for name, value in options.items():
            if isinstance(value, Tensor) and value.requires_grad and not value.is_leaf:
                options[name] = self._entering(value, func.__name__ if name == "input" and func in _LINEAR else "")
        return func(**options)

    def _entering(self, value: Tensor, linear: str) -> Tensor:
        """What enters in the place of a tensor; ``linear`` names a loss that is linear in it."""
        for output, logits, remake in self._made:
            with torch._C.DisableTorchFunction():
                is_output, is_view = value is output, value._base is output
                can_be_cut = logits.requires_grad and not logits.is_leaf and not self._reaches(logits)
            if not can_be_cut or not (is_output or is_view):
                continue
            made = remake(self._leaf(logits))
            if is_output:
                return made
            if made.stride() == output.stride():
                return made.as_strided(value.size(), value.stride(), value.storage_offset())
        if self._reaches(value):
            return value
        if linear:
            raise UnsupportedOperationError(
                f'{linear} is linear in what enters it, so that curvature="gauss-newton" would find no curvature: it '
                "has to see the log_softmax that made the log-probabilities. Give the loss what log_softmax returns, "
                'or a view of it, or give logits to cross_entropy. Or use curvature="exact".'
            )
        return self._leaf(value)

    def _check_differentiated(self, outputs: Any) -> None:
        if any(self._reaches(one) for one in tree_leaves(outputs) if isinstance(one, Tensor)):
            raise UnsupportedOperationError(
                "training_step differentiates a loss (torch.autograd.grad), whose graph ends where the loss begins "
                'with curvature="gauss-newton". Use curvature="exact".'
            )
        if self._level is not None:
            raise NotImplementedError("Tangents of a backward pass are not relied on.")

    def _reaches(self, value: Tensor) -> bool:
        """Whether a tensor was computed from one that entered a loss call before, or from the samples' weights."""
        leaves = {id(self._weights), *(id(one.leaf) for one in self.found)} - {id(None)}
        with torch._C.DisableTorchFunction():
            return any(id(getattr(node, "variable", None)) in leaves for node in nodes_of(value))

    def _leaf(self, value: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            tangent = None
            own = value
            if self._level is not None:
                own, tangent = _unpack_dual(value)
                tangent = torch.zeros_like(own) if tangent is None else tangent.detach()
            leaf = own.detach().requires_grad_()
        self.found.append(LossInput(value, leaf, tangent))
        return leaf


@cache
def _load_forward_mode() -> None:
    """Torch warns of its own code when its forward mode is first used."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        _make_dual(torch.zeros(()), torch.zeros(()))


def without_tangent(tensor: Tensor) -> Tensor:
    """A tensor with its graph, but without what forward mode says of it."""
    with torch._C.DisableTorchFunction():
        return _unpack_dual(tensor)[0]


def _taken_out(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """The first argument of a function, which it calls ``input``, and the others."""
    if args:
        return args[0], args[1:], kwargs
    return kwargs["input"], (), {name: value for name, value in kwargs.items() if name != "input"}
