# SPDX-License-Identifier: Apache-2.0
"""Prove on one batch that the loss splits by sample, and which sample owns which row of it.

Sums cannot tell swapped rows apart, so samples are replaced by others, group by group: a row that moves
with exactly the groups of one sample is that sample's. Then all rows are cut off from the gradient;
what is left of it must not depend on the samples.
"""

import math
from typing import Any

import torch
from torch import Tensor

from lightning_sgdclean.adjoint.curvature import gradient
from lightning_sgdclean.base.errors import LossSplitError
from lightning_sgdclean.losses.evaluate import Evaluated
from lightning_sgdclean.losses.ownership import (
    Layout,
    candidate_layouts,
    codes_of,
    consistent_layouts,
    owners_by,
    replacement_masks,
)
from lightning_sgdclean.losses.probe import Probe, moved, without_graph
from lightning_sgdclean.losses.weighting import CallPlan, Plan, Term


def prove_split(probe: Probe) -> Plan:
    """Find the owner of every row of every loss call, and prove that nothing else depends on the samples.

    Raises:
        LossSplitError: If a row moves with several samples, if no rule gives the rows' owners, if rows of
            different samples are reduced together other than by a sum, or if what is left of the
            gradient besides the rows depends on the samples.
    """
    base = without_graph(probe.ask())
    if probe.num == 1:  # there is no other sample to tell a penalty by
        layouts = [frozenset([Layout(0, outer=1)])] * len(base.terms)
    else:
        layouts = [
            _layouts_of(term, seen, probe.num) for term, seen in zip(base.terms, _seen(probe, base), strict=True)
        ]
    plan = tuple(CallPlan(term.call, found) for term, found in zip(base.terms, layouts, strict=True))
    plan = _with_linearity(probe.ask(), plan)
    _prove_rest(probe, plan)
    if not any(call.layouts for call in plan):
        raise LossSplitError(
            "No part of the training loss was found to depend on a sample: nothing moved when samples were replaced "
            "by others of the batch, in tensors whose first or second dimension it is and in lists of as many entries. "
        )
    return plan


def _seen(probe: Probe, base: Evaluated) -> list[Tensor]:
    """For every row of every call, the groups of samples that moved it, as bits."""
    fixed = None
    while fixed is None or not torch.equal(fixed, probe.fixed):  # what is fixed must be so in all groups
        fixed = probe.fixed.clone()
        found = [torch.zeros(term.rows.shape, dtype=torch.long) for term in base.terms]
        for number, mask in enumerate(replacement_masks(probe.num)):
            _, other = probe.ask_alike(mask, base)
            for bits, term, then in zip(found, other.terms, base.terms, strict=True):
                bits.bitwise_or_(moved(term.rows, then.rows, probe.tolerance).long() << number)
            del other  # its graph is as large as a training step's; one at a time
    return found


def _layouts_of(term: Term, seen: Tensor, num: int) -> frozenset[Any]:
    if not bool(seen.any()):
        return frozenset()
    masks = replacement_masks(num)
    codes = codes_of(masks)
    foreign = (seen != 0) & ~torch.isin(seen, codes)
    if bool(foreign.any()):
        code = int(seen[foreign][0])
        tied = [sample for sample in range(num) if int(codes[sample]) & ~code == 0]
        raise LossSplitError(
            f"A row of the loss depends on several samples of the batch (among them, by position, {tied[:3]}): "
            f"{term}, and rows mix samples, as mixup or in-batch negatives do. A row can only count as the loss of one "
            f"sample. If you mean it to, say which:"
        )
    layouts = consistent_layouts(seen, codes)
    if not layouts:
        raise LossSplitError(_no_rule(term, seen, codes, num))
    return layouts


def _no_rule(term: Term, seen: Tensor, codes: Tensor, num: int) -> str:
    if not candidate_layouts(seen.shape, num):
        return f"{term}, which is no multiple of {num}: the rows' owners cannot be told on other batches."
    index = tuple(int(i) for i in (seen != 0).nonzero()[0])
    owner = int((codes == seen[index]).nonzero()[0])
    return (
        f"Row {index[0]} of the loss depends on another sample than its place says: {term}, and that row is sample "
        f"{owner}'s; rows are swapped (sorted by length?). Keep the batch's order up to the loss."
    )


def check_ids(probe: Probe, plan: Plan) -> None:
    """Check that each sample's rows move with the sample that was drawn in its place, and with no other.

    Args:
        probe: With samples replaced before they are collated; those of other batches, in a batch of one.
        plan: Proved on the batch, after it was collated.

    Raises:
        LossSplitError: If not.
    """
    base = probe.ask(plan=plan)
    for group in replacement_masks(probe.num) if probe.num > 1 else torch.ones(1, 1, dtype=torch.bool):
        if probe.num > 1:
            mask, other = probe.ask_alike(group, base, plan)
        else:
            mask, other = group, probe.ask(group, plan)  # sums need not be of rows of one shape
        for term, then in zip(other.terms, base.terms, strict=probe.num > 1):
            moving = moved(term.sums(term.rows), then.sums(then.rows), probe.tolerance)
            if bool((moving & ~mask).any()):
                wrong = int((moving & ~mask).nonzero()[0])
                raise LossSplitError(
                    f"Row {wrong} of the loss depends on another sample than number {wrong} of those drawn: "
                    "collating swapped samples (sorted by length?), or put one's data into another's row. Give "
                    f"sample_ids=, a callable from a batch to the ids of its rows."
                )
            if probe.num == 1 and not bool(moving.any()):
                raise LossSplitError(
                    f"{term}, which did not move with it: a penalty, it seems, which batches of one sample cannot tell "
                    f"apart from the sample's loss. Train on batches of two or more."
                )


def rest_of(evaluated: Evaluated) -> tuple[float, float]:
    """What of a loss is left beside its samples' parts, and how much of it may be rounding."""
    terms = [term for term in evaluated.terms if term.owners is not None and term.entering.requires_grad]
    pulls = gradient([evaluated.loss], [term.entering for term in terms], retain_graph=True) if terms else []
    products = [(pull * term.entering.detach()).double() for pull, term in zip(pulls, terms, strict=True)]
    loss = float(evaluated.loss.detach())
    size = abs(loss) + sum(float(product.abs().sum()) for product in products)
    dtype = evaluated.loss.dtype if evaluated.loss.dtype.is_floating_point else torch.float32
    return loss - sum(float(product.sum()) for product in products), 1e3 * torch.finfo(dtype).eps * size


def _with_linearity(base: Evaluated, plan: Plan) -> Plan:
    """Note which calls the loss is not linear in; their rows must not meet those of other samples."""
    entering = [term.entering for term in base.terms]
    pulls = _pulls(base.loss, entering)
    source = torch.Generator().manual_seed(0)
    anywhere = [torch.rand(rows.shape, generator=source).to(rows) for rows in entering]
    bent = [bool((found != 0).any()) for found in _interactions(pulls, entering, anywhere)]
    if not any(bent):
        return plan
    owners = [owners_by(call.layouts, term.rows.shape, term.num) for call, term in zip(plan, base.terms, strict=True)]
    for mask in replacement_masks(base.terms[0].num):
        inside = [
            torch.zeros_like(rows, dtype=torch.bool) if own is None else mask[own].to(rows.device).expand(rows.shape)
            for rows, own in zip(entering, owners, strict=True)
        ]
        found = _interactions(pulls, entering, [part * way for part, way in zip(inside, anywhere, strict=True)])
        for reach, part, own, term in zip(found, inside, owners, base.terms, strict=True):
            if own is not None and bool((reach[~part] != 0).any()):
                raise LossSplitError(
                    f"{term}, and they are reduced together other than by a sum, so that how much one sample's "
                    f"loss counts depends on the others' (a root, a logarithm or a softmax over the batch)."
                )
    return tuple(
        CallPlan(call.call, call.layouts, call.is_linear and not is_bent)
        for call, is_bent in zip(plan, bent, strict=True)
    )


def _pulls(loss: Tensor, entering: list[Tensor]) -> list[Tensor]:
    """Derivatives of the loss by the rows that enter it, with their graph."""
    reached = [rows for rows in entering if rows.requires_grad]
    found = iter(gradient([loss], reached, create_graph=True, retain_graph=True) if reached else [])
    return [next(found) if rows.requires_grad else torch.zeros_like(rows) for rows in entering]


def _interactions(pulls: list[Tensor], entering: list[Tensor], directions: list[Tensor]) -> list[Tensor]:
    """Second derivatives of the loss by the rows, along ``directions``."""
    reached = [rows for rows in entering if rows.requires_grad]
    found = iter(gradient(pulls, reached, directions, retain_graph=True) if reached else [])
    return [next(found) if rows.requires_grad else torch.zeros_like(rows) for rows in entering]


def _prove_rest(probe: Probe, plan: Plan) -> None:
    """What is left of the gradient without the samples' rows must not depend on the samples."""
    some = torch.arange(probe.num) % 2 == 0
    base = probe.ask(plan=plan)
    masks = [probe.ask_alike(mask, base, plan)[0] for mask in (some, ~some)] if probe.num > 1 else []
    if not rest_depends_on_samples(probe, plan, masks):
        return
    if probe.num == 1:
        raise LossSplitError(
            "The loss of a batch of one sample has a part that was not split, and whether it depends on the "
            "sample cannot be told from one. Train on batches of two or more."
        )
    calls = ", ".join(call.call[0] for call in plan if call.layouts) or "none"
    raise LossSplitError(
        f"A part of the training loss depends on the samples but was not split by sample (split: {calls}). "
        "Terms written by hand, or compiled by torch.jit, are not seen."
    )


def rest_depends_on_samples(probe: Probe, plan: Plan, masks: list[Tensor]) -> bool:
    """Whether the gradient without the samples' rows changes as these samples are replaced; in a batch of one, is."""
    whole = _length(gradient([probe.ask(plan=plan).loss], probe.params))
    rest, *others = (gradient([probe.ask(mask, plan, weight=0.0).loss], probe.params) for mask in [None, *masks])
    scale = probe.tolerance * max(whole, _length(rest))
    if probe.num == 1:
        return not _length(rest) <= scale
    return any(not _length([a - b for a, b in zip(rest, other, strict=True)]) <= scale for other in others)


def _length(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.detach().double().pow(2).sum()) for tensor in tensors))
