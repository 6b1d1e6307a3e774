# SPDX-License-Identifier: Apache-2.0
"""Operations of which torch's kernels have no second derivative (torch 2.13), or a wrong one, by other means.

Each gives torch's own value to the last bit, where it has one, and derivatives of every order: the value is torch's,
and what is differentiated rides along as a difference of zero. Where an argument asks for what is not written here,
torch's kernel is called, and refuses by its name when it is differentiated.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def _riding(value: Tensor, written: Tensor) -> Tensor:
    """``value`` to the last bit, with the derivatives of ``written``."""
    return value.detach() + (written - written.detach())


def _hardsigmoid(func: Callable[..., Tensor], input: Tensor, inplace: bool = False) -> Tensor:
    """Made of straight lines: the kernel's own slope, which on a CPU is a sixth in 32 bits, is constant."""
    with torch.no_grad():
        value = functional.hardsigmoid(input)
        slope = torch.ops.aten.hardsigmoid_backward(torch.ones_like(input), input)
    result = _riding(value, torch.where(slope == 0, 0.0, input) * slope)
    return input.copy_(result) if inplace else result


def _hardsigmoid_in_place(func: Callable[..., Tensor], input: Tensor) -> Tensor:
    return _hardsigmoid(func, input, inplace=True)


def _weight_norm(func: Callable[..., Tensor], v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Torch's takes the norm of ``v`` for a constant in the second derivative."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


_LEAST_BY_PRODUCT = 26  # rows; torch then multiplies matrices, which can be differentiated twice


def _cdist(
    func: Callable[..., Tensor],
    x1: Tensor,
    x2: Tensor,
    p: float = 2.0,
    compute_mode: str = "use_mm_for_euclid_dist_if_necessary",
) -> Tensor:
    is_large = max(x1.shape[-2], x2.shape[-2]) >= _LEAST_BY_PRODUCT
    if_large, always = "use_mm_for_euclid_dist_if_necessary", "use_mm_for_euclid_dist"
    is_multiplied = p == 2 and (compute_mode == always or (is_large and compute_mode == if_large))
    if is_multiplied or not _is_written(p):
        return func(x1, x2, p, compute_mode)
    with torch.no_grad():
        value = func(x1, x2, p, compute_mode)
    return _riding(value, _length(x1.unsqueeze(-2) - x2.unsqueeze(-3), p))


def _pdist(func: Callable[..., Tensor], input: Tensor, p: float = 2.0) -> Tensor:
    if not _is_written(p):
        return func(input, p)
    with torch.no_grad():
        value = func(input, p)
    one, other = torch.triu_indices(len(input), len(input), 1, device=input.device)
    return _riding(value, _length(input[one] - input[other], p))


def _is_written(p: float) -> bool:
    return p == 1 or p >= 2


def _length(difference: Tensor, p: float) -> Tensor:
    """Along the last dimension; where it is zero, so are its derivatives, as torch has it."""
    sizes = difference.abs()
    if p == 1:
        return sizes.sum(dim=-1)
    if math.isinf(p):
        return sizes.amax(dim=-1)
    total = (sizes**p).sum(dim=-1)
    is_zero = total == 0
    return torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, total) ** (1 / p))


def _multi_margin_loss(
    func: Callable[..., Tensor],
    input: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    given = (input, target, p, margin, weight, size_average, reduce, reduction)
    if size_average is not None or reduce is not None:
        return func(*given)
    with torch.no_grad():
        value = func(*given)
    scores, classes = input.reshape(-1, input.shape[-1]), target.reshape(-1, 1)
    short = (margin - scores.gather(1, classes) + scores).clamp(min=0) ** p
    short = short if weight is None else short * weight[classes]
    rows = short.scatter(1, classes, 0.0).sum(dim=1) / scores.shape[1]
    return _riding(value, _reduced(rows.reshape(target.shape), reduction))


def _multilabel_margin_loss(
    func: Callable[..., Tensor],
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    given = (input, target, size_average, reduce, reduction)
    if size_average is not None or reduce is not None:
        return func(*given)
    with torch.no_grad():
        value = func(*given)
    scores, listed = (tensor.reshape(-1, input.shape[-1]) for tensor in (input, target))
    is_listed = (listed >= 0).cumprod(dim=1).bool()  # the list ends at the first negative entry
    classes = torch.where(is_listed, listed, 0)
    is_label = torch.zeros_like(scores).scatter_add(1, classes, is_listed.to(scores.dtype)) > 0
    short = (1 - scores.gather(1, classes).unsqueeze(2) + scores.unsqueeze(1)).clamp(min=0)
    counts = is_listed.unsqueeze(2) & ~is_label.unsqueeze(1)
    rows = torch.where(counts, short, 0.0).sum(dim=(1, 2)) / scores.shape[1]
    return _riding(value, _reduced(rows.reshape(input.shape[:-1]), reduction))


def _reduced(rows: Tensor, reduction: str) -> Tensor:
    if reduction == "mean":
        return rows.mean()
    return rows.sum() if reduction == "sum" else rows


def _embedding_bag(func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    given = _EMBEDDING_BAG.bind(*args, **kwargs)
    given.apply_defaults()
    options = given.arguments
    input, weight, offsets = options["input"], options["weight"], options["offsets"]
    if options["max_norm"] is not None or options["scale_grad_by_freq"] or options["sparse"]:
        return func(*args, **kwargs)
    if input.ndim > 1:
        bags = torch.arange(len(input), device=input.device).repeat_interleave(input.shape[1])
        num_bags = len(input)
    else:
        places = torch.arange(len(input), device=input.device)
        bags = torch.searchsorted(offsets.contiguous(), places, right=True) - 1
        num_bags = len(offsets) - options["include_last_offset"]
    with torch.no_grad():
        value = func(*args, **kwargs)
    flat, padding = input.reshape(-1), options["padding_idx"]
    kept = bags < num_bags
    if padding is not None:
        kept = kept & (flat != padding % len(weight))
    bags, rows = bags[kept], weight[flat[kept]]
    if options["per_sample_weights"] is not None:
        rows = rows * options["per_sample_weights"].reshape(-1)[kept].unsqueeze(1)
    nothing = rows.new_zeros(num_bags, weight.shape[1])
    if options["mode"] == "max":
        places = bags.unsqueeze(1).expand_as(rows)
        return _riding(value, nothing.scatter_reduce(0, places, rows, "amax", include_self=False))
    sums = nothing.index_add(0, bags, rows)
    if options["mode"] == "mean":
        sums = sums / torch.bincount(bags, minlength=num_bags).clamp(min=1).unsqueeze(1)
    return _riding(value, sums)


_EMBEDDING_BAG = inspect.signature(functional.embedding_bag)

SUBSTITUTES: dict[Callable[..., Any], Callable[..., Tensor]] = {
    torch._weight_norm: _weight_norm,
    functional.hardsigmoid: _hardsigmoid,
    torch._C._nn.hardsigmoid: _hardsigmoid,
    torch._C._nn.hardsigmoid_: _hardsigmoid_in_place,
    functional.embedding_bag: _embedding_bag,
    functional.multi_margin_loss: _multi_margin_loss,
    functional.multilabel_margin_loss: _multilabel_margin_loss,
    torch.cdist: _cdist,
    torch.pdist: _pdist,
}
"""By the function that a mode is asked for; each is given that function and its arguments."""
