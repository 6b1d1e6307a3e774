# SPDX-License-Identifier: Apache-2.0
"""The commands that train as a LightningCLI configuration says: ``check`` and ``cleanse``."""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning_sgdclean.base.errors import SGDInfluenceError, SGDInfluenceWarning
from lightning_sgdclean.base.lightning import CALLBACK_BASES, silent_logger, without_chatter
from lightning_sgdclean.base.resources import in_time
from lightning_sgdclean.callback import SGDInfluence
from lightning_sgdclean.cleansing.cleanse import cleanse as cleanse_training
from lightning_sgdclean.cli.configured import ConfiguredTraining
from lightning_sgdclean.cli.terminal import facts, one_line, wrapped
from lightning_sgdclean.record.recording import EarlyFindings

NUM_STEPS = 3  # the first is rehearsed after the second
_VAL_BATCHES = 2
TRAINER_OPTIONS: dict[str, Any] = {
    "logger": False,
    "limit_val_batches": lambda given: 0 if given == 0 else _VAL_BATCHES,
    "num_sanity_val_steps": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@dataclass
class Findings:
    """What a dry run found out, as far as it came.

    Attributes:
        refusal: Why the training cannot be followed; None if it can, as far as its first steps show.
        notes: Warnings.
        early: What the callback found out in the first steps.
        dataset_size: Samples of the training data, if their ids are positions.
        num_steps: Steps of the whole training, if known.
        step_seconds: What one of them takes, without loading its batches; None if none was made.
    """

    refusal: SGDInfluenceError | None = None
    notes: list[str] = field(default_factory=list)
    early: EarlyFindings = field(default_factory=EarlyFindings)
    dataset_size: int | None = None
    num_steps: int | None = None
    step_seconds: float | None = None


def dry_run(trainer: Any, module: Any, datamodule: Any, callback: SGDInfluence, folder: Path) -> Findings:
    """Train a few steps with the callback and retrace them.

    Args:
        trainer: Made with :data:`TRAINER_OPTIONS`; of no use afterwards.
        module: Its weights move.
        datamodule: Or None.
        callback: One of the Trainer's.
        folder: For all files; whoever made it deletes it.

    Returns:
        What was found. Errors of the training itself are raised.
    """
    if trainer.fast_dev_run:
        raise ValueError("With fast_dev_run the callback does nothing, so there is nothing to try.")
    found, clock = Findings(), _Clock()
    _redirect(trainer, callback, folder)
    trainer.callbacks = [_BatchEnds(clock), *trainer.callbacks, _BatchStarts(clock, found)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer.fit(module, datamodule=datamodule)
        except SGDInfluenceError as error:
            found.refusal = error
    found.notes = [str(one.message) for one in caught if issubclass(one.category, SGDInfluenceWarning)]
    batch_seconds = clock.batch_seconds
    found.step_seconds = None if batch_seconds is None else batch_seconds * trainer.accumulate_grad_batches
    found.dataset_size = callback.summary.get("dataset_size")
    found.early = callback.early_findings
    return found


def _redirect(trainer: Any, callback: SGDInfluence, folder: Path) -> None:
    """Let everything that is written go to the folder, and the walk start where the few steps end."""
    trainer.loggers = [silent_logger(trainer)]  # some callbacks want one
    callback.options = replace(callback.options, dirpath=folder / "run", at="last", overwrite=False)
    for number, checkpoint in enumerate(trainer.checkpoint_callbacks):
        checkpoint.dirpath = str(folder / f"checkpoints-{number}")


class _Clock:
    """Times from the moment a batch is handed to ``training_step`` to that at which its step has been made."""

    def __init__(self) -> None:
        self._began = 0.0
        self._seconds: list[float] = []

    def start(self) -> None:
        self._began = time.perf_counter()

    def stop(self) -> None:
        self._seconds.append(time.perf_counter() - self._began)

    @property
    def batch_seconds(self) -> float | None:
        """Median, the first one aside, which waits for much that is done once."""
        return statistics.median(self._seconds[1:] or self._seconds) if self._seconds else None


class _BatchEnds(*CALLBACK_BASES):  # type: ignore[misc]
    """Stands before the callback, so that its work after a batch is not counted."""

    def __init__(self, clock: _Clock) -> None:
        super().__init__()
        self._clock = clock

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop the clock."""
        self._clock.stop()


class _BatchStarts(*CALLBACK_BASES):  # type: ignore[misc]
    """Stands behind the callback: its work before a batch is not counted, and its plan is of the whole training."""

    def __init__(self, clock: _Clock, found: Findings) -> None:
        super().__init__()
        self._clock, self._found = clock, found

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Let the training end soon."""
        whole = trainer.estimated_stepping_batches
        self._found.num_steps = int(whole) if whole != float("inf") else None
        loop = trainer.fit_loop.epoch_loop
        loop.max_steps = NUM_STEPS if loop.max_steps < 0 else min(NUM_STEPS, loop.max_steps)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        self._clock.start()


_SHOWN_IDS = 12


def check(arguments: argparse.Namespace) -> int:
    """Try, and print."""
    if not arguments.config.is_file():
        raise FileNotFoundError(f"There is no configuration at {arguments.config}.")
    training = ConfiguredTraining(arguments.config, arguments.model, arguments.data)
    with contextlib.redirect_stdout(sys.stderr), without_chatter():
        callback, found = _tried(training)
    refused = found.refusal is not None
    if arguments.json:
        content = {"config": str(arguments.config), "refused": refused, **_as_json(callback, found)}
        print(json.dumps(content, indent=2))
    else:
        print(facts([("config", str(arguments.config)), *_in_words(callback, found)]))
    return int(refused)


def _tried(training: Any) -> tuple[Any, Findings]:
    """The configuration's callback, or one with the defaults; several are refused as by ``fit``."""
    with tempfile.TemporaryDirectory(prefix="sgdclean-") as folder:
        made, module, datamodule = training.make({**TRAINER_OPTIONS, "default_root_dir": folder})
        callback = next((one for one in made.callbacks if isinstance(one, SGDInfluence)), None)
        if callback is None:
            callback = SGDInfluence()
            made.callbacks.insert(0, callback)
        return callback, dry_run(made, module, datamodule, callback, Path(folder))


def _in_words(callback: Any, found: Findings) -> list[tuple[str, str]]:
    lines = [("objective", ", ".join(callback.options.objectives)), *_split(callback, found)]
    if found.early.first_ids:
        lines.append(("first batch", _first_ids(found)))
    if found.early.budget is not None:
        lines += [("plan", found.early.budget.text), ("time", _time(found))]
    lines += [("note", note) for note in found.notes]
    verdict = f"{type(found.refusal).__name__}: {one_line(found.refusal)}" if found.refusal else "can be followed"
    return [*lines, ("refused" if found.refusal else "result", verdict)]


def _split(callback: Any, found: Findings) -> list[tuple[str, str]]:
    for name in ("sample_losses", "weighted_loss"):
        if getattr(callback.options, name) is not None:
            return [("split", f"by {name}=")]
    if found.early.split is None:
        return []
    words = []
    for call in found.early.split:
        whose = "one part a sample" if call.rules else "no sample's, a penalty"
        bent = "" if call.is_linear else ", not linear in it"
        words.append(f"{call.name} ({call.call[1]}): {whose}{bent}")
    return [("split", "; ".join(words))]


def _first_ids(found: Findings) -> str:
    shown = ", ".join(map(str, found.early.first_ids[:_SHOWN_IDS]))
    more = ", ..." if len(found.early.first_ids) > _SHOWN_IDS else ""
    size = "" if found.dataset_size is None else f", of {found.dataset_size} in the data set"
    return f"{shown}{more} ({len(found.early.first_ids)} samples{size})"


def _time(found: Findings) -> str:
    """Of training and retrace, in words; loading and validation come on top."""
    if found.step_seconds is None or found.early.budget is None:
        return "not measured"
    step, budget = found.step_seconds, found.early.budget
    training = "" if found.num_steps is None else f"training about {in_time(found.num_steps * step)}, "
    steps = "a step" if budget.num_steps is None else f"{budget.num_steps} steps"
    retrace = budget.cost * step * (budget.num_steps or 1)
    return f"{training}retrace of {steps} about {in_time(retrace)} (a training step takes {in_time(step)})"


def _as_json(callback: Any, found: Findings) -> dict[str, Any]:
    budget = found.early.budget
    seconds = None if budget is None or found.step_seconds is None else budget.cost * found.step_seconds
    return {
        "monitor": callback.options.monitor,
        "refusal": None if found.refusal is None else str(found.refusal),
        "error": None if found.refusal is None else type(found.refusal).__name__,
        "notes": found.notes,
        "split": None
        if found.early.split is None
        else [[call.name, call.call[1], bool(call.rules)] for call in found.early.split],
        "first_ids": found.early.first_ids,
        "dataset_size": found.dataset_size,
        "trajectory_bytes": None if budget is None else budget.nbytes,
        "num_steps": found.num_steps,
        "window_steps": None if budget is None else budget.num_steps,
        "seconds_a_step": found.step_seconds,
        "seconds_a_retraced_step": seconds,
    }


def cleanse(arguments: argparse.Namespace) -> int:
    """Train, judge, and print."""
    if not arguments.config.is_file():
        raise FileNotFoundError(f"There is no configuration at {arguments.config}.")
    build = ConfiguredTraining(arguments.config, arguments.model, arguments.data)
    with contextlib.redirect_stdout(sys.stderr):  # what the trainings print is not part of the result
        found = cleanse_training(
            build,
            metric=arguments.metric,
            mode=arguments.mode,
            on=arguments.on,
            drop=arguments.drop,
            action=arguments.action,
            seeds=arguments.seeds,
            random_draws=arguments.random_draws,
            select=arguments.select,
            select_mode=arguments.select_mode,
            processes=arguments.processes,
            dirpath=arguments.output,
        )
    if arguments.json:
        print((found.folder / "report.json").read_text(encoding="utf-8"), end="")
    else:
        print(wrapped(str(found)))
    return int(found.verdict.outcome == "undecided")
