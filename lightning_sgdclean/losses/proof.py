# SPDX-License-Identifier: Apache-2.0
"""Prove on a batch which part of the loss belongs to which sample.

Sums cannot tell swapped rows apart, so samples are replaced, group by group: a row that moves with just the groups of
one sample is that sample's. What is left of the gradient without all rows must not depend on the samples.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_sgdclean.base.errors import WEIGH_THEM, LossSplitError, ReplayMismatchError
from lightning_sgdclean.data.batches import Variant
from lightning_sgdclean.losses.kernels import gradient, length_of
from lightning_sgdclean.losses.loss_functions import (
    OwnerRule,
    candidate_rules,
    codes_of,
    consistent_rules,
    owners_by,
    replacement_masks,
)
from lightning_sgdclean.losses.weighting import Evaluated, LossCall, RowOwners, SplitPlan


class UnsplitRestError(LossSplitError):
    """What torch's own losses leave of a loss depends on the samples, too."""


class Probe:
    """A training loss at parameters where samples do differ.

    Args:
        evaluate: ``(batch, plan, weights)`` -> the loss with its graph; deterministic, no sample feeling another.
        variant: Mask ``(B,)`` -> the batch with the marked samples replaced.
        num: ``B``.
        params: The trained parameters.
        tolerance: Relative difference that counts as none.
        sizes: See :class:`~lightning_sgdclean.losses.weighting.SampleWeights`.

    Attributes:
        fixed: Samples that are never replaced, ``(B,)``: those without which the losses have other shapes, as
            the longest of a batch that ``training_step`` cuts to its longest. Found while asking.
    """

    def __init__(
        self,
        evaluate: Callable[[Any, SplitPlan | None, Tensor], Evaluated],
        variant: Variant,
        num: int,
        params: list[Any],
        tolerance: float,
        sizes: Sequence[int] = (),
    ) -> None:
        self._evaluate, self._variant, self.sizes = evaluate, variant, sizes
        self.num, self.params, self.tolerance = num, params, tolerance
        self.fixed = torch.zeros(num, dtype=torch.bool)

    def ask(self, replaced: Tensor | None = None, plan: SplitPlan | None = None, weight: float = 1.0) -> Evaluated:
        """Evaluate with these samples replaced and all weights alike.

        Raises:
            LossSplitError: If ``training_step`` cannot do with such a batch.
        """
        mask = torch.zeros(self.num, dtype=torch.bool) if replaced is None else replaced
        dtype = torch.float64 if self.params[0].dtype is torch.float64 else torch.float32
        weights = torch.full((self.num,), weight, dtype=dtype, device=self.params[0].device, requires_grad=True)
        try:
            return self._evaluate(self._variant(mask), plan, weights)
        except LossSplitError:
            raise
        except Exception as error:  # theirs: of any kind
            if not bool(mask.any()):
                raise
            raise LossSplitError(
                f"training_step failed on a batch in which some samples were replaced by others, which was to show "
                f"the owner of each row of the loss: {type(error).__name__}: {error}."
            ) from error

    def check_repeatable(self) -> None:
        """The same batch, from the same random state: the same loss?

        Raises:
            ReplayMismatchError: If not, since then no step can be run again.
        """
        first, second = (float(self.ask().loss.detach()) for _ in range(2))
        if math.isfinite(first) and not math.isclose(first, second, rel_tol=10 * self.tolerance):
            raise ReplayMismatchError(
                f"The training loss of a batch, computed twice from one random state, is {first!r} and {second!r}. "
                "Likely causes: randomness that is not torch's, NumPy's or Python's, such as a torch.Generator of the "
                "module's own, or state that training_step keeps outside the module. Use the global generators, or "
                "keep the state in attributes of the module."
            )

    def ask_alike(self, replaced: Tensor, base: Evaluated, plan: SplitPlan | None = None) -> tuple[Tensor, Evaluated]:
        """Evaluate with as many of these samples replaced as leave the losses' shapes what they are in ``base``.

        Returns:
            Which were replaced, and what came of it.

        Raises:
            LossSplitError: If the shapes are others whichever sample is replaced.
        """
        mask = replaced & ~self.fixed
        found = self._alike(mask, base, plan)
        for sample in [] if found is not None else mask.nonzero().flatten().tolist():
            alone = torch.zeros_like(mask)
            alone[sample] = True
            if self._alike(alone, base, plan) is None:
                self.fixed[sample], mask[sample] = True, False
        found = found or self._alike(mask, base, plan)
        for sample in [] if found is not None else mask.nonzero().flatten().tolist():  # several longest, all replaced
            self.fixed[sample], mask[sample] = True, False
            found = self._alike(mask, base, plan)
            if found is not None:
                break
        if found is None or bool(self.fixed.all()):
            raise LossSplitError(self._why_unlike(replaced, base, plan))
        return mask, found

    def _alike(self, mask: Tensor, base: Evaluated, plan: SplitPlan | None) -> Evaluated | None:
        try:
            found = self.ask(mask, plan)
        except LossSplitError:
            return None
        return found if _shapes(found) == _shapes(base) else None

    def _why_unlike(self, replaced: Tensor, base: Evaluated, plan: SplitPlan | None) -> str:
        other = self.ask(replaced, plan)
        pairs = zip(base.calls, other.calls, strict=False)
        unlike = next(((one, two) for one, two in pairs if one.rows.shape != two.rows.shape), None)
        what = f"{len(base.calls)} loss calls on the batch, {len(other.calls)} with samples replaced by others."
        if unlike is not None:
            what = (
                f"{unlike[0]}, and {tuple(unlike[1].rows.shape)} with some of them replaced by others. Rows picked "
                "by a mask or by positions are followed where indexing picks them; ignore_index always is."
            )
        return f"Which losses are computed depends on the samples: {what}"


def _shapes(evaluated: Evaluated) -> list[tuple[Any, ...]]:
    return [term.likeness for term in evaluated.calls]


def without_graph(evaluated: Evaluated) -> Evaluated:
    """The same, for comparison only; its graph can go."""
    calls = [replace(term, entering=term.entering.detach()) for term in evaluated.calls]
    return Evaluated(evaluated.loss.detach(), [], calls)


def moved(rows: Tensor, before: Tensor, tolerance: float) -> Tensor:
    """Which entries differ by more than rounding, on the CPU."""
    scale = float(before.nan_to_num(0, 0, 0).abs().max()) if before.numel() else 0.0
    same = torch.isclose(rows, before, rtol=0, atol=tolerance * max(scale, 1e-30), equal_nan=True)
    return (~same).cpu()


def prove_calls(probe: Probe) -> SplitPlan:
    """Find the owner of every row of every loss call, and prove that nothing else depends on the samples.

    Raises:
        LossSplitError: If a row moves with several samples, if no rule gives the rows' owners, if rows of different
            samples are reduced together other than by a sum, or if the rest of the gradient depends on the samples.
    """
    base = without_graph(probe.ask())
    if probe.num == 1:  # there is no other sample to tell a penalty by
        rules = [frozenset([OwnerRule(0, outer=1)])] * len(base.calls)
    else:
        rules = [rules_of(term, seen, probe) for term, seen in zip(base.calls, _seen(probe, base), strict=True)]
    plan = tuple(RowOwners(term.call, found) for term, found in zip(base.calls, rules, strict=True))
    plan = _with_linearity(probe.ask(), plan, probe.sizes)
    prove_rest(probe, plan)
    if not any(call.rules for call in plan):
        raise UnsplitRestError(
            "No part of the training loss was found to depend on a sample: nothing moved when samples were replaced "
            "by others of the batch, in tensors whose first or second dimension it is and in lists of as many entries. "
        )
    return plan


def _seen(probe: Probe, base: Evaluated) -> list[Tensor]:
    """For every row of every call, the groups of samples that moved it, as bits."""
    fixed = None
    while fixed is None or not torch.equal(fixed, probe.fixed):  # what is fixed must be so in all groups
        fixed = probe.fixed.clone()
        found = [torch.zeros(term.rows.shape, dtype=torch.long) for term in base.calls]
        for number, mask in enumerate(replacement_masks(probe.num)):
            _, other = probe.ask_alike(mask, base)
            for bits, term, then in zip(found, other.calls, base.calls, strict=True):
                bits.bitwise_or_(moved(term.rows, then.rows, probe.tolerance).long() << number)
            del other  # its graph is as large as a training step's; one at a time
    return found


def rules_of(term: LossCall, seen: Tensor, probe: Probe) -> frozenset[OwnerRule]:
    """The rules that agree with the groups of samples, as bits, that moved each row; none if nothing did."""
    if not bool(seen.any()):
        return frozenset()
    codes = codes_of(replacement_masks(probe.num))
    foreign = (seen != 0) & ~torch.isin(seen, codes)
    if bool(foreign.any()):
        tied = (codes & ~seen[foreign][0] == 0).nonzero().flatten().tolist()
        among = f" (among them, by position, {tied[:3]})" if tied else ""
        raise LossSplitError(
            f"A row of the loss depends on several samples of the batch{among}: {term}, and rows mix samples, as mixup "
            f"or in-batch negatives do. {WEIGH_THEM} If a row is to count as the loss of one sample, say which:"
        )
    rules = consistent_rules(seen, codes, probe.sizes)
    if not rules:
        raise LossSplitError(_no_rule(term, seen, codes, probe))
    return rules


def _no_rule(term: LossCall, seen: Tensor, codes: Tensor, probe: Probe) -> str:
    if not candidate_rules(seen.shape, probe.num, probe.sizes):
        return f"{term}, which is no multiple of {probe.num}: the rows' owners cannot be told on other batches."
    index = tuple(int(i) for i in (seen != 0).nonzero()[0])
    owner = int((codes == seen[index]).nonzero()[0])
    return (
        f"Row {index[0]} of the loss depends on another sample than its place says: {term}, and that row is sample "
        f"{owner}'s; rows are swapped (sorted by length?). Keep the batch's order up to the loss."
    )


def check_ids(probe: Probe, plan: SplitPlan) -> None:
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
        for term, then in zip(other.calls, base.calls, strict=probe.num > 1):
            moving = moved(term.sums(term.rows), then.sums(then.rows), probe.tolerance)
            if bool((moving & ~mask).any()):
                wrong = int((moving & ~mask).nonzero()[0])
                raise LossSplitError(
                    f"Row {wrong} of the loss depends on another sample than number {wrong} of those drawn: "
                    "collating swapped samples (sorted by length?), or put one's data into another's row. Give "
                    f"sample_ids=, a callable from a batch to the ids of its rows."
                )
            if probe.num == 1 and term.owners is not None and not bool(moving.any()):
                raise LossSplitError(
                    f"{term}, which did not move with it: a penalty, it seems, which batches of one sample cannot tell "
                    f"apart from the sample's loss. Train on batches of two or more."
                )


def rest_of(evaluated: Evaluated) -> tuple[float, float]:
    """What of a loss is left beside its samples' parts, and how much of it may be rounding."""
    calls = [term for term in evaluated.calls if term.owners is not None and term.entering.requires_grad]
    pulls = gradient([evaluated.loss], [term.entering for term in calls], retain_graph=True) if calls else []
    products = [(pull * term.entering.detach()).double() for pull, term in zip(pulls, calls, strict=True)]
    loss = float(evaluated.loss.detach())
    size = abs(loss) + sum(float(product.abs().sum()) for product in products)
    dtype = evaluated.loss.dtype if evaluated.loss.dtype.is_floating_point else torch.float32
    return loss - sum(float(product.sum()) for product in products), 1e3 * torch.finfo(dtype).eps * size


def _with_linearity(base: Evaluated, plan: SplitPlan, sizes: Sequence[int]) -> SplitPlan:
    """Note which calls the loss is not linear in; their rows must not meet those of other samples."""
    entering = [term.entering for term in base.calls]
    pulls = _pulls(base.loss, entering)
    source = torch.Generator().manual_seed(0)
    anywhere = [torch.rand(rows.shape, generator=source).to(rows) for rows in entering]
    bent = [bool((found != 0).any()) for found in _interactions(pulls, entering, anywhere)]
    if not any(bent):
        return plan
    owners = [owners_by(c.rules, t.rows.shape, t.num, sizes) for c, t in zip(plan, base.calls, strict=True)]
    for mask in replacement_masks(base.calls[0].num):
        inside = [
            torch.zeros_like(rows, dtype=torch.bool) if own is None else mask[own].to(rows.device).expand(rows.shape)
            for rows, own in zip(entering, owners, strict=True)
        ]
        found = _interactions(pulls, entering, [part * way for part, way in zip(inside, anywhere, strict=True)])
        for reach, part, own, term in zip(found, inside, owners, base.calls, strict=True):
            if own is not None and bool((reach[~part] != 0).any()):
                raise LossSplitError(
                    f"{term}, and they are reduced together other than by a sum, so that how much one sample's "
                    "loss counts depends on the others' (a root, a logarithm or a softmax over the batch). "
                    f"{WEIGH_THEM} If they are to count one by one:"
                )
    return tuple(
        RowOwners(call.call, call.rules, call.is_linear and not is_bent)
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


def prove_rest(probe: Probe, plan: SplitPlan) -> None:
    """What is left of the gradient without the samples' rows must not depend on the samples."""
    some = torch.arange(probe.num) % 2 == 0
    base = probe.ask(plan=plan)
    masks = [probe.ask_alike(mask, base, plan)[0] for mask in (some, ~some)] if probe.num > 1 else []
    if not rest_depends_on_samples(probe, plan, masks):
        return
    if probe.num == 1:
        raise UnsplitRestError(
            "The loss of a batch of one sample has a part that was not split, and whether it depends on the "
            "sample cannot be told from one. Train on batches of two or more."
        )
    calls = ", ".join(call.name for call in plan if call.rules) or "none"
    raise UnsplitRestError(f"A part of the loss depends on the samples but was not split by sample (split: {calls}).")


def rest_depends_on_samples(probe: Probe, plan: SplitPlan, masks: list[Tensor]) -> bool:
    """Whether the gradient without the samples' rows changes as these samples are replaced; in a batch of one, is."""
    whole = length_of(gradient([probe.ask(plan=plan).loss], probe.params))
    rest, *others = (_gradient_of_rest(probe, plan, mask) for mask in [None, *masks])
    scale = probe.tolerance * max(whole, length_of(rest))
    if probe.num == 1:
        return not length_of(rest) <= scale
    return any(not length_of([a - b for a, b in zip(rest, other, strict=True)]) <= scale for other in others)


def _gradient_of_rest(probe: Probe, plan: SplitPlan, mask: Tensor | None) -> list[Tensor]:
    """The gradient with all rows weighted zero, or what those at one half and at one say that it would be."""

    def at(weight: float) -> list[Tensor]:
        return gradient([probe.ask(mask, plan, weight=weight).loss], probe.params)

    try:
        return at(0.0)
    except Exception:  # theirs: training never saw a loss of zero, and code may divide by it
        return [2 * half - one for half, one in zip(at(0.5), at(1.0), strict=True)]
