# SPDX-License-Identifier: Apache-2.0
"""Runs in 16 bits: evaluated in float32 where a derivative or a probe of its own is wanted.

Derivatives of a loss that was rounded to 8 or 11 bits are noisy, and sums of their products more so.
What was trained on is replayed in the run's precision; what is new can be computed in float32.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_sgdclean.losses.evaluate import Surroundings

_LOW = (torch.float16, torch.bfloat16)


def is_low(surroundings: Surroundings, module: nn.Module) -> bool:
    """Whether the run computes in 16 bits, by autocast or by its parameters."""
    return surroundings.precision.startswith(("16", "bf16")) or any(
        param.dtype in _LOW for param in module.parameters()
    )


def in_half(surroundings: Surroundings) -> bool:
    """Whether that is float16, whose derivatives overflow as well."""
    return surroundings.precision.startswith("16")


def as_float32(batch: Any) -> Any:
    """The batch with its 16-bit tensors widened."""
    return apply_to_collection(batch, Tensor, summable)


def summable(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor.float() if tensor.dtype in _LOW else tensor


def widened(module: nn.Module, surroundings: Surroundings) -> AbstractContextManager[Surroundings]:
    """:func:`in_float32` for a run in 16 bits; any other keeps its surroundings."""
    return in_float32(module, surroundings) if is_low(surroundings, module) else nullcontext(surroundings)


@contextmanager
def in_float32(module: nn.Module, surroundings: Surroundings) -> Iterator[Surroundings]:
    """Within the block the module's parameters and buffers are float32, and nothing is cast down.

    Yields:
        Surroundings to evaluate the module in.
    """
    tensors = [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.dtype in _LOW]
    dtypes = [tensor.dtype for tensor in tensors]
    for tensor in tensors:
        tensor.data = tensor.data.float()
    try:
        yield replace(
            surroundings,
            prepare=lambda batch, number: as_float32(surroundings.prepare(batch, number)),
            train_context=_uncast,
            val_context=_uncast,
            precision="32-true",
        )
    finally:
        for tensor, dtype in zip(tensors, dtypes, strict=True):
            tensor.data = tensor.data.to(dtype)


@contextmanager
def _uncast() -> Iterator[None]:
    """No autocast on any device, and new tensors in float32."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.set_default_dtype(default)
