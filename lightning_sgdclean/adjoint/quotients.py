# SPDX-License-Identifier: Apache-2.0
"""Hold a derivative against difference quotients, in float64."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from lightning_sgdclean.losses.kernels import length_of
from lightning_sgdclean.trajectory.teachers import teachers_of

TOLERANCE = 1e-5  # relative; what rounding explains comes on top
_AGREEING = 0.1  # of their distance to the derivative: what moves of two sizes show is no rounding, and no kink
_SHORT = 1e-9  # a distance so short that rounding may hide anything
_ROUNDINGS = 64 * torch.finfo(torch.float64).eps
_SHAKEN = 1e-3


def difference(
    expected: float, quotient: Callable[[float], tuple[float, float]], moves: Sequence[float]
) -> float | None:
    """How far difference quotients are from a derivative, relative to the larger of the two.

    A single quotient may be off though the derivative is right: by rounding, or since a kink was crossed. Then one
    over another distance is off by another amount. So a derivative is wrong where two quotients agree that it is.
    They agree as far as they are near one another for their own size: where a function bends sharply, as behind
    BatchNorm over a few equal numbers, quotients over distances that are all too long are as good as zero, and agree
    on nothing. Shorter distances tell there; they count only as far as rounding is too small to hide a difference.

    Args:
        expected: The derivative in a direction.
        quotient: Gives the quotient over a distance, and the size of the numbers that were subtracted, divided by it.
        moves: Distances to try, until one agrees.

    Returns:
        None if it cannot be told.
    """
    seen: list[float] = []
    for move in moves:
        found, numbers = quotient(move)
        size, off, rounding = max(abs(found), abs(expected)), abs(found - expected), _ROUNDINGS * numbers
        if move < _SHORT and rounding > TOLERANCE * size:
            continue
        if off <= TOLERANCE * size + rounding:
            return min(TOLERANCE, off / size) if size else 0.0
        if any(abs(found - other) <= _AGREEING * min(off, abs(found)) + rounding for other in seen):
            return off / size
        seen.append(found)
    return None


def towards(source: torch.Generator, at: list[Tensor], *directions: list[Tensor]) -> list[Tensor]:
    """A direction in which to move tensors, as long as they are: in equal parts random and along other directions."""
    length = length_of(at) or 1.0
    total = [torch.zeros_like(tensor) for tensor in at]
    for direction in ([normal(source, tensor) for tensor in at], *directions):
        torch._foreach_add_(total, direction, alpha=length / (length_of(direction) or 1.0))
    return total


def without_padding(
    moves: list[Tensor], params: list[nn.Parameter], gradient: list[Tensor], padding: dict[int, int]
) -> list[Tensor]:
    """Leave rows of padding where they are: they get no gradient, so that nothing moves them.

    Args:
        moves: Of the parameters; written to.
        params: The parameters.
        gradient: Their gradient.
        padding: Rows of padding, by the address of the parameter that they are in.
    """
    for param, grad, move in zip(params, gradient, moves, strict=True):
        row = padding.get(id(param))
        if row is not None and not grad[row].any():
            move[row] = 0.0
    return moves


@torch.no_grad()
def shaken(tensors: Iterable[Tensor], source: torch.Generator) -> None:
    """Move tensors a little, in place: zeros may hide what is wrong, or sit on a kink."""
    for tensor in tensors:
        tensor.add_(normal(source, tensor), alpha=_SHAKEN * (1.0 + math.sqrt(float(tensor.square().mean()))))


class Movable:
    """Parameters, buffers and teachers that can be moved away from where they are, and back.

    Parameters are :func:`shaken` to begin with.

    Args:
        params: The parameters.
        module: Has the buffers and teachers.
        source: Gives the random numbers to shake them by.

    Attributes:
        params: What the parameters hold, once shaken.
        buffers: What buffers and teachers hold, by name.
    """

    def __init__(self, params: list[nn.Parameter], module: nn.Module, source: torch.Generator) -> None:
        self._live = params
        shaken(params, source)
        self.params = [param.detach().clone() for param in params]
        self._others = dict(module.named_buffers()) | teachers_of(module, params)
        self.buffers = {name: buffer.detach().clone() for name, buffer in self._others.items()}

    @torch.no_grad()
    def move(self, e: float, moves: list[Tensor], buffers: dict[str, Tensor]) -> None:
        """Put parameters ``e`` times ``moves`` away from where they were, and so the buffers that are named."""
        for param, at, move in zip(self._live, self.params, moves, strict=True):
            param.copy_(at + e * move)
        for name, buffer in self._others.items():
            at = self.buffers[name]
            buffer.copy_(at + e * buffers[name] if name in buffers else at)

    def put_back(self) -> None:
        """Put all where it was."""
        self.move(0.0, [torch.zeros_like(at) for at in self.params], {})


def normal(source: torch.Generator, like: Tensor) -> Tensor:
    """Normal numbers in float64, the same ones on every device."""
    return torch.randn(like.shape, generator=source, dtype=torch.float64).to(like.device)
