# SPDX-License-Identifier: Apache-2.0
"""Prove that the loss's rows belong to the ids that were drawn: samples are replaced before they are collated."""

import math
from collections.abc import Callable
from typing import Any

import torch

from lightning_sgdclean.base.errors import ReplayMismatchError
from lightning_sgdclean.base.options import SampleId
from lightning_sgdclean.base.randomness import set_random_state
from lightning_sgdclean.data.batches import of_one_shape
from lightning_sgdclean.data.fetching import fetched_variants
from lightning_sgdclean.data.fingerprints import batch_digest
from lightning_sgdclean.losses.verified import VerifiedSplit
from lightning_sgdclean.replay.replay import Replay
from lightning_sgdclean.trajectory.records import MicroBatch, Step

_NOT_PROVED = "Whether the collate function keeps the samples in their order could not be found out."
_BY_CHANCE = 1e-6  # that samples which are sorted had been drawn in that order, in all batches probed


def prove_ids(
    replay: Replay,
    steps: list[Step],
    loader_of: Callable[[MicroBatch], Any],
    prepare: Callable[[Any], Any],
) -> list[str]:
    """Probe a few batches of the window, more of them the smaller they are.

    Args:
        replay: Runs the steps again; its split is proved on the window's first batch, unless the fit proved it.
        steps: The window.
        loader_of: The loader that a batch came from.
        prepare: Makes a loader's batch what ``training_step`` gets.

    Returns:
        Why it could not be found out, if it could not.

    Raises:
        LossSplitError: If rows move with other ids than theirs.
        ReplayMismatchError: If the samples cannot be fetched again and were not kept.
    """
    split = replay.split
    if split is None:  # the user says which loss is whose
        return []
    if not split.is_proved:
        several = ((step, i) for step in steps for i, micro in enumerate(step.micro) if len(micro.ids) > 1)
        split.prove(replay.batch(*next(several, (steps[0], 0))))  # a batch of one sample shows no order
    complaints: dict[str, None] = {}
    for step in _probed(steps):
        before = replay.micro(step, 0)
        # Without positions nothing can be fetched; ids that were read from the batch are those of its rows.
        if not isinstance(before.positions, list) or before.positions != before.ids:
            continue
        complaint = _prove(replay, split, before, _foreign(before.positions, steps), loader_of(before), prepare)
        complaints |= {complaint: None} if complaint else {}
    return list(complaints)


def _prove(
    replay: Replay,
    split: VerifiedSplit,
    before: MicroBatch,
    others: list[SampleId],
    loader: Any,
    prepare: Callable[[Any], Any],
) -> str | None:
    assert isinstance(before.positions, list)
    device = replay.surroundings.device
    try:
        variant = fetched_variants(
            loader, before.positions, others, prepare, reseed=lambda: set_random_state(before.random, device)
        )
    except ReplayMismatchError as error:
        if before.batch is None:
            raise
        return f"{_NOT_PROVED} {error}"
    none = torch.zeros(len(before.ids), dtype=torch.bool)
    if not torch.equal(*(batch_digest(variant(none), len(none)) for _ in range(2))):
        return f"{_NOT_PROVED} Collated twice from the same random state, the same samples give different batches."
    split.prove_ids(replay.batch_of(before, variant(none)), of_one_shape(variant, len(none)))
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
