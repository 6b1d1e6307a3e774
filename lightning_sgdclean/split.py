# SPDX-License-Identifier: Apache-2.0
"""Prove on one batch that the loss splits by sample, and which sample owns which part of it.

Sums cannot tell swapped rows apart, so samples are replaced by others, group by group, and the parts
of the loss that move are held against those that ought to.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sgdclean.curvature import gradient
from lightning_sgdclean.errors import LossSplitError
from lightning_sgdclean.precision import as_float32, widened
from lightning_sgdclean.randomness import set_random_state, untouched_randomness
from lightning_sgdclean.replay import Surroundings, training_loss, untouched_module
from lightning_sgdclean.trajectory import MicroBatch

Parts = Callable[[Any], tuple[Tensor, Tensor, list[str]]]
_ADVICE = (
    "Give sample_losses=, a callable (pl_module, batch) -> tensor of shape (B,) whose mean is the training loss, "
    'e.g. sample_losses=lambda m, batch: F.cross_entropy(m(batch[0]), batch[1], reduction="none").'
)


def with_neighbours(batch: Any, replaced: Tensor) -> Any:
    """The batch with each marked sample's row overwritten by that of the sample before it.

    Args:
        batch: Nested dicts, lists and tuples; tensors and lists of ``B`` entries have a row a sample.
        replaced: ``(B,)`` of bool.
    """
    num = len(replaced)
    if isinstance(batch, Tensor):
        if batch.ndim == 0 or batch.shape[0] != num:
            return batch.clone()
        mask = replaced.to(batch.device).view(-1, *[1] * (batch.ndim - 1))
        return torch.where(mask, batch.roll(1, 0), batch)
    if isinstance(batch, dict):
        return {key: with_neighbours(value, replaced) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        if len(batch) == num and not any(isinstance(item, Tensor | dict | list | tuple) for item in batch):
            items = [batch[i - 1] if replaced[i] else batch[i] for i in range(num)]
        else:
            items = [with_neighbours(item, replaced) for item in batch]
        if hasattr(batch, "_fields"):
            return type(batch)(*items)
        return tuple(items) if isinstance(batch, tuple) else items
    return batch


def groups_of(num: int) -> list[Tensor]:
    """Masks ``(B,)`` such that every sample is in at least one and no two are in the same ones."""
    numbers = torch.arange(1, num + 1)
    return [((numbers >> bit) & 1).bool() for bit in range(math.ceil(math.log2(num + 1)))]


def check_split(parts: Parts, variant: Callable[[Tensor], Any], num: int) -> None:
    """Check that part ``i`` of the loss moves with sample ``i`` and with no other.

    Args:
        parts: Batch -> (loss, parts ``(B,)``, loss calls not split); deterministic, samples not mixed
            by BatchNorm or dropout (evaluation mode), at parameters where samples do differ.
        variant: Mask ``(B,)`` -> the batch with the marked samples replaced by others.
        num: ``B``.

    Raises:
        LossSplitError: If a part moves with another sample, or if what is left of the loss besides
            the parts depends on the samples.
    """
    loss, base, unsplit = parts(variant(torch.zeros(num, dtype=torch.bool)))
    rest = float(loss - base.sum())
    scale = max(float(base.abs().max()), abs(float(loss)) / num, 1e-12)
    tolerance = scale * (1e-9 if base.dtype is torch.float64 else 1e-4)
    notes = f" ({'; '.join(dict.fromkeys(unsplit))})" if unsplit else ""
    if num == 1 and abs(rest) > tolerance:  # there is no other sample to tell a regulariser by
        raise LossSplitError(
            f"The loss of a batch of one sample has a part that was not split{notes}, and whether it depends on the "
            f"sample cannot be told from one. Train on batches of two or more. {_ADVICE}"
        )
    any_moved = num == 1
    for mask in groups_of(num) if num > 1 else []:
        loss, now, _ = parts(variant(mask))
        moved = ((now - base).abs() > tolerance).cpu()
        any_moved |= bool(moved.any())
        if bool((moved & ~mask).any()):
            wrong = int((moved & ~mask).nonzero()[0])
            raise LossSplitError(
                f"Row {wrong} of the loss depends on another sample than sample {wrong} of the batch: rows are "
                f"swapped (sorted or transposed?) or mix samples{notes}. {_ADVICE}"
            )
        if abs(float(loss - now.sum()) - rest) > tolerance * math.sqrt(num):
            raise LossSplitError(
                f"A part of the training loss depends on the samples but was not split by sample{notes}. {_ADVICE}"
            )
    if not any_moved:
        raise LossSplitError(f"No part of the training loss was found to depend on a sample{notes}. {_ADVICE}")


def shake(params: list[nn.Parameter]) -> None:
    """Move the parameters a little, so that samples differ even in a network that starts at zero."""
    with torch.no_grad():
        source = torch.Generator().manual_seed(0)
        for param in params:
            noise = torch.randn(param.shape, generator=source).to(param)
            param.add_(noise, alpha=0.02 + 0.05 * float(param.detach().float().pow(2).mean().sqrt()))


def unit_weights(num: int, params: list[nn.Parameter]) -> Tensor:
    """``(B,)`` of ones that require a gradient, in float64 for a float64 module and in float32 for all others."""
    dtype = torch.float64 if params[0].dtype is torch.float64 else torch.float32
    return torch.ones(num, dtype=dtype, device=params[0].device, requires_grad=True)


def prove_split(
    module: Any,
    params: list[nn.Parameter],
    variant: Callable[[Tensor], Any],
    micro: MicroBatch,
    surroundings: Surroundings,
) -> None:
    """:func:`check_split` on a batch of the user's training, leaving module and random state untouched.

    Raises:
        LossSplitError: As :func:`check_split`.
    """
    with (
        untouched_randomness(surroundings.device),
        untouched_module(module),
        surroundings.as_stage("train"),
        torch.enable_grad(),
        widened(module, surroundings) as wide,
    ):

        def parts(batch: Any) -> tuple[Tensor, Tensor, list[str]]:
            set_random_state(micro.random, surroundings.device)
            weights = unit_weights(len(micro.ids), params)
            content = batch if wide is surroundings else as_float32(batch)
            evaluated = training_loss(module, content, micro.batch_idx, weights, wide, samples_apart=True)
            return evaluated.loss.detach(), gradient([evaluated.loss], [weights])[0], evaluated.unsplit

        module.eval()  # BatchNorm over the batch and dropout would tie the samples together
        shake(params)
        check_split(parts, variant, len(micro.ids))
