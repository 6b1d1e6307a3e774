# SPDX-License-Identifier: Apache-2.0
"""One of many trainings of a cleansing: on everything, with a ranking, or with some of the samples changed."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lightning_sgdclean.base.lightning import seed_everything
from lightning_sgdclean.callback import SGDInfluence
from lightning_sgdclean.cleansing.cleansed import Cleansed
from lightning_sgdclean.cleansing.own_checkpoints import own_checkpoints
from lightning_sgdclean.cleansing.training import Build, Loop, Training, takes_without, weights_checksum
from lightning_sgdclean.data.overlap import share_samples
from lightning_sgdclean.ranking.ranking import Ranking

Arm = Literal["none", "worst", "random"]
Action = Literal["drop", "relabel"]


@dataclass(frozen=True)
class Trial:
    """Which training: its seed, and which samples are left out or relabelled.

    Attributes:
        seed: Of weights, data order and all else.
        arm: ``"none"`` trains on everything, and ranks; ``"worst"`` changes the most harmful samples, ``"random"`` as
            many random ones.
        count: How many samples.
        draw: Number of the random draw.
    """

    seed: int
    arm: Arm = "none"
    count: int = 0
    draw: int = 0

    @property
    def name(self) -> str:
        """Unique among the trials of a cleansing, and fit for a file."""
        which = {"none": "", "worst": f"-{self.count}", "random": f"-{self.count}-{self.draw}"}[self.arm]
        return f"seed{self.seed}-{self.arm}{which}"

    def __str__(self) -> str:
        changed = {
            "none": "nothing changed",
            "worst": f"the {self.count} worst changed",
            "random": f"{self.count} random ones changed ({self.draw + 1})",
        }
        return f"seed {self.seed}, {changed[self.arm]}"

    def ids(self, ranking: Ranking, action: Action) -> list[Any]:
        """The samples that are changed; random ones depend on seed, number, draw and what can be changed alone."""
        ids = ranking.sample_id[changeable(ranking, action)]
        if self.arm == "random":
            ids = np.sort(ids)
            draw = np.random.default_rng((self.seed, self.count, self.draw))
            return sorted(ids[draw.permutation(len(ids))[: self.count]].tolist())
        return list(ids[: self.count].tolist())


def changeable(ranking: Ranking, action: Action) -> NDArray[np.bool_]:
    """Which samples the action does something to, ``(N,)``: all can be dropped.

    Relabelled are those whose prediction is not their label. Were all drawn from, most random ones would keep their
    label, as models mostly agree with their data: few changes would be held against many.
    """
    if action == "drop":
        return np.ones(len(ranking), dtype=np.bool_)
    differs: NDArray[np.bool_] = ranking.columns["prediction"] != ranking.columns["label"]  # also where unknown: NaN
    return differs


@dataclass(frozen=True)
class Settings:
    """What all trials have in common.

    Attributes:
        folder: Rankings go to ``rankings`` in it.
        influence: Options of :class:`SGDInfluence`; None where the built Trainer has one, or for the defaults.
        on: Loop whose metric the verdict is on.
        ckpt_path: As ``Trainer.test`` takes it: None for the weights after ``fit``, ``"best"`` for the best ones.
        action: Whether samples are left out, or given the label that the ranked model predicts.
        set_label: How a sample gets another label, where that is not plain.
    """

    folder: Path
    influence: Mapping[str, Any] | None
    on: Loop
    ckpt_path: str | None
    action: Action = "drop"
    set_label: Callable[[Any, Any], Any] | None = None

    @property
    def loops(self) -> tuple[Loop, ...]:
        """Loops that measure: one chooses how many samples to remove, the other judges."""
        return ("val",) if self.on == "val" else ("val", "test")

    def ranking_of(self, seed: int) -> Path:
        """Run directory of that seed's training on everything."""
        return self.folder / "rankings" / f"seed{seed}"

    def checkpoints_of(self, trial: Trial) -> Path:
        """Where that training keeps checkpoints until it is measured."""
        return self.folder / "trials" / f"{trial.name}.checkpoints"


def run_trial(build: Build, trial: Trial, settings: Settings) -> dict[str, Any]:
    """Train and measure.

    Returns:
        What is to be remembered, fit for JSON: ``start`` (checksum of the weights that it began with), ``metrics`` by
        loop and name, ``changed`` (sample ids), ``seconds``; of a ranked one also ``num_changeable``,
        ``num_harmful`` (of these), ``num_samples`` (of the dataset; where ids are names, of those ranked),
        ``monitor`` and ``mode``, ``on_ranking_data``.

    Raises:
        TypeError: If ``build`` returns something else.
        ValueError: If the training cannot be ranked or measured.
    """
    began = time.perf_counter()
    seed_everything(trial.seed)
    ranking = None if trial.arm == "none" else Ranking.load(settings.ranking_of(trial.seed))
    changed = [] if ranking is None else trial.ids(ranking, settings.action)
    training = build(trial.seed, without=frozenset(changed)) if takes_without(build) else build(trial.seed)
    if not isinstance(training, Training):
        raise TypeError(
            f"Expected build(seed) to return a lightning_sgdclean.Training, found {type(training).__name__}."
        )
    training.check(settings.loops)
    start, facts, ranked_on = weights_checksum(training.model), {}, []
    with own_checkpoints(training.trainer, settings.checkpoints_of(trial)):
        if ranking is None:
            influence = _ranked(training, settings, trial.seed)
            facts = _facts(influence, training, settings, takes_without(build))
            ranked_on = _ranked_on(influence, training)
        else:
            _changed(training, None if takes_without(build) else _change(ranking, changed, settings))
        metrics = {loop: training.measure(loop, settings.ckpt_path) for loop in settings.loops}
    facts["on_ranking_data"] = share_samples(ranked_on, getattr(training.trainer, f"{settings.on}_dataloaders"))
    seconds = round(time.perf_counter() - began, 3)
    return {"start": start, "metrics": metrics, "changed": changed, "seconds": seconds, **facts}


def _ranked(training: Training, settings: Settings, seed: int) -> SGDInfluence:
    """Train on everything, and rank."""
    own, options = _influences_in(training), settings.influence
    if len(own) + (options is not None) > 1:
        besides = " and influence= besides" if options is not None else ""
        raise ValueError(f"Expected one SGDInfluence, found {len(own)} among the Trainer's callbacks{besides}.")
    if not own:
        own = [SGDInfluence(**{"keep_trajectory": False, **(options or {})})]
        training.trainer.callbacks.insert(0, own[0])
    own[0].dirpath, own[0].overwrite = settings.ranking_of(seed), True
    if settings.action == "relabel":
        own[0].columns = tuple(dict.fromkeys((*own[0].columns, "label", "prediction")))
    training.fit()
    return own[0]


def _facts(influence: SGDInfluence, training: Training, settings: Settings, names_will_do: bool) -> dict[str, Any]:
    """What is to be known of a ranking."""
    ranking = influence.ranking
    if ranking is None:
        raise ValueError("The training was not ranked. Do not use fast_dev_run.")
    named = influence.sample_ids is not None and influence.summary["dataset_size"] is None
    if named and not names_will_do:
        raise ValueError(
            "The ids that sample_ids= gives are names, not positions in the training loader's dataset, so the samples "
            "cannot be found there. Give build(seed, without), which leaves out the samples with those ids, or rank "
            "without sample_ids=."
        )
    dataset: Any = None if named else getattr(_train_loader(training), "dataset", None)
    can_change = changeable(ranking, settings.action)
    return {
        "num_changeable": int(can_change.sum()),
        "num_harmful": int((ranking.influence[can_change] < 0).sum()),
        "num_samples": len(dataset) if hasattr(dataset, "__len__") else len(ranking),
        "monitor": influence.monitor if influence.objective is None else None,
        "mode": influence.mode,
    }


def _train_loader(training: Training) -> Any:
    return training.trainer.fit_loop._combined_loader.flattened[0]


def _ranked_on(influence: SGDInfluence, training: Training) -> Any:
    """The data of the objective; the Trainer forgets them when it measures."""
    return training.trainer.val_dataloaders if influence.val_dataloaders is None else influence.val_dataloaders


def _change(ranking: Ranking, changed: list[Any], settings: Settings) -> Cleansed:
    """The callback that leaves the samples out, or gives them the labels that the ranked model predicts."""
    if settings.action == "drop":
        return Cleansed(drop=changed)
    row_of = {sample: row for row, sample in enumerate(ranking.sample_id.tolist())}
    labels, expected = (
        {sample: ranking.columns[name][row_of[sample]].item() for sample in changed} for name in ("prediction", "label")
    )
    unknown = [sample for sample in changed if math.isnan(labels[sample]) or math.isnan(expected[sample])]
    if unknown:
        raise ValueError(
            f"Label or prediction of {len(unknown)} samples is not known (the first is {unknown[0]}), so that they "
            'cannot be relabelled. Expected a loss of torch with one class a sample; action="drop" does without.'
        )
    return Cleansed(labels=labels, set_label=settings.set_label, expected=expected)


def _changed(training: Training, change: Cleansed | None) -> None:
    """Train on what the callback makes of the data; without one, ``build`` has seen to it."""
    callbacks = training.trainer.callbacks
    for callback in _influences_in(training):
        callbacks.remove(callback)
    if change is not None:
        callbacks.insert(0, change)
    training.fit()


def _influences_in(training: Training) -> list[SGDInfluence]:
    return [callback for callback in training.trainer.callbacks if isinstance(callback, SGDInfluence)]
