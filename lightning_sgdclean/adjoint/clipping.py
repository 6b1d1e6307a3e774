# SPDX-License-Identifier: Apache-2.0
"""Clipping of gradients as Lightning does it, and its transpose: what a clipped gradient was cut by depends on it."""

import math

import torch
from torch import Tensor

Clip = tuple[str, float] | None


def clip(grads: dict[str, Tensor], how: Clip) -> dict[str, Tensor]:
    """Gradients as ``clip_grad_norm_`` or ``clip_grad_value_`` leaves them."""
    if how is None or not grads:
        return grads
    algorithm, value = how
    if algorithm == "value":
        return {name: grad.clamp(-value, value) for name, grad in grads.items()}
    factor = min(1.0, value / (_norm(grads) + 1e-6))
    return {name: grad * factor for name, grad in grads.items()}


def clip_transpose(grads: dict[str, Tensor], cotangents: dict[str, Tensor], how: Clip) -> dict[str, Tensor]:
    """Cotangents of the gradients before clipping from those after it."""
    if how is None or not grads:
        return cotangents
    algorithm, value = how
    if algorithm == "value":
        return {n: torch.where(grads[n].abs() <= value, c, 0) for n, c in cotangents.items()}
    norm = _norm(grads)
    if value / (norm + 1e-6) >= 1:
        return cotangents
    factor = value / (norm + 1e-6)
    dot = sum(float((cotangents[n].double() * grads[n].double()).sum()) for n in grads)
    pull = -value / (norm + 1e-6) ** 2 / norm * dot
    return {n: factor * c + pull * grads[n] for n, c in cotangents.items()}


def _norm(grads: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(grad.double().pow(2).sum()) for grad in grads.values()))
