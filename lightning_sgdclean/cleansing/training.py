# SPDX-License-Identifier: Apache-2.0
"""A training that can be made again and again, and one of many made."""

import hashlib
import inspect
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.parameter import is_lazy

from lightning_sgdclean.base.lightning import CALLBACK_BASES, combined_loader, seed_everything
from lightning_sgdclean.callback import SGDInfluence
from lightning_sgdclean.cleansing.cleansed import Cleansed
from lightning_sgdclean.cleansing.plan import Loop, Settings, Trial, changeable
from lightning_sgdclean.data.fetching import share_samples
from lightning_sgdclean.ranking.ranking import Ranking

_STEPS = {"val": "validation_step", "test": "test_step"}
_DEFAULTS = ("lightning.pytorch.core.", "pytorch_lightning.core.")  # where hooks come from that nobody has overridden


class Training(NamedTuple):
    """What ``Trainer.fit`` and ``Trainer.test`` are called with: a Trainer, and the rest under Lightning's names.

    Attributes:
        trainer: A fresh Trainer.
        model: A fresh LightningModule.
        datamodule: Its data, unless loaders or the module give them.
        train_dataloaders: Loader for training.
        val_dataloaders: Loaders for validation.
        test_dataloaders: Loaders for the test.
    """

    trainer: Any
    model: Any
    datamodule: Any = None
    train_dataloaders: Any = None
    val_dataloaders: Any = None
    test_dataloaders: Any = None

    def fit(self) -> None:
        """Train."""
        self.trainer.fit(
            self.model,
            train_dataloaders=self.train_dataloaders,
            val_dataloaders=self.val_dataloaders,
            datamodule=self.datamodule,
        )

    def measure(self, loop: Loop, ckpt_path: str | None) -> dict[str, float | None]:
        """What validation or test loop logs, by name; None for NaN and infinities, which JSON does not have."""
        data = getattr(self, f"{loop}_dataloaders")
        results = {"val": self.trainer.validate, "test": self.trainer.test}[loop](
            self.model,
            dataloaders=data,
            datamodule=self.datamodule if data is None else None,
            ckpt_path=ckpt_path,
            verbose=False,
        )
        values = {name: float(value) for result in results for name, value in result.items()}
        return {name: value if math.isfinite(value) else None for name, value in values.items()}

    def check(self, loops: tuple[Loop, ...]) -> None:
        """Before the first step: has it the steps and the data for these loops?

        Raises:
            ValueError: If not.
        """
        for loop in loops:
            owners = [owner for owner in (self.model, self.datamodule) if owner is not None]
            has_data = getattr(self, f"{loop}_dataloaders") is not None or any(
                _is_overridden(owner, f"{loop}_dataloader") for owner in owners
            )
            if not has_data or not _is_overridden(self.model, _STEPS[loop]):
                needed = f"{loop}_dataloaders (of Training, module or DataModule)" if not has_data else _STEPS[loop]
                purpose = {
                    "val": "How many samples to remove is chosen by what validation logs",
                    "test": "What that gains is measured by what the test logs, on data that ranking has not seen",
                }[loop]
                raise ValueError(f"{purpose}: {type(self.model).__name__} has no {needed}.")


Build = Callable[..., Training]


def takes_without(build: Build) -> bool:
    """Whether ``build`` leaves samples out by itself."""
    return "without" in inspect.signature(build).parameters


def weights_checksum(model: Any) -> str:
    """SHA-256 over everything in the module's ``state_dict``."""
    digest = hashlib.sha256(type(model).__qualname__.encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        if isinstance(value, torch.Tensor) and not is_lazy(value):
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _is_overridden(owner: Any, hook: str) -> bool:
    method = vars(owner).get(hook, getattr(type(owner), hook, None))
    return method is not None and not str(getattr(method, "__module__", "")).startswith(_DEFAULTS)


class OwnCheckpoints(*CALLBACK_BASES):  # type: ignore[misc]
    """Sends every checkpoint callback, the module's own included, to a folder of this training alone.

    Args:
        folder: Each gets a folder in it.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Before checkpoint callbacks choose their folder: Lightning calls those last."""
        for number, callback in enumerate(trainer.checkpoint_callbacks):
            if stage == "fit" and hasattr(callback, "dirpath"):
                callback.dirpath = str(self.folder / str(number))


@contextmanager
def own_checkpoints(trainer: Any, folder: Path) -> Iterator[None]:
    """Have the Trainer write checkpoints to ``folder``, which is gone afterwards."""
    folder = folder.absolute()
    shutil.rmtree(folder, ignore_errors=True)  # of a training that was killed
    trainer.callbacks.insert(0, OwnCheckpoints(folder))
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
        own = [SGDInfluence(**{"keep_trajectory": False, "verify": 0, **(options or {})})]
        training.trainer.callbacks.insert(0, own[0])
    (callback,) = own
    needed = ("label", "prediction") if settings.action == "relabel" else ()
    callback.options = replace(
        callback.options,
        dirpath=settings.ranking_of(seed),
        overwrite=True,
        columns=(*callback.options.columns, *needed),
    )
    training.fit()
    return callback


def _facts(influence: SGDInfluence, training: Training, settings: Settings, names_will_do: bool) -> dict[str, Any]:
    """What is to be known of a ranking."""
    ranking = influence.ranking
    if ranking is None:
        raise ValueError("The training was not ranked. Do not use fast_dev_run.")
    has_names, several = influence.options.sample_ids is not None, len(combined_loader(training.trainer).flattened) > 1
    named = influence.summary["dataset_size"] is None and (has_names or several)
    if named and not names_will_do:
        whose, other = "that sample_ids= gives", "without sample_ids="
        whose, other = (whose, other) if has_names else ("of several training loaders", "with one loader")
        raise ValueError(
            f"The ids {whose} are names, not positions in the training loader's dataset, so the samples are not found "
            f"there. Give build(seed, without), which leaves out the samples with those ids, or rank {other}."
        )
    dataset: Any = None if named else getattr(_train_loader(training), "dataset", None)
    can_change = changeable(ranking, settings.action)
    return {
        "num_changeable": int(can_change.sum()),
        "num_harmful": int((ranking.influence[can_change] < 0).sum()),
        "num_samples": len(dataset) if hasattr(dataset, "__len__") else len(ranking),
        "monitor": influence.options.monitor if influence.options.objective is None else None,
        "mode": influence.options.mode,
    }


def _train_loader(training: Training) -> Any:
    return combined_loader(training.trainer).flattened[0]


def _ranked_on(influence: SGDInfluence, training: Training) -> Any:
    """The data of the objective; the Trainer forgets them when it measures."""
    return (
        training.trainer.val_dataloaders
        if influence.options.val_dataloaders is None
        else influence.options.val_dataloaders
    )


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
