# SPDX-License-Identifier: Apache-2.0
"""What the check of the derivative finds, what it takes for wrong, and what it costs.

    python benchmarks/gradcheck.py                 # prints the tables; a quarter of an hour
    python benchmarks/gradcheck.py --write-docs    # also writes results/gradcheck_cpu.json and from it the pages

Small trainings with a fault of their gradient are ranked all the same, and central differences of whole fits in float64
tell how wrong the influences are. Others, whose derivative is right, tell of false alarms. Retraces with and without
the check tell what it costs.
"""

import argparse
import json
import logging
import os
import platform
import re
import time
import warnings
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytorch_lightning as pl
import torch

import among_tests  # noqa: F401
from cases import fit, objective
from gradcheck_cost import costs
from gradcheck_faults import Trial, objective_of, trials
from gradcheck_page import limits, reliability
from gradcheck_right import EXACT64, Right, trainings
from lightning_sgdclean import SGDInfluence
from lightning_sgdclean.base.errors import SGDInfluenceError, SGDInfluenceWarning
from reference import dense_direction, directional, influences

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "gradcheck_cpu.json"
PAGES = {ROOT / "docs" / "limits.md": limits, ROOT / "docs" / "reliability.md": reliability}
RADIUS = 1e-4  # of curvature="finite": so small that its own error is far below those that are measured
SMALLEST = 1e-5  # influence, in units of the objective; rounding moves a difference of whole fits by 1e-10 or so
WORDS = {  # what a refusal or a warning is about, by what it says
    "derivative": "training_step stops gradients|is not the derivative of its loss",
    "objective": "is not the derivative of its value",
    "untold": "could not be told",
    "record": "is not what was recorded|miss the one after it",
}


def about(text):
    """What a message is about: a name of ``WORDS``, or ``"other"``."""
    return next((name for name, words in WORDS.items() if re.search(words, text)), "other")


def watched(case, **options):
    """Train a case with the callback: it, and what it refused or warned of, each thing once."""
    with TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        callback = SGDInfluence("val_loss", epochs="all", page=False, verify=0, dirpath=f"{folder}/run", **options)
        try:
            fit(case, callback)
        except SGDInfluenceError as error:
            return None, [about(str(error))]
    said = [str(one.message) for one in raised if issubclass(one.category, SGDInfluenceWarning)]
    return callback, sorted({about(text) for text in said})


def error_of(callback, objective_by_weights):
    """How far influences are off, as a share of the largest, along a direction that moves all weights.

    None where they are so small, or so large, that rounding hides what whole fits say.
    """
    found, value = influences(callback), callback.summary["objective"]["recomputed"]
    largest = np.abs(found).max()
    if not SMALLEST < largest / abs(value) < 1 / SMALLEST:
        return None
    direction = dense_direction(len(found))
    truth = -directional(objective_by_weights, direction)
    return float(abs(found @ direction.numpy() - truth) / largest)


def tried(one: Right):
    """A training whose derivative is right; its error where that can be measured."""
    case = one.trained
    callback, said = watched(case, curvature=one.curvature)
    row = {"group": one.group, "name": str(case), "precision": one.precision, "curvature": one.curvature, "said": said}
    if callback is not None and (one.precision, one.curvature) == EXACT64:
        row["error"] = error_of(callback, lambda w: objective(fit(case, weights=w), case.val))
    return row


def faulted(trial: Trial, errors):
    """A training with a fault; ``errors`` remembers those of the same in 64 bits."""
    case = trial.case
    callback, said = watched(
        case, curvature=trial.curvature, finite_radius=RADIUS, on_mismatch="warn", **trial.what.options
    )
    if trial == trial.twin and callback is not None:
        errors[trial] = error_of(callback, lambda w: objective_of(fit(case, weights=w)))
    names = ("fault", "strength", "begins", "curvature", "network", "precision", "is_right")
    return {name: getattr(trial, name) for name in names} | {"error": errors.get(trial.twin), "said": said}


def quiet():
    for name in ("pytorch_lightning", "pytorch_lightning.utilities.rank_zero", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)


def measured_trainings():
    """What came of each training."""
    errors, found = {}, {"right": [], "faulty": []}
    for name, row in (
        *(("right", partial(tried, one)) for one in trainings()),
        *(("faulty", partial(faulted, trial, errors)) for trial in trials()),
    ):
        found[name].append(row())
        print(json.dumps(found[name][-1]), flush=True)
    return found


PARTS = {"trainings": measured_trainings, "cost": lambda: {"cost": costs()}}


def with_measured(parts):
    """The result that there is, with these parts of it measured anew."""
    result = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    about = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": pl.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    for part in parts:
        result |= about | PARTS[part]()
    return result


def as_text(result):
    """JSON with a line for each training."""
    rows = {name: result[name] for name in ("right", "faulty")}
    head = json.dumps({name: value for name, value in result.items() if name not in rows}, indent=1)
    lines = [f' "{name}": [\n' + ",\n".join(f"  {json.dumps(row)}" for row in rows[name]) + "\n ]" for name in rows]
    return head.removesuffix("\n}") + ",\n" + ",\n".join(lines) + "\n}\n"


def parts_of(page):
    """What stands on a page before, within and behind the section that is made here."""
    text = page.read_text(encoding="utf-8")
    begin, end = (text.index(mark) for mark in ("<!-- gradcheck -->\n", "<!-- /gradcheck -->"))
    begin += len("<!-- gradcheck -->\n")
    return text[:begin], text[begin:end], text[end:]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write-docs", action="store_true")
    parser.add_argument("--only", choices=(*PARTS, "pages"), help="measure this part, and take the rest from the JSON")
    arguments = parser.parse_args()
    quiet()
    result = with_measured([part for part in PARTS if arguments.only in (part, None)])
    if arguments.write_docs:
        RESULT.write_text(as_text(result), encoding="utf-8")
    for page, section_of in PAGES.items():
        section = section_of(result)
        print(section)
        if arguments.write_docs:
            before, _, after = parts_of(page)
            page.write_text(before + section + after, encoding="utf-8")


if __name__ == "__main__":
    main()
