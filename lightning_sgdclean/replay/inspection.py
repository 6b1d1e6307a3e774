# SPDX-License-Identifier: Apache-2.0
"""Samples seen with the weights of the end point: what the columns and the page show."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_sgdclean.base.options import SampleId
from lightning_sgdclean.base.randomness import set_random_state
from lightning_sgdclean.data.datasets import source_of
from lightning_sgdclean.data.fetching import fetch_batch
from lightning_sgdclean.losses.other_labels import LabelledWeights, OtherLabels, relabelled
from lightning_sgdclean.losses.readings import Number, WatchedLosses, plain_numbers, watched_under
from lightning_sgdclean.losses.weighting import Evaluated, SampleWeights, SplitPlan
from lightning_sgdclean.replay.replay import OpenedRun
from lightning_sgdclean.trajectory.records import MicroBatch, Step

SAMPLE_COLUMNS = ("label", "prediction", "loss", "source")
Visit = tuple[Step, int, int]  # step, number of the micro-batch in it, row
_WHY_EMPTY = (
    "labels and predictions are read where a loss of torch has one class or value a sample, losses where the training "
    "loss is linear in what torch's losses give. With weighted_loss= no row of the loss is one sample's."
)


@dataclass(frozen=True)
class Seen:
    """A sample at the run's end point; None wherever something cannot be known.

    Attributes:
        label: Class, or measured value, that the loss held the sample to.
        prediction: Class of the highest score, or value.
        loss: What the training loss of this sample alone is.
    """

    label: Number | None = None
    prediction: Number | None = None
    loss: float | None = None


@dataclass
class Inspection:
    """What was found out about samples.

    Attributes:
        seen: By sample id.
        sources: By sample id, where known; see :func:`lightning_sgdclean.data.datasets.source_of`.
        complaints: Why samples could not be evaluated.
    """

    seen: dict[SampleId, Seen] = field(default_factory=dict)
    sources: dict[SampleId, str] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)


def inspect_samples(this: OpenedRun, ids: Iterable[SampleId]) -> Inspection:
    """Evaluate samples with the weights of the end point, the module in evaluation mode.

    Each is taken as it was last trained on in the window: fetched again, or as its batch was kept. The loss is
    that of ``training_step``, seen call by call, so any module will do. Samples that were never drawn are left out.

    Args:
        this: The run, opened; module and random states are its own to put back.
        ids: Whatever ids are of interest.

    Returns:
        What is known of each, in the order of ``ids``. Whatever the user's code raises is a complaint, not an error.
    """
    visits = _last_visits(this.steps, list(dict.fromkeys(ids)))
    found = Inspection(seen={name: Seen() for name in visits}, sources=_sources(this, visits))
    problems: dict[str, int] = {}
    for batch in _batches(this, visits):
        try:
            found.seen |= _evaluated(this, batch)
        except Exception as error:  # theirs, of any kind, or a loss that cannot be split in evaluation mode
            text = f"{type(error).__name__}: {error}"
            problems[text] = problems.get(text, 0) + len(batch.rows)
    found.complaints = [
        f"Label, prediction and loss of {number} samples are not known: {text}" for text, number in problems.items()
    ]
    return found


def sample_columns(
    this: OpenedRun, ids: list[SampleId], names: Sequence[str]
) -> tuple[dict[str, list[Any]], list[str]]:
    """Columns of the ranking about the samples themselves.

    Args:
        this: The run, opened.
        ids: Samples that were drawn in the window.
        names: Any of :data:`SAMPLE_COLUMNS`; others are passed over.

    Returns:
        Values by column in the order of ``ids``, None where unknown, and why columns have gaps.
    """
    wanted = [name for name in names if name in SAMPLE_COLUMNS]
    if wanted in ([], ["source"]):
        sources = _sources(this, _last_visits(this.steps, ids)) if wanted else {}
        return {name: [sources.get(sample) for sample in ids] for name in wanted}, []
    found = inspect_samples(this, ids)
    columns = {name: [getattr(found.seen[i], name) for i in ids] for name in wanted if name != "source"}
    empty = [name for name, values in columns.items() if all(value is None for value in values)]
    if empty and not found.complaints:
        found.complaints.append(f"No sample has a {' or a '.join(empty)}: {_WHY_EMPTY}")
    columns |= {"source": [found.sources.get(i) for i in ids]} if "source" in wanted else {}
    return {name: columns[name] for name in wanted}, found.complaints


def _last_visits(steps: list[Step], wanted: list[SampleId]) -> dict[SampleId, Visit]:
    among, found = set(wanted), dict[SampleId, Visit]()
    for step in reversed(steps):
        for number, micro in reversed(list(enumerate(step.micro))):
            for row, name in enumerate(micro.ids):
                if name in among and name not in found:
                    found[name] = step, number, row
    return {name: found[name] for name in wanted if name in found}


def _sources(this: OpenedRun, visits: dict[SampleId, Visit]) -> dict[SampleId, str]:
    found: dict[SampleId, str] = {}
    for name, (step, number, _) in visits.items():
        micro = step.micro[number]
        if _are_positions(micro) and isinstance(name, int):
            source = source_of(this.loader_of(micro).dataset, name)
            found |= {name: source} if source is not None else {}
    return found


def _are_positions(micro: MicroBatch) -> bool:
    """Whether the ids are where the samples stand in the dataset, so that any of them can be fetched."""
    return isinstance(micro.positions, list) and micro.positions == micro.ids


@dataclass
class _Batch:
    """Samples to be evaluated together: rows of interest, by sample id, of a batch that is made when needed."""

    step: Step
    number: int
    micro: MicroBatch
    rows: dict[SampleId, int]
    make: Callable[[], Any]


def _batches(this: OpenedRun, visits: dict[SampleId, Visit]) -> Iterator[_Batch]:
    """Samples that can be fetched in batches as large as those of training, the others in the batches they were in."""
    whole: dict[tuple[int, int], _Batch] = {}
    loose: dict[int, list[SampleId]] = {}
    for name, (step, number, row) in visits.items():
        micro = step.micro[number]
        loader = this.loader_of(micro)
        if _is_of(this, micro, loader):
            loose.setdefault(id(loader), []).append(name)
            continue
        batch = _Batch(step, number, micro, {}, partial(this.replay.content_of, step, number))
        whole.setdefault((step.index, number), batch).rows[name] = row
    for names in loose.values():
        yield from _regrouped(this, names, visits[names[0]])
    yield from whole.values()


def _is_of(this: OpenedRun, micro: MicroBatch, loader: Any) -> bool:
    """Whether the batch's samples can be fetched again from this loader, in any company."""
    return micro.batch is None and _are_positions(micro) and this.loader_of(micro) is loader


def _regrouped(this: OpenedRun, names: list[SampleId], visit: Visit) -> Iterator[_Batch]:
    """Batches of these samples, as large as the largest that they may have come from; the last is filled up."""
    loader = this.loader_of(visit[0].micro[visit[1]])
    places = ((step, number) for step in this.steps for number, micro in enumerate(step.micro))
    step, number = max(
        (place for place in places if _is_of(this, place[0].micro[place[1]], loader)),
        key=lambda place: len(place[0].micro[place[1]].ids),
    )
    micro, size = step.micro[number], len(step.micro[number].ids)
    for start in range(0, len(names), size):
        chosen = names[start : start + size]
        others = [name for name in micro.ids if name not in chosen]
        filled = [*chosen, *others, *micro.ids][:size]
        yield _Batch(
            step,
            number,
            replace(micro, ids=filled, positions=filled),
            {name: row for row, name in enumerate(chosen)},
            partial(_fetched, this, loader, filled),
        )


def _fetched(this: OpenedRun, loader: Any, positions: list[SampleId]) -> Any:
    return this.prepare(fetch_batch(loader, positions))


def _evaluated(this: OpenedRun, batch: _Batch) -> dict[SampleId, Seen]:
    """Label, prediction and loss of a batch's rows of interest."""
    replay, last = this.replay, this.steps[-1]
    if replay.weighted_loss is not None:  # no row of the loss is one sample's
        return {}
    random = replay.random_of(batch.step, batch.number)
    set_random_state(random, replay.surroundings.device)
    at_end = replace(batch.micro, random=random, epoch=last.epoch, global_step=last.index)
    recorded = replay.batch_of(at_end, batch.make())
    watched: list[WatchedLosses] = []

    def begin(plan: SplitPlan | None) -> WatchedLosses:
        replay.load(this.end_point)
        replay.module.eval()
        watched[:] = [watched_under(plan, recorded.weights(), recorded.micro.sizes)]
        return watched[0]

    with replay.surroundings.as_stage("train"), torch.enable_grad():
        if replay.split is not None:
            _, evaluated = replay.split.plan_for(lambda plan: recorded.watched(begin(plan)), recorded)
            losses = watched[0].own_losses(evaluated.loss)
        else:  # the losses of sample_losses= say whose row is whose
            own = recorded.call([begin(None)], function=replay.sample_losses).detach()
            watched[0].own(own)
            losses = plain_numbers(own)
    labels, predictions = watched[0].labels_and_predictions()
    return {name: Seen(labels[row], predictions[row], losses[row]) for name, row in batch.rows.items()}


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
    device = this.replay.surroundings.device

    def labels_of(names: list[SampleId]) -> Tensor:
        return torch.tensor([classes.get(name, -1) for name in names], device=device)

    problem = _problem(this, found.seen)
    return (labels_of, found.complaints) if problem is None else (None, [*found.complaints, f"{_WHERE}{problem}"])


def _problem(this: OpenedRun, seen: dict[SampleId, Seen]) -> str | None:
    """Change the labels of a batch in its loss calls, and in the batch itself: do they come to the same losses?"""
    replay = this.replay
    if replay.split is None:
        return "with sample_losses= it is not seen how a label enters a loss, nor with weighted_loss=."
    step, labels = _telling(this.steps, seen)
    batch = replay.batch(step, 0)
    weights = batch.weights()
    others = OtherLabels(labels.to(weights.device), torch.zeros_like(weights))

    def evaluate(weighing: SampleWeights) -> Evaluated:
        replay.load(this.states.state(step.index))
        return batch.watched(weighing)

    def with_labels(plan: SplitPlan | None) -> Evaluated:
        return evaluate(LabelledWeights(weights, plan, None, others, batch.micro.sizes))

    plan, as_is = replay.split.plan_for(with_labels, batch)
    changed = relabelled(batch.content, others)
    if not others.is_whole or changed is None:
        return "the loss is not made of one class a sample alone, as it stands in the batch."
    expected = [others.rows.get(number, call.rows) for number, call in enumerate(as_is.calls)]
    batch.content = changed
    found = [call.rows for call in evaluate(SampleWeights(weights, plan, sizes=batch.micro.sizes)).calls]
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
