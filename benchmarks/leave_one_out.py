# SPDX-License-Identifier: Apache-2.0
"""How well predicted influences agree with really leaving samples out, on the 2019 paper's small tasks.

    python benchmarks/fetch_data.py --data runs/data
    python benchmarks/leave_one_out.py --data runs/data
    python benchmarks/leave_one_out.py --write-docs

For each seed a model is trained and recorded, each of its 200 samples is left out of all steps by
``counterfactual``, and the differences are held against what each engine, and influence functions, had predicted.
What is in ``--work`` is not computed again.
"""

import argparse
import json
import os
import statistics
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from baselines import influence_functions
from lightning_sgdclean import SGDInfluence, counterfactual, retrace
from lightning_sgdclean.base.errors import NonFiniteError
from lightning_sgdclean.base.files import write_json
from lightning_sgdclean.base.resources import versions
from lightning_sgdclean.ranking.agreement import kendall_tau, spearman, top_k_jaccard
from papers_tasks import NUM, SETTINGS, PapersModel, penalty_of, samples
from silent import silent_trainer
from training import quiet

ROOT = Path(__file__).resolve().parent.parent
RESULT, PAGE = ROOT / "benchmarks" / "results" / "leave_one_out.json", ROOT / "docs" / "agreement.md"
ENGINES = ("exact", "finite", "none")
WORDS = {
    "exact": '`curvature="exact"`',
    "finite": '`curvature="finite"`',
    "none": '`curvature="none"`',
    "influence_function": "influence function",
}
MEASURES = {"tau": kendall_tau, "jaccard": partial(top_k_jaccard, k=10), "spearman": spearman}
HEAD = """\
# How well predictions agree with leaving samples out

The question that an influence answers can be asked of the training itself: run it again without the sample. On the
small tasks of the 2019 paper this is done for every one of the 200 training samples, and the differences of the
validation loss are held against the predicted ones. Leaving out means weight zero in the recorded batches of all
epochs, so that nothing else changes. This page is written by `python benchmarks/leave_one_out.py --write-docs`.

- **tau**: Kendall's rank correlation; **Jaccard**: of the 10 lowest together with the 10 highest. Mean over seeds, with
  the standard deviation between seeds. Every seed has other samples and first weights.
- **paper**: the accuracy that the paper's authors print for their own code, means of 30 runs. Their Adult columns are
  grouped a little differently, and their influence functions are solved by SGD.
- Influence functions here: CG on the final weights, damped by the penalty (linear) or by 1 (networks), as in the paper.
"""


def predictions(setting, run_dir, model, data):
    """What each engine and influence functions say of each sample: name -> ``(200,)``."""
    train, val = data
    loaders = loaders_of(setting, train, val)
    result = {}
    for engine in ENGINES:
        ranking = retrace(run_dir, model(), **loaders, epochs="all", curvature=engine)
        result[engine] = np.zeros(NUM)
        result[engine][ranking.sample_id] = ranking.influence
    return result


def loaders_of(setting, train, val):
    return {
        "train_dataloaders": DataLoader(TensorDataset(*train), setting.batch, shuffle=True),
        "val_dataloaders": DataLoader(TensorDataset(*val), NUM),
    }


def by_influence_function(setting, net, penalty, train, val):
    damping = 1.0 if setting.is_network else penalty
    solve = partial(influence_functions.solve_cg, net, train, damping=damping, rtol=1e-4, iterations=200)
    return -influence_functions.badness(net, train, val, solve)


def measured(setting, folder, seed):
    """Agreement of every prediction with really leaving out, for one seed."""
    train, val = data = samples(setting, folder, seed)
    penalty = penalty_of(setting, train, seed)

    def model():
        return PapersModel(setting, train[0].shape[1], penalty)

    with TemporaryDirectory() as temporary:
        run_dir = Path(temporary) / "run"
        pl.seed_everything(seed, verbose=False)
        trained = model()
        callback = SGDInfluence("val_loss", verify=0, epochs="all", curvature="none", dirpath=run_dir, page=False)
        silent_trainer(setting.epochs, [callback]).fit(trained, **loaders_of(setting, train, val))
        try:
            predicted = predictions(setting, run_dir, model, data)
        except NonFiniteError as error:  # with the largest penalties the first steps throw the weights about
            return {"refused": str(error), "penalty": float(penalty)}
        predicted["influence_function"] = by_influence_function(setting, trained.net, penalty, train, val)
        left_out = counterfactual(run_dir, model(), without=range(NUM), epochs="all", **loaders_of(setting, train, val))
    assert left_out.names == list(range(NUM))
    real = left_out.differences
    figures = {
        name: {key: measure(values, real) for key, measure in MEASURES.items()} for name, values in predicted.items()
    }
    return {"agreement": figures, "spread": float(real.std()), "loss": left_out.whole, "penalty": float(penalty)}


def gathered(work):
    return {
        "versions": versions(),
        "settings": {
            name: [json.loads(path.read_text()) for path in sorted((work / name).glob("seed*.json"))]
            for name in SETTINGS
        },
    }


def cell(parts, method, measure):
    values = [part["agreement"][method][measure] for part in parts]
    spread = f" ({statistics.stdev(values):.2f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def words_of(refused):
    """Which seeds could not be ranked, and why."""
    if not refused:
        return ""
    penalties = ", ".join(f"{part['penalty']:.3g}" for part in refused)
    return (
        f" In {len(refused)} more the ranking was refused because influences overflow: cross-validation chose a "
        f"penalty ({penalties}) with which the first steps diverge."
    )


def markdown(result):
    """The page that the gathered figures make."""
    lines = [HEAD]
    for name, setting in SETTINGS.items():
        parts = [part for part in result["settings"][name] if "agreement" in part]
        refused = [part for part in result["settings"][name] if "refused" in part]
        paper = dict(zip(("tau", "jaccard"), setting.paper[:2], strict=True))
        papers_functions = dict(zip(("tau", "jaccard"), setting.paper[2:], strict=True))
        lines += [f"## {setting.words}", "", f"{len(parts)} seeds.{words_of(refused)}", ""]
        lines += ["| method | tau | paper | Jaccard | paper |", "|---|---:|---:|---:|---:|"]
        for method, words in WORDS.items():
            theirs = {"exact": paper, "influence_function": papers_functions}.get(method, {})
            cells = [words]
            for measure in ("tau", "jaccard"):
                cells += [cell(parts, method, measure), f"{theirs[measure]:.2f}" if theirs else ""]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    numbers = ", ".join(f"{name} {number}" for name, number in result["versions"].items() if number)
    return "\n".join([*lines, f"Measured with {numbers}, on a CPU.", ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with what fetch_data.py fetched")
    parser.add_argument("--seeds", type=int, default=9, help="how many")
    parser.add_argument("--work", type=Path, default=Path("runs/leave_one_out"), help="where parts are kept")
    parser.add_argument("--write-docs", action="store_true", help="gather the parts and write the page")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "0")) or torch.get_num_threads())
    quiet()
    for seed in range(args.seeds if args.data else 0):
        for name, setting in SETTINGS.items():
            path = args.work / name / f"seed{seed:02}.json"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                part = measured(setting, args.data, seed)
                write_json(path, part)
                print(name, seed, json.dumps(part), flush=True)
    if args.write_docs:
        result = gathered(args.work)
        write_json(RESULT, result)
        PAGE.write_text(markdown(result), encoding="utf-8")


if __name__ == "__main__":
    main()
