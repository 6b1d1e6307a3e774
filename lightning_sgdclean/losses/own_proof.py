# SPDX-License-Identifier: Apache-2.0
"""Prove on a batch whose the rows are that were found in a loss's graph; where they are nobody's, look below them."""

from dataclasses import replace

import torch
from torch import Tensor

from lightning_sgdclean.base.errors import LossSplitError
from lightning_sgdclean.losses.kernels import gradient, length_of
from lightning_sgdclean.losses.loss_functions import OwnerRule, Picked, replacement_masks
from lightning_sgdclean.losses.proof import (
    Probe,
    UnsplitRestError,
    moved,
    prove_calls,
    prove_rest,
    rules_of,
    without_graph,
)
from lightning_sgdclean.losses.weighting import Evaluated, LossCall, Part, RowOwners, SplitPlan

_NOTHING = ("", "", 0)


def prove_split(probe: Probe) -> SplitPlan:
    """Split a loss by torch's own losses; where these are not the whole of it, by the rows in its graph.

    Raises:
        LossSplitError: If neither can be proved.
    """
    try:
        return prove_calls(probe)
    except LossSplitError as error:
        by_torch = error
    probe.fixed.zero_()
    try:
        return prove_own_rows(probe)
    except LossSplitError as error:
        if isinstance(by_torch, UnsplitRestError):
            raise
        raise by_torch from error


def prove_own_rows(probe: Probe) -> SplitPlan:
    """Find the rows of a loss in its graph and the owner of each, and prove that nothing else depends on the samples.

    Raises:
        LossSplitError: If a part of the loss depends on several samples and cannot be taken apart, since it is no sum;
            if no rule gives its rows' owners; or if samples move by what others' losses are multiplied.
    """
    opened = frozenset[str]()
    while True:
        plan: SplitPlan = (RowOwners(_NOTHING, frozenset(), opened=opened),)
        parts, rules, refused = _looked_into(probe, plan)
        if not refused:
            break
        wanted = dict(refused)
        for opening, error in wanted.items():
            if opening is None or opening in opened:
                raise error
        opened |= {opening for opening in wanted if opening is not None}
    plan = tuple(RowOwners(part.call, found, opened=opened) for part, found in zip(parts, rules, strict=True))
    if not any(rules):
        raise LossSplitError("No part of the training loss was found to depend on a sample.")
    _prove_factors(probe, plan)
    prove_rest(probe, plan)
    return plan


_Refused = list[tuple[str | None, LossSplitError]]


def _looked_into(probe: Probe, plan: SplitPlan) -> tuple[list[Part], list[frozenset[OwnerRule]], _Refused]:
    """The parts of a loss, whose they are, and what else to look below, with why."""
    base = without_graph(probe.ask(plan=plan))
    parts = _parts(base)
    if probe.num == 1:
        if len(parts) > 1:
            raise LossSplitError(
                f"The loss of a batch of one sample is a sum of {len(parts)} parts, and which of them depend on the "
                "sample cannot be told from one. Train on batches of two or more."
            )
        return parts, [frozenset([OwnerRule(0, outer=1)])], []
    rules, refused = list[frozenset[OwnerRule]](), _Refused()
    for part, seen in zip(parts, _seen(probe, base, plan), strict=True):
        try:
            rules.append(seen.rules(part, probe))
        except LossSplitError as error:
            refused.append((part.openings[0] if part.openings else None, error))
    return parts, rules, refused


def _parts(evaluated: Evaluated) -> list[Part]:
    return [term for term in evaluated.calls if isinstance(term, Part)]


class _Seen:
    """What of a part moved as samples were replaced.

    Attributes:
        bits: For each entry the groups that moved it, as bits; None where its shape changed.
        picks: The picks whose samples' rows moved with those samples only.
        moved: Those of them whose rows moved at all.
    """

    def __init__(self, part: Part) -> None:
        self.bits: Tensor | None = torch.zeros(part.rows.shape, dtype=torch.long)
        self.picks, self.moved = set(part.picked), set[Picked]()

    def compare(self, number: int, mask: Tensor, part: Part, base: Part, tolerance: float) -> None:
        """Note what moved as these samples were replaced, the ``number``-th group."""
        if self.bits is not None and part.rows.shape == base.rows.shape:
            self.bits |= moved(part.rows, base.rows, tolerance).long() << number
        else:
            self.bits = None
        for pick in list(self.picks):
            if pick not in part.picked:
                self.picks.discard(pick)
                continue
            one, other = (_sums(each, pick) for each in (part, base))
            moving = moved(one, other, tolerance)
            if bool((moving & ~mask).any()):
                self.picks.discard(pick)
            elif bool(moving.any()):
                self.moved.add(pick)

    def rules(self, part: Part, probe: Probe) -> frozenset[OwnerRule]:
        """Whose the part's rows are; none if they are no sample's."""
        picks = frozenset(self.picks & self.moved)
        if self.bits is None:
            if picks:
                return picks
            raise LossSplitError(
                f"How many rows there are depends on the samples, and no mask or index that was seen says whose each "
                f"is: {part}."
            )
        if part.is_factor and bool(self.bits.any()):
            raise LossSplitError(f"Losses are multiplied with, or divided by, what depends on the samples: {part}.")
        try:
            found = rules_of(part, self.bits, probe)
        except LossSplitError:
            if not picks:
                raise
            return picks
        if found and self._may_hold_a_penalty(part, self.bits != 0):
            raise LossSplitError(
                f"Some entries move with no sample. They may be a penalty, or those of samples that are alike: {part}."
            )
        if not found and part.needs_owners:
            raise LossSplitError(f"What is added to each row of the loss moves with no sample: {part}.")
        return found

    @staticmethod
    def _may_hold_a_penalty(part: Part, moving: Tensor) -> bool:
        """Whether what did not move may stand where rows of samples stand by chance."""
        if part.joins and not part.members:
            return not bool(moving.all())
        blocks = torch.split(moving, [size for size, _ in part.members]) if part.members else ()
        return any(
            not bool(block.any()) and not is_of_samples
            for block, (_, is_of_samples) in zip(blocks, part.members, strict=True)
        )


def _sums(part: Part, pick: Picked) -> Tensor:
    owners = part.picked[pick].view(-1, *[1] * (part.rows.ndim - 1))
    return replace(part, owners=owners).sums(part.rows)


def _seen(probe: Probe, base: Evaluated, plan: SplitPlan) -> list[_Seen]:
    fixed = None
    while fixed is None or not torch.equal(fixed, probe.fixed):  # what is fixed must be so in all groups
        fixed = probe.fixed.clone()
        found = [_Seen(part) for part in _parts(base)]
        for number, group in enumerate(replacement_masks(probe.num)):
            mask, other = probe.ask_alike(group, base, plan)
            for seen, part, then in zip(found, _parts(other), _parts(base), strict=True):
                seen.compare(number, mask, part, then, probe.tolerance)
            del other  # its graph is as large as a training step's; one at a time
    return found


def _prove_factors(probe: Probe, plan: SplitPlan) -> None:
    """What losses are multiplied with may be learned, but must not have a gradient that follows the samples."""
    base = _factor_gradients(probe.ask(plan=plan), probe)
    some = torch.arange(probe.num) % 2 == 0
    for group in (some, ~some) if base and probe.num > 1 else ():
        _, other = probe.ask_alike(group, probe.ask(plan=plan), plan)
        for one, then in zip(_factor_gradients(other, probe), base, strict=True):
            off = length_of([a - b for a, b in zip(one, then, strict=True)])
            if not off <= probe.tolerance * length_of(then):
                raise LossSplitError(
                    "Losses are multiplied with, or divided by, a number whose gradient depends on the samples."
                )


def _factor_gradients(evaluated: Evaluated, probe: Probe) -> list[list[Tensor]]:
    factors = [part.entering for part in _parts(evaluated) if part.is_factor]
    return [gradient([factor.sum()], probe.params, retain_graph=True) for factor in factors]


def moves_foreign(term: LossCall, then: LossCall, replaced: Tensor, tolerance: float) -> bool:
    """Whether rows moved that do not belong to the samples that were replaced."""
    if term.rows.shape == then.rows.shape and not (isinstance(then, Part) and then.picked):
        inside = torch.zeros(()) if then.owners is None else replaced[then.owners.cpu()]
        return bool((moved(term.rows, then.rows, tolerance) & ~inside.bool()).any())
    if term.owners is None:
        return term.rows.shape != then.rows.shape or bool(moved(term.rows, then.rows, tolerance).any())
    return bool((moved(term.sums(term.rows), then.sums(then.rows), tolerance) & ~replaced).any())
