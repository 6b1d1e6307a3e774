# SPDX-License-Identifier: Apache-2.0
"""Torch's loss functions taken apart: rows, value, the divisor between, and whose the rows are."""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_CLASS_LOSSES = (functional.cross_entropy, functional.nll_loss)
_LOSSES = (
    *_CLASS_LOSSES,
    functional.binary_cross_entropy,
    functional.binary_cross_entropy_with_logits,
    functional.mse_loss,
    functional.l1_loss,
    functional.smooth_l1_loss,
    functional.huber_loss,
    functional.kl_div,
    functional.gaussian_nll_loss,
    functional.poisson_nll_loss,
    functional.soft_margin_loss,
    functional.multi_margin_loss,
    functional.multilabel_margin_loss,
    functional.multilabel_soft_margin_loss,
    functional.hinge_embedding_loss,
    functional.margin_ranking_loss,
    functional.cosine_embedding_loss,
    functional.triplet_margin_loss,
    functional.triplet_margin_with_distance_loss,
    functional.ctc_loss,
)
SIGNATURES: dict[Callable[..., Any], inspect.Signature] = {loss: inspect.signature(loss) for loss in _LOSSES}


def rows_of(func: Callable[..., Any], options: dict[str, Any]) -> tuple[Tensor, Tensor | None, Tensor | int]:
    """A loss call, taken apart.

    Args:
        func: One of torch's losses.
        options: Its arguments by name, without the long deprecated ones.

    Returns:
        The losses before reduction, with their graph; the call's own value without graph, None where it
        does not reduce; and what the losses are divided by before they are summed.
    """
    divisor: Tensor | int = 1
    if func is functional.cross_entropy and _is_plain(options):
        # The log-probabilities are made once for rows and value: with large vocabularies they are what costs.
        logits = options["input"]
        # Autocast takes the whole loss in float32 on a CPU, but only its sums on a GPU: the dtype keeps it from more.
        if logits.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        log_probabilities = logits.log_softmax(min(1, logits.ndim - 1), dtype=logits.dtype)
        options = {k: v for k, v in options.items() if k != "label_smoothing"} | {"input": log_probabilities}
        func = functional.nll_loss
    reduction = options["reduction"]
    if func is functional.l1_loss:
        weight = options.pop("weight", None)
        if weight is not None:
            return _weighted_l1(options, weight)
    rows = func(**{**options, "reduction": "none"})
    if reduction == "none":
        return rows, None, divisor
    with torch.no_grad():
        value = func(**options)
    return rows, value, 1 if reduction == "sum" else _divisor(func, options, rows)


def _weighted_l1(options: dict[str, Any], weight: Tensor) -> tuple[Tensor, Tensor | None, Tensor | int]:
    rows = (options["input"] - options["target"]).abs() * weight
    if options["reduction"] == "none":
        return rows, None, 1
    divisor = weight.sum() if options["reduction"] == "mean" else 1
    return rows, rows.detach().sum() / divisor, divisor


def lost_weight() -> Tensor | None:
    """The ``weight=`` of the ``l1_loss`` being called, which torch (seen in 2.13) does not pass on to a mode."""
    code = functional.l1_loss.__code__
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return None if frame is None else frame.f_locals.get("weight")


def passed_on(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function from within a mode, with the argument that torch loses on the way there."""
    weight = lost_weight() if func is functional.l1_loss else None
    if weight is None:
        return func(*args, **kwargs)
    options = SIGNATURES[func].bind(*args, **kwargs)
    options.apply_defaults()
    rows, value, _ = _weighted_l1(options.arguments, weight)
    if value is None:
        return rows
    return rows.sum() / weight.sum() if options.arguments["reduction"] == "mean" else rows.sum()


def _is_plain(options: dict[str, Any]) -> bool:
    return not options["target"].is_floating_point() and options["label_smoothing"] == 0


def _divisor(func: Callable[..., Any], options: dict[str, Any], rows: Tensor) -> Tensor | int:
    if options["reduction"] == "batchmean":
        return int(options["input"].shape[0]) if options["input"].ndim else 1
    if func is functional.mse_loss and options.get("weight") is not None:
        total: Tensor = options["weight"].sum()
        return total
    if func is functional.ctc_loss:
        lengths = torch.as_tensor(options["target_lengths"], device=rows.device).clamp(min=1).to(rows.dtype)
        return lengths * max(1, rows.numel())
    shares = _class_shares(func, options)
    if shares is None:
        return rows.numel()
    return int(shares.sum()) if shares.dtype is torch.bool else shares.sum()


def _class_shares(func: Callable[..., Any], options: dict[str, Any]) -> Tensor | None:
    """What each row adds to the divisor: nothing if it is ignored, else 1 or its class's weight."""
    target = options["target"] if func in _CLASS_LOSSES else None
    if target is None or target.is_floating_point():
        return None
    counted: Tensor = target != options["ignore_index"]
    if options["weight"] is None:
        return counted
    return torch.where(counted, options["weight"][target.clamp(min=0)], 0)


def shares_of(func: Callable[..., Any], options: dict[str, Any]) -> Tensor | None:
    """What each row adds to the divisor of a mean; None where all add the same, or nothing is averaged.

    Args:
        func: One of torch's losses.
        options: Its arguments by name.
    """
    if options["reduction"] != "mean":
        return None
    if func in (functional.mse_loss, functional.l1_loss) and options.get("weight") is not None:
        weight: Tensor = options["weight"]
        return weight
    return _class_shares(func, options)


@dataclass(frozen=True)
class OwnerRule:
    """A rule that gives the owner of every index along one dimension: ``(index // inner) % B``.

    Exactly one of ``inner`` and ``outer`` is set; the other follows from the length of the dimension,
    which is ``outer * B * inner``. One row a sample, and flattened sequences with the batch first, are
    ``outer=1``; time first, and concatenated views, are ``inner=1``.

    Attributes:
        dim: The dimension.
        inner: How many consecutive entries a sample has, whatever the length.
        outer: How often the samples' order repeats, whatever the length.
        part: Of which loader the samples are, by number, where a batch is made of those of several; ``B`` is then the
            number of its samples. None: of the whole batch.
    """

    dim: int
    inner: int | None = None
    outer: int | None = None
    part: int | None = None

    def owners(self, shape: Sequence[int], num: int, sizes: Sequence[int] = ()) -> Tensor | None:
        """Owner of each index along ``dim``, or None where the rule does not fit the shape."""
        first = 0
        if self.part is not None:
            first, num = (sum(sizes[: self.part]), sizes[self.part]) if self.part < len(sizes) else (0, 0)
        if self.dim >= len(shape) or num == 0 or shape[self.dim] == 0 or shape[self.dim] % num:
            return None
        each = shape[self.dim] // num
        if each % (self.inner or self.outer or 1):
            return None
        inner = self.inner or each // (self.outer or 1)
        return first + (torch.arange(shape[self.dim]) // inner) % num


def candidate_rules(shape: Sequence[int], num: int, sizes: Sequence[int] = ()) -> list[OwnerRule]:
    """All rules that fit a shape, in a batch of ``num`` samples, ``sizes`` of them from each of several loaders."""
    found = []
    for part, size in [(None, num), *enumerate(sizes)]:
        for dim, length in enumerate(shape):
            if size == 0 or length == 0 or length % size:
                continue
            each = length // size
            for inner in (k for k in range(1, each + 1) if each % k == 0):
                found += [OwnerRule(dim, outer=each // inner, part=part), OwnerRule(dim, inner=inner, part=part)]
    return found


def owners_by(rules: frozenset[OwnerRule], shape: Sequence[int], num: int, sizes: Sequence[int] = ()) -> Tensor | None:
    """Owner of each entry, ready to be broadcast to ``shape``; None where the rules do not fit or disagree."""
    if num == 1:
        return torch.zeros([1] * len(shape), dtype=torch.long)
    found: tuple[int, Tensor] | None = None
    for rule in rules:
        owners = rule.owners(shape, num, sizes)
        if owners is None or (found is not None and (found[0] != rule.dim or not torch.equal(found[1], owners))):
            return None
        found = rule.dim, owners
    if found is None:
        return None
    return found[1].view([-1 if dim == found[0] else 1 for dim in range(len(shape))])


def replacement_masks(num: int) -> Tensor:
    """Groups of samples to replace, such that what moves with several samples cannot look like another's.

    Every sample is in exactly half of the groups, and no two in the same ones (Sperner: no set of such
    groups holds another, so a union of two samples' groups is nobody's).

    Returns:
        ``(m, num)`` of bool with ``m`` about ``log2(num)``; for one sample no groups.
    """
    if num < 2:
        return torch.zeros(0, num, dtype=torch.bool)
    size = next(m for m in range(2, 63) if math.comb(m, m // 2) >= num)
    masks = torch.zeros(size, num, dtype=torch.bool)
    for sample, groups in enumerate(islice(combinations(range(size), size // 2), num)):
        masks[list(groups), sample] = True
    return masks


def codes_of(masks: Tensor) -> Tensor:
    """The groups that each sample is in, as bits ``(num,)``."""
    return (masks.long() << torch.arange(len(masks))[:, None]).sum(0)


def consistent_rules(seen: Tensor, codes: Tensor, sizes: Sequence[int] = ()) -> frozenset[OwnerRule]:
    """The rules that agree with every entry that moved.

    Args:
        seen: For each entry the groups, as bits, whose replacement moved it; 0 where nothing did.
        codes: :func:`codes_of`.
        sizes: How many samples are of each of several loaders.
    """
    found = set()
    for rule in candidate_rules(seen.shape, len(codes), sizes):
        owners = owners_by(frozenset([rule]), seen.shape, len(codes), sizes)
        if owners is not None and bool(((seen == 0) | (seen == codes[owners])).all()):
            found.add(rule)
    return frozenset(found)


@dataclass(frozen=True)
class Picked(OwnerRule):
    """The owners that a pick gave: ``rows[mask]`` of a dimension whose owners a rule gives, or packed sequences.

    Attributes:
        number: The how manieth pick of the step it was.
    """

    number: int = 0

    def owners(self, shape: Any, num: int, sizes: Sequence[int] = ()) -> Tensor | None:
        """None: no shape tells them; what was picked does (:mod:`~lightning_sgdclean.losses.own_rows`)."""
        return None


def owners_picked(shape: Any, picks: Any, num: int) -> Iterator[tuple[OwnerRule, Tensor]]:
    """Owners ``(n,)`` of the rows that indices or a mask pick out of a shape, by the rule of the dimension's owners."""
    given = picks if isinstance(picks, tuple) else (picks,)
    if not all(isinstance(pick, Tensor) and pick.ndim for pick in given):
        return
    reach = sum(pick.ndim if pick.dtype is torch.bool else 1 for pick in given)
    index = tuple(pick.detach().cpu() for pick in given)
    is_mask = all(pick.dtype is torch.bool for pick in given)
    if reach > len(shape):
        return
    for dim, length in enumerate(shape[:reach]):
        for rule in (OwnerRule(dim, outer=1), OwnerRule(dim, inner=1)):
            if length == 0 or length % num:
                continue
            owners = owners_by(frozenset([rule]), shape, num)
            assert owners is not None
            owners = owners.view([-1 if d == dim else 1 for d in range(reach)]).expand(*shape[:reach])[index]
            # Indices may sort: rows in another order than the batch's are swapped, not picked.
            if owners.ndim == 1 and (is_mask or bool((owners.diff() >= 0).all())):
                yield rule, owners
