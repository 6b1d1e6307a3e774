# SPDX-License-Identifier: Apache-2.0
"""Try out a LightningCLI configuration: train a few steps, retrace them, and say what would come of the whole.

Nothing of it is kept. If the training cannot be followed, that is the result, and the exit code is 1.
"""

import argparse
import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_sgdclean.base.resources import in_time
from lightning_sgdclean.cli.terminal import facts, one_line

if TYPE_CHECKING:
    from lightning_sgdclean.cli.dry_run import Findings

NAME = "check"
HELP = "try out a LightningCLI configuration"

_SHOWN_IDS = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("config", metavar="CONFIG", type=Path, help="YAML file, as for `fit --config`")
    add_classes(parser)
    parser.add_argument("--json", action="store_true", help="as JSON")


def add_classes(parser: argparse.ArgumentParser) -> None:
    """Declare what completes a configuration."""
    parser.add_argument(
        "--model", metavar="CLASS", help="the LightningModule's import path, if CONFIG has no class_path"
    )
    parser.add_argument("--data", metavar="CLASS", help="likewise of the DataModule")


def run(arguments: argparse.Namespace) -> int:
    """Try, and print."""
    if not arguments.config.is_file():
        raise FileNotFoundError(f"There is no configuration at {arguments.config}.")
    from lightning_sgdclean.base.lightning import without_chatter
    from lightning_sgdclean.cli.configured import ConfiguredTraining

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


def _tried(training: Any) -> tuple[Any, "Findings"]:
    """The configuration's callback, or one with the defaults; several are refused as by ``fit``."""
    from lightning_sgdclean.callback import SGDInfluence
    from lightning_sgdclean.cli.dry_run import TRAINER_OPTIONS, dry_run

    with tempfile.TemporaryDirectory(prefix="sgdclean-") as folder:
        made, module, datamodule = training.make({**TRAINER_OPTIONS, "default_root_dir": folder})
        callback = next((one for one in made.callbacks if isinstance(one, SGDInfluence)), None)
        if callback is None:
            callback = SGDInfluence()
            made.callbacks.insert(0, callback)
        return callback, dry_run(made, module, datamodule, callback, Path(folder))


def _in_words(callback: Any, found: "Findings") -> list[tuple[str, str]]:
    lines = [("objective", ", ".join(callback.options.objectives)), *_split(callback, found)]
    if found.first_ids:
        lines.append(("first batch", _first_ids(found)))
    if found.budget is not None:
        lines += [("plan", found.budget.text), ("time", _time(found))]
    lines += [("note", note) for note in found.notes]
    verdict = f"{type(found.refusal).__name__}: {one_line(found.refusal)}" if found.refusal else "can be followed"
    return [*lines, ("refused" if found.refusal else "result", verdict)]


def _split(callback: Any, found: "Findings") -> list[tuple[str, str]]:
    if callback.options.sample_losses is not None:
        return [("split", "by sample_losses=")]
    if found.split is None:
        return []
    words = []
    for call in found.split:
        name, reduction, _ = call.call
        whose = "one part a sample" if call.rules else "no sample's, a penalty"
        bent = "" if call.is_linear else ", not linear in it"
        words.append(f"{name} ({reduction}): {whose}{bent}")
    return [("split", "; ".join(words))]


def _first_ids(found: "Findings") -> str:
    shown = ", ".join(map(str, found.first_ids[:_SHOWN_IDS]))
    more = ", ..." if len(found.first_ids) > _SHOWN_IDS else ""
    size = "" if found.dataset_size is None else f", of {found.dataset_size} in the data set"
    return f"{shown}{more} ({len(found.first_ids)} samples{size})"


def _time(found: "Findings") -> str:
    """Of training and retrace, in words; loading and validation come on top."""
    if found.step_seconds is None or found.budget is None:
        return "not measured"
    step, budget = found.step_seconds, found.budget
    training = "" if found.num_steps is None else f"training about {in_time(found.num_steps * step)}, "
    steps = "a step" if budget.num_steps is None else f"{budget.num_steps} steps"
    retrace = budget.cost * step * (budget.num_steps or 1)
    return f"{training}retrace of {steps} about {in_time(retrace)} (a training step takes {in_time(step)})"


def _as_json(callback: Any, found: "Findings") -> dict[str, Any]:
    budget = found.budget
    seconds = None if budget is None or found.step_seconds is None else budget.cost * found.step_seconds
    return {
        "monitor": callback.options.monitor,
        "refusal": None if found.refusal is None else str(found.refusal),
        "error": None if found.refusal is None else type(found.refusal).__name__,
        "notes": found.notes,
        "split": None if found.split is None else [[*call.call[:2], bool(call.rules)] for call in found.split],
        "first_ids": found.first_ids,
        "dataset_size": found.dataset_size,
        "trajectory_bytes": None if budget is None else budget.nbytes,
        "num_steps": found.num_steps,
        "window_steps": None if budget is None else budget.num_steps,
        "seconds_a_step": found.step_seconds,
        "seconds_a_retraced_step": seconds,
    }
