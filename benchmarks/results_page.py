# SPDX-License-Identifier: Apache-2.0
"""``docs/results.md`` from the gathered JSON: tables, and in words where ours wins, ties and loses."""

import math
import statistics
import textwrap

from scipy import stats

from baselines.influence_functions import damping_for

SHARES = {"0.01": "1%", "0.05": "5%", "0.1": "10%"}
WORST = "0.1"  # the share that the words are about
OURS = ("ours_exact_all", "ours_exact_1")  # compared in words: the paper's best variant, and the default
BOUND = "truth"
INTRODUCTION = """\
# What it finds, and what that is worth

Do the samples that rank first have wrong labels, and is a network better that was trained without them? Asked of
`SGDInfluence` and of other methods, on data whose wrong labels are known. This page is written by
`python benchmarks/results.py --write-docs` from the JSON files in `benchmarks/results/`, one a task. Computing them
takes `python benchmarks/fetch_data.py --data FOLDER` and `python benchmarks/results.py --data FOLDER`, and the extra
`benchmarks`.

One training is recorded. Each method ranks its training samples; the network is then trained again from the same
seed without the worst 1%, 5% and 10%, and tested on samples that nothing else has seen. All of it is repeated for
every seed, with other samples, flips and first weights. Training, validation and test samples are disjoint; validation
and test labels are right. Methods marked **v** look at the 1,000 validation samples, the others at the training samples
alone, so the former know more. Networks are small and trainings short, so that all of it runs on a CPU.

A sample that ranks first by influence need not have a wrong label: it is one whose absence is predicted to lower the
validation loss. Wrong labels that do no harm rank in the middle, and right labels that do rank in front. The two
questions therefore have different answers, and are kept apart below.
"""
EXPLANATION = """\
- **AUROC**: probability that a wrong label ranks before a right one; 0.5 is chance.
- **wrong among the worst**: how many of the first 1%, 5% and 10% have a wrong label, in percent.
- **accuracy**, **loss**: change on the test data by dropping so many, in points of accuracy and in cross entropy,
  against the training with all samples. The mean over seeds and its 95% interval (Student's t, so with three seeds the
  spread counts 2.5 times); in bold where it is an improvement beyond the interval, in italics where it is harm.
- Every row is one out of many: of 20 intervals that hold nothing, one is expected to leave zero out.
"""


def interval(values):
    """Mean and half the 95% interval of the mean; not a number for a single value."""
    if len(values) < 2:
        return statistics.mean(values), math.nan
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), float(half)


def clear_sign(values):
    """1 or -1 where the interval leaves out zero, else 0."""
    mean, half = interval(values)
    return int(math.copysign(1, mean)) if abs(mean) > half else 0


def over_seeds(seeds, name, figure):
    """A figure of a method, one number for each seed that has it."""
    return [figure(parts[name], parts["none"]) for parts in seeds.values() if name in parts]


def precision(share):
    return lambda part, none: 100 * part["precision"][share]


def accuracy(share):
    return lambda part, none: 100 * (part["retrained"][share]["accuracy"] - none["accuracy"])


def loss(share):
    return lambda part, none: part["retrained"][share]["loss"] - none["loss"]


def change(values, digits, better):
    """A cell: mean and interval, marked if it is clearly better or worse than nothing."""
    mean, half = interval(values)
    text = f"{mean:+.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")
    mark = {0: "", better: "**", -better: "*"}[clear_sign(values)]
    return f"{mark}{text}{mark}"


def row(seeds, name, words):
    text, asks_validation = words[name]
    cells = [f"{text} **v**" if asks_validation else text]
    cells.append(f"{statistics.mean(over_seeds(seeds, name, lambda part, none: part['auroc'])):.3f}")
    cells += [f"{statistics.mean(over_seeds(seeds, name, precision(share))):.0f}" for share in SHARES]
    if all("retrained" in parts[name] for parts in seeds.values() if name in parts):
        cells += [change(over_seeds(seeds, name, accuracy(share)), 1, 1) for share in SHARES]
        cells.append(change(over_seeds(seeds, name, loss(WORST)), 3, -1))
    else:
        cells += ["", "", "", ""]
    return f"| {' | '.join(cells)} |"


def compared(seeds, ours, others, figure, better):
    """Names of the methods that ours is better than, the same as, and worse than, by paired differences."""
    groups = {1: [], 0: [], -1: []}
    for other in others:
        both = [parts for parts in seeds.values() if ours in parts and other in parts]
        pairs = [(figure(parts[ours], parts["none"]), figure(parts[other], parts["none"])) for parts in both]
        groups[better * clear_sign([mine - theirs for mine, theirs in pairs])].append(other)
    return groups


def sentence(groups, words):
    """Wins, losses and ties as a line of text."""
    texts = {sign: ", ".join(words[name][0] for name in names) or "none" for sign, names in groups.items()}
    counts = {sign: len(names) for sign, names in groups.items()}
    return (
        f"better than {counts[1]} ({texts[1]}); worse than {counts[-1]} ({texts[-1]}); "
        f"no clear difference to {counts[0]} ({texts[0]})"
    )


def in_words(seeds, ours, words):
    """Where ours wins, ties and loses at 10%."""
    first = next(iter(seeds.values()))
    others = [name for name in words if name in first and not name.startswith("ours") and name != BOUND]
    retrained = [name for name in others if "retrained" in first[name]]
    lines = [f"**{words[ours][0]}**, against the others:", ""]
    for title, names, figure, better in (
        ("wrong labels among the worst 10%", others, precision(WORST), 1),
        ("accuracy without the worst 10%", retrained, accuracy(WORST), 1),
        ("test loss without the worst 10%", retrained, loss(WORST), -1),
    ):
        lines.append(f"- {title}: {sentence(compared(seeds, ours, names, figure, better), words)}.")
    return [*lines, ""]


def setting(result):
    """What was trained on what, in a few lines."""
    task, nones = result["task"], [parts["none"] for parts in result["seeds"].values()]

    def mean(key):
        return statistics.mean(none[key] for none in nones)

    low, high = (statistics.mean(none["eigenvalues"][side] for none in nones) for side in (0, 1))
    damping = statistics.mean(damping_for(none["eigenvalues"][0]) for none in nones)
    text = (
        f"{task['num_train']:,} training samples, {mean('wrong'):.1%} with a wrong label; a network of "
        f"{nones[0]['num_params']:,} parameters, {task['epochs']} epochs of SGD with momentum in batches of "
        f"{task['batch']}; {nones[0]['num_test']:,} test samples; {len(nones)} seeds. Trained on everything it gets "
        f"{mean('accuracy'):.1%} of the test samples right, {mean('train_accuracy'):.1%} of the training labels, and a "
        f"test loss of {mean('loss'):.3f}. The Hessian's extreme eigenvalues at the end are {low:.2f} and {high:.1f}; "
        f"influence functions are damped by {damping:.2f}."
    )
    return textwrap.wrap(text, 118)


def section(result, words):
    seeds = result["seeds"]
    names = [name for name in words if any(name in parts for parts in seeds.values())]
    head = ["method", "AUROC", *(f"wrong among the worst {text}" for text in SHARES.values())]
    head += [*(f"accuracy, {text} dropped" for text in SHARES.values()), "loss, 10% dropped"]
    lines = ["", f"## {result['task']['words']}", "", *setting(result), ""]
    lines += [f"| {' | '.join(head)} |", "|---" + "|---:" * (len(head) - 1) + "|"]
    lines += [row(seeds, name, words) for name in names]
    lines.append("")
    for ours in (name for name in OURS if name in names):
        lines += in_words(seeds, ours, words)
    return lines[:-1]


def markdown(results, words, closing=""):
    """The page.

    ``results`` are the gathered files, ``words`` maps a method to its words and whether it looks at validation data.
    """
    lines = [INTRODUCTION, EXPLANATION.rstrip("\n")]
    for result in results:
        lines += section(result, words)
    versions = ", ".join(f"{name} {number}" for name, number in results[0]["versions"].items() if number)
    return "\n".join([*lines, *([closing] if closing else []), "", f"Measured with {versions}, on a CPU.", ""])
