# SPDX-License-Identifier: Apache-2.0
"""Prove that the loss's rows belong to the ids that were drawn: samples are replaced before they are collated."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from lightning_sgdclean.base.errors import ReplayMismatchError, SampleIdError
from lightning_sgdclean.base.options import SampleId
from lightning_sgdclean.base.randomness import set_random_state
from lightning_sgdclean.data.batches import of_one_shape
from lightning_sgdclean.data.fetching import fetched_variants, moved_positions
from lightning_sgdclean.data.fingerprints import batch_digest
from lightning_sgdclean.replay.walk import Walk
from lightning_sgdclean.trajectory.records import MicroBatch, Step

_NOT_PROVED = "Whether the collate function keeps the samples in their order could not be found out."
_BY_CHANCE = 1e-6  # that samples which are sorted had been drawn in that order, in all batches probed


def prove_ids(
    walk: Walk,
    steps: list[Step],
    loader_of: Callable[[MicroBatch], Any],
    prepare: Callable[[Any], Any],
) -> list[str]:
    """Probe a few batches of the window, more of them the smaller they are.

    Args:
        walk: What the window will be walked with; its split is proved on the window's first batch.
        steps: The window.
        loader_of: The loader that a batch came from.
        prepare: Makes a loader's batch what ``training_step`` gets.

    Returns:
        Why it could not be found out, if it could not.

    Raises:
        LossSplitError: If rows move with other ids than theirs.
        ReplayMismatchError: If the samples cannot be fetched again and were not kept.
    """
    assert walk.split is not None
    several = ((step, i) for step in steps for i, micro in enumerate(step.micro) if len(micro.ids) > 1)
    first, number = next(several, (steps[0], 0))  # a batch of one sample shows no order
    micro = replace(first.micro[number], random=walk.random_of(first, number))
    walk.split.prove(micro, walk.batch_of(first, number))
    complaints: dict[str, None] = {}
    for step in _probed(steps):
        before = replace(step.micro[0], random=walk.random_of(step, 0))
        # Without positions nothing can be fetched; ids that were read from the batch are those of its rows.
        if not isinstance(before.positions, list) or before.positions != before.ids:
            continue
        complaint = _prove(walk, before, _foreign(before.positions, steps), loader_of(before), prepare)
        complaints |= {complaint: None} if complaint else {}
    return list(complaints)


def _prove(
    walk: Walk, before: MicroBatch, others: list[SampleId], loader: Any, prepare: Callable[[Any], Any]
) -> str | None:
    assert walk.split is not None and isinstance(before.positions, list)  # noqa: PT018
    try:
        variant = fetched_variants(
            loader,
            before.positions,
            others,
            prepare,
            reseed=lambda: set_random_state(before.random, walk.surroundings.device),
        )
    except ReplayMismatchError as error:
        if before.batch is None:
            raise
        return f"{_NOT_PROVED} {error}"
    none = torch.zeros(len(before.ids), dtype=torch.bool)
    if not torch.equal(*(batch_digest(variant(none), len(none)) for _ in range(2))):
        return f"{_NOT_PROVED} Collated twice from the same random state, the same samples give different batches."
    walk.split.prove_ids(before, variant(none), of_one_shape(variant, len(none)))
    return None


def _probed(steps: list[Step]) -> list[Step]:
    """Steps spread over the window, so many that sorted batches are hardly in their old order in all of them."""
    num = max(len(step.micro[0].ids) for step in steps)
    wanted = math.ceil(-math.log(_BY_CHANCE) / math.lgamma(num + 1)) if num > 1 else 1
    return steps[:: max(1, len(steps) // wanted)][:wanted]


def _foreign(positions: list[SampleId], steps: list[Step]) -> list[SampleId]:
    """What to replace each sample by: its neighbour, or for a batch of one, a sample of another batch."""
    if len(positions) > 1:
        return [*positions[-1:], *positions[:-1]]
    drawn = (other.positions for step in steps for other in step.micro)
    return next((other for other in drawn if isinstance(other, list) and other != positions), positions)[:1]


def check_positions(steps: list[Step], loader_of: Callable[[MicroBatch], Any]) -> None:
    """Where loaders were made anew: is a position still the same sample?

    Raises:
        SampleIdError: If it is not, so that two samples would share an influence.
    """
    first: Any = None
    seen: set[int] = set()
    for micro in (micro for step in steps for micro in step.micro):
        if not isinstance(micro.positions, list) or micro.ids != micro.positions or micro.loader in seen:
            continue
        seen.add(micro.loader)
        loader = loader_of(micro)
        first = loader if first is None else first
        moved = moved_positions(first, loader, micro.positions)
        if moved:
            raise SampleIdError(
                f"After the training loader was made anew (epoch {micro.epoch}), position {moved[0]} of its dataset "
                "holds another sample than before, so positions are no names. "
                "Give sample_ids=, a callable from the batch to its samples' ids."
            )
