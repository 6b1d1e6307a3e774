# SPDX-License-Identifier: Apache-2.0
"""A module evaluated in more bits than it was trained in.

A run in 16 bits is replayed in its own precision. Derivatives and probes of it are taken in float32: those of a loss
that was rounded to 8 or 11 bits are noisy, and sums of their products more so. Differences are taken in float64.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from lightning_sgdclean.base.resources import free_memory, in_bytes
from lightning_sgdclean.data.batches import SIXTEEN_BITS, as_float32, as_float64
from lightning_sgdclean.losses.loss_functions import passed_on
from lightning_sgdclean.losses.surroundings import Surroundings


def is_low(surroundings: Surroundings, module: nn.Module) -> bool:
    """Whether the run computes in 16 bits, by autocast or by its parameters."""
    return surroundings.precision.startswith(("16", "bf16")) or any(
        param.dtype in SIXTEEN_BITS for param in module.parameters()
    )


def in_half(surroundings: Surroundings) -> bool:
    """Whether that is float16, whose derivatives overflow as well."""
    return surroundings.precision.startswith("16")


def widened(module: nn.Module, surroundings: Surroundings) -> AbstractContextManager[Surroundings]:
    """:func:`in_float32` for a run in 16 bits; any other keeps its surroundings."""
    return in_float32(module, surroundings) if is_low(surroundings, module) else nullcontext(surroundings)


def in_float32(module: nn.Module, surroundings: Surroundings) -> AbstractContextManager[Surroundings]:
    """Within the block the module's parameters and buffers are float32 at least, and nothing is cast down.

    Yields:
        Surroundings to evaluate the module in.
    """
    return _in_precision(module, surroundings, torch.float32, SIXTEEN_BITS, as_float32, "32-true")


def in_float64(module: nn.Module, surroundings: Surroundings) -> AbstractContextManager[Surroundings]:
    """Within the block everything is float64: parameters, buffers, batches, and what the module asks for in less.

    Rounding is then so small that a difference quotient can be taken over steps too short to cross the kinks of ReLU.

    Yields:
        Surroundings to evaluate the module in.
    """
    return _in_precision(module, surroundings, torch.float64, _NARROW, as_float64, "64-true")


_NARROW = (*SIXTEEN_BITS, torch.float32)


@contextmanager
def _in_precision(
    module: nn.Module,
    surroundings: Surroundings,
    dtype: torch.dtype,
    narrower: Sequence[torch.dtype],
    widen: Callable[[Any], Any],
    name: str,
) -> Iterator[Surroundings]:
    tensors = [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.dtype in narrower]
    own = [tensor.data for tensor in tensors]
    for tensor, data in zip(tensors, own, strict=True):
        tensor.data = data.to(dtype)
    context = partial(_uncast, dtype)
    try:
        yield replace(
            surroundings,
            prepare=lambda batch, number: widen(surroundings.prepare(batch, number)),
            train_context=context,
            val_context=context,
            precision=name,
            widen=widen,
        )
    finally:
        for tensor, data in zip(tensors, own, strict=True):
            # The very memory: cuDNN has the weights of an LSTM in one piece, and a captured CUDA graph knows addresses.
            tensor.data = data.copy_(tensor.data)


@contextmanager
def _uncast(dtype: torch.dtype) -> Iterator[None]:
    """No autocast on any device, and new tensors in ``dtype``."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.autocast("cpu", enabled=False))
            stack.enter_context(torch.autocast("cuda", enabled=False))
            if dtype is torch.float64:
                stack.enter_context(_AlwaysDouble())
            yield
    finally:
        torch.set_default_dtype(default)


class _AlwaysDouble(TorchFunctionMode):
    """Gives float64 wherever the module asks for less: by ``float()``, by ``dtype=``, by a constant of its own."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Widen dtypes and tensors among the arguments, but a tensor that is written to."""
        kwargs = kwargs or {}
        if func in _CASTS:
            return args[0].double()
        name = getattr(func, "__name__", "")
        if name == "__set__" or "out" in kwargs:
            return func(*args, **kwargs)
        keeps = args[:1] if name in _WRITES or (name.endswith("_") and not name.endswith("__")) else ()
        wide = tree_map(_doubled, (args[len(keeps) :], kwargs))
        return passed_on(func, (*keeps, *wide[0]), wide[1])


_CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)
_WRITES = ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "register_hook", "backward")
_DOUBLED = dict.fromkeys(_NARROW, torch.float64) | {torch.complex64: torch.complex128}


def _doubled(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if type(value) in (Tensor, nn.Parameter) and value.dtype in _NARROW else value
    return _DOUBLED.get(value, value) if isinstance(value, torch.dtype) else value


_TIMES = 12  # what a graph saves: in twice the bits, differentiated twice, with as much in between


def lack_of_memory(evaluate: Callable[[], object], params: Sequence[nn.Parameter]) -> str:
    """In words how much more memory a second derivative in float64 may take than is free; empty if it fits.

    Told by what the graph of the loss saves and by the parameters.

    Args:
        evaluate: Computes the loss.
        params: The trained parameters.
    """
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    # Not under torch.func, which forbids the hooks; there it is not known.
    with suppress(RuntimeError), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        evaluate()
    missing = _TIMES * (sum(saved.values()) + sum(param.nbytes for param in params)) - free_memory(params[0].device)
    return f"in float64 the step would take {in_bytes(missing)} more memory than is free" if missing > 0 else ""
