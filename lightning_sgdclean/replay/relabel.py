# SPDX-License-Identifier: Apache-2.0
"""What if a sample had the label that the final model predicts: the labels to ask for, and whether they can be."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_sgdclean.adjoint.backward import load_state
from lightning_sgdclean.base.randomness import set_random_state
from lightning_sgdclean.data.batches import cloned
from lightning_sgdclean.losses.evaluate import Evaluated, training_loss
from lightning_sgdclean.losses.other_labels import OtherLabels, relabelled
from lightning_sgdclean.losses.weighting import Plan, unit_weights
from lightning_sgdclean.replay.inspection import Seen, inspect_samples
from lightning_sgdclean.replay.open import OpenedRun
from lightning_sgdclean.trajectory.records import SampleId, Step

_WHERE = "columns= has 'relabel', which stays empty: "


def predicted_labels(
    this: OpenedRun, ids: Iterable[SampleId]
) -> tuple[Callable[[list[SampleId]], Tensor] | None, list[str]]:
    """The classes that the final model predicts for the samples, for the walk to change their labels to.

    Returns:
        From ids to classes ``(B,)``, -1 where none is known; None if labels cannot be changed; and why.
    """
    found = inspect_samples(this, ids)
    classes = {name: seen.prediction for name, seen in found.seen.items() if isinstance(seen.prediction, int)}
    if not classes:
        return None, [*found.complaints, f"{_WHERE}the loss has not one class a sample."]
    device = this.surroundings.device

    def labels_of(names: list[SampleId]) -> Tensor:
        return torch.tensor([classes.get(name, -1) for name in names], device=device)

    problem = _problem(this, found.seen)
    return (labels_of, found.complaints) if problem is None else (None, [*found.complaints, f"{_WHERE}{problem}"])


def _problem(this: OpenedRun, seen: dict[SampleId, Seen]) -> str | None:
    """Change the labels of a batch in its loss calls, and in the batch itself: do they come to the same losses?"""
    walk = this.walk
    if walk.split is None:
        return "with sample_losses= it is not seen how a label enters a loss."
    step, labels = _telling(this.steps, seen)
    micro = replace(step.micro[0], random=walk.random_of(step, 0))
    content = walk.batch_of(step, 0)
    weights = unit_weights(len(micro.ids), list(walk.params.values()))
    others = OtherLabels(labels.to(weights.device), torch.zeros_like(weights))

    def evaluate(batch: Any, plan: Plan | None, others: OtherLabels | None) -> Evaluated:
        load_state(walk.module, walk.params, this.states.state(step.index))
        set_random_state(micro.random, this.surroundings.device)
        this.surroundings.set_clock(micro.epoch, micro.global_step)
        loss = training_loss(
            walk.module, cloned(batch), micro.batch_idx, weights, this.surroundings, plan=plan, others=others
        )
        walk.restore_attributes()
        return loss

    plan, as_is = walk.split.plan_for(lambda plan: evaluate(content, plan, others), micro, content)
    changed = relabelled(content, others)
    if not others.is_whole or changed is None:
        return "the loss is not made of one class a sample alone, as it stands in the batch."
    expected = [others.rows.get(number, term.rows) for number, term in enumerate(as_is.terms)]
    found = [term.rows for term in evaluate(changed, plan, None).terms]
    if len(found) != len(expected) or not all(map(_is_close, found, expected)):
        return "the label does more in training_step than to be the target of its losses."
    return None


def _telling(steps: list[Step], seen: dict[SampleId, Seen]) -> tuple[Step, Tensor]:
    """A late step whose batch has several labels, and for each sample that of its neighbour."""
    updates = [step for step in reversed(steps) if step.is_update]
    several = (step for step in updates if len({seen[name].label for name in step.micro[0].ids}) > 1)
    step = next(several, updates[0])
    labels = [seen[name].label for name in step.micro[0].ids]
    known = [label if isinstance(label, int) else -1 for label in labels]
    return step, torch.tensor(known).roll(1)


def _is_close(one: Tensor, other: Tensor) -> bool:
    slack = torch.finfo(one.dtype).eps * 100
    return one.shape == other.shape and torch.allclose(one, other, rtol=slack, atol=slack)
