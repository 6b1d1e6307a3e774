# SPDX-License-Identifier: Apache-2.0
"""Kernels that can be differentiated twice, and the refusal by name where there are none."""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointError

from lightning_sgdclean.base.errors import UnsupportedOperationError
from lightning_sgdclean.losses.substitutes import SUBSTITUTES

_RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
_NO_SECOND = re.compile(r"derivative for|double backward|twice|not implemented", re.IGNORECASE)
_OPERATION = re.compile(r"(?:aten::|')(\w+?)(?:_backward)?\b")
_FINITE = 'Use curvature="finite", which needs first derivatives only.'


class _Substitutes(TorchFunctionMode):
    """Computes the same by other means where torch's kernel has no second derivative, or a wrong one."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in SUBSTITUTES:
            return SUBSTITUTES[func](func, *args, **kwargs or {})
        # cuDNN's recurrent layers have none; torch's own have, on every device.
        with torch.backends.cudnn.flags(enabled=False) if func in _RECURRENT else nullcontext():
            return func(*args, **kwargs or {})


@contextmanager
def twice_differentiable_kernels() -> Iterator[None]:
    """Plain attention, plain recurrent layers, and what stands for other kernels that cannot be differentiated twice.

    To be held while the loss is computed and while it is differentiated: checkpointed parts of a model
    are computed again within backward.
    """
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_Substitutes())
        yield


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
    for node in nodes_of(loss):
        if isinstance(node, BackwardCFunction):
            node.register_hook(partial(_refuse_cut, node.name()))


def nodes_of(loss: Tensor) -> Iterator[Node]:
    """The operations that a loss was made by, each once."""
    nodes = [loss.grad_fn]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if node is None:
            continue
        yield node
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


def dot(ones: Iterable[Tensor], others: Iterable[Tensor]) -> float:
    """The product of tensors as one vector with others."""
    return sum(float((one * other).sum(dtype=torch.float64)) for one, other in zip(ones, others, strict=True))
