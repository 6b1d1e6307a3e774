# SPDX-License-Identifier: Apache-2.0
"""Which wrong labels each method finds, and what a training without the worst samples is worth.

    python benchmarks/fetch_data.py --data runs/data
    python benchmarks/results.py --data runs/data --task mnist --seeds 5
    python benchmarks/results.py --write-docs

A training is recorded, each method scores its samples, and the network is trained again, from the same seed,
without the worst 1%, 5% and 10%. Every method of every seed leaves a JSON file in ``--work``, and what is there is
not computed again. ``--write-docs`` gathers them into ``benchmarks/results/`` and writes ``docs/results.md``.
"""

import argparse
import json
import os
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from lightning_sgdclean.base.files import write_json
from lightning_sgdclean.base.resources import versions
from lightning_sgdclean.ranking.agreement import mislabel_auroc, precision_at_k
from methods import METHODS, trained
from results_page import markdown
from tasks import TASKS
from training import fit, quiet, worth

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "results.md"
SHARES = (0.01, 0.05, 0.1)
LIBRARIES = ("scikit-learn", "cleanlab", "scipy", "numpy")


def found(badness, wrong):
    """How well the scores tell wrong labels from right ones."""
    counts = {f"{share:g}": round(share * len(wrong)) for share in SHARES}
    precision = {share: precision_at_k(-badness, wrong, count) for share, count in counts.items()}
    return {"auroc": mislabel_auroc(-badness, wrong), "precision": precision}


def without_worst(task, data, badness, share, seed):
    """What the network is worth that was trained without the worst of the samples."""
    order = np.argsort(-badness, kind="stable")
    kept = torch.from_numpy(np.sort(order[round(share * len(order)) :]))
    return worth(fit(task, tuple(tensor[kept] for tensor in data.train), seed), data.test)


def part_of(run, name):
    """One method on one training: what it found, and what its advice was worth."""
    method = METHODS[name]
    badness = np.asarray(method.badness(run), dtype=np.float64)
    part = found(badness, run.data.wrong)
    if method.retrain:
        part["retrained"] = {
            f"{share:g}": without_worst(run.task, run.data, badness, share, run.seed) for share in SHARES
        }
    return part


def reference_of(run):
    """The training itself."""
    low, high = run.eigenvalues
    return {
        **worth(run.net, run.data.test),
        "train_accuracy": worth(run.net, run.data.train)["accuracy"],
        "wrong": float(run.data.wrong.mean()),
        "num_params": sum(param.numel() for param in run.net.parameters()),
        "num_test": len(run.data.test[1]),
        "eigenvalues": [low, high],
    }


def settings_of(task):
    """What the numbers of a task depend on besides its seeds."""
    settings = {name: value for name, value in asdict(task).items() if not callable(value)}
    libraries = {name: version(name) for name in LIBRARIES}
    return json.loads(json.dumps({"task": settings, "versions": versions() | libraries}))


def check_settings(task, folder):
    """Parts of other settings, or made with other versions, are not to be joined with those to come."""
    path, now = folder / "settings.json", settings_of(task)
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != now:
        raise SystemExit(f"{folder} holds results of other settings or versions; give another --work, or remove it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, now)


def run_seed(task, seed, folder, work, names):
    """Compute what is missing of one seed, the training itself under the name ``none``."""
    check_settings(task, work / task.name)
    paths = {name: work / task.name / f"seed{seed}" / f"{name}.json" for name in ("none", *names)}
    missing = [name for name, path in paths.items() if not path.exists()]
    if not missing:
        return
    with trained(task, seed, task.data(folder, seed)) as run:
        for name in missing:
            part = reference_of(run) if name == "none" else part_of(run, name)
            paths[name].parent.mkdir(parents=True, exist_ok=True)
            write_json(paths[name], part)
            print(task.name, seed, name, json.dumps(part), flush=True)


def gathered(work, task):
    """All of a task's parts in one object: seeds, then methods."""
    seeds = sorted((work / task.name).glob("seed*"), key=lambda path: int(path.name[4:]))
    parts = {
        int(folder.name[4:]): {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
        for folder in seeds
    }
    return json.loads((work / task.name / "settings.json").read_text(encoding="utf-8")) | {"seeds": parts}


def write_docs(work):
    for task in TASKS.values():
        if (work / task.name).is_dir():
            write_json(RESULTS / f"cleansing_{task.name}.json", gathered(work, task))
    PAGE.write_text(page(), encoding="utf-8")


def page():
    """``docs/results.md`` as the gathered JSON makes it."""
    paths = [RESULTS / f"cleansing_{name}.json" for name in TASKS]
    words = {name: (method.words, method.asks_validation) for name, method in METHODS.items()}
    return markdown([json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()], words)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with what fetch_data.py fetched")
    parser.add_argument("--task", choices=TASKS, action="append", help="default: all")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--work", type=Path, default=Path("runs/results"), help="where parts are kept")
    parser.add_argument("--write-docs", action="store_true", help="gather the parts and write the page")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "0")) or torch.get_num_threads())
    quiet()
    for seed in range(args.seeds if args.data else 0):
        for name in args.task or TASKS:
            run_seed(TASKS[name], seed, args.data, args.work, args.methods)
    if args.write_docs:
        write_docs(args.work)


if __name__ == "__main__":
    main()
