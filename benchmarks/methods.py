# SPDX-License-Identifier: Apache-2.0
"""Every method that is compared: its words, whether it sees the validation data, and how it is called."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from torch import nn

from baselines import (
    autoencoder,
    by_class,
    gradient_norm,
    influence_functions,
    isolation_forest,
    label_quality,
    last_loss,
    local_outlier_factor,
    one_class_svm,
    random_order,
    tracin,
)
from baselines.gradients import features, probabilities
from lightning_sgdclean import SGDInfluence, retrace
from tasks import Data, Task
from training import Checkpoints, fit, loaders, module_of

HESSIAN_SAMPLES = 1000  # of the training data, for influence functions by CG; half of them for the eigenvalues
DETECTORS = {
    "isolation_forest": ("isolation forest", isolation_forest.badness),
    "lof": ("local outlier factor", local_outlier_factor.badness),
    "one_class_svm": ("one-class SVM", one_class_svm.badness),
    "autoencoder": ("autoencoder", autoencoder.badness),
}


@dataclass(frozen=True)
class Trained:
    """A recorded training, and what several methods ask of it."""

    task: Task
    seed: int
    data: Data
    net: nn.Sequential
    checkpoints: list
    run_dir: Path

    @cached_property
    def raw(self) -> np.ndarray:
        return self.data.train[0].flatten(1).numpy()

    @cached_property
    def features(self) -> np.ndarray:
        return features(self.net, self.data.train[0]).numpy()

    @cached_property
    def eigenvalues(self) -> tuple[float, float]:
        return influence_functions.extreme_eigenvalues(self.net, self.some(HESSIAN_SAMPLES // 2))

    @cached_property
    def out_of_sample(self) -> np.ndarray:
        inputs, labels = self.data.train

        def predict(train_rows, rows):
            net = fit(self.task, (inputs[train_rows], labels[train_rows]), self.seed)
            return probabilities(net, inputs[rows]).numpy()

        return label_quality.out_of_sample(labels.numpy(), predict, seed=self.seed)

    def some(self, count):
        return tuple(tensor[:count] for tensor in self.data.train)


@contextmanager
def trained(task: Task, seed: int, data: Data) -> Iterator[Trained]:
    """Train once, recorded from the first step on; the record lies in a temporary folder."""
    with TemporaryDirectory() as folder:
        record = SGDInfluence("val_loss", verify=0, epochs="all", curvature="none", dirpath=Path(folder) / "run")
        checkpoints = Checkpoints()
        net = fit(task, data.train, seed, data.val, [checkpoints, record])
        yield Trained(task, seed, data, net, checkpoints.kept, record.run_dir)


def ours(run, curvature, epochs):
    train, val = loaders(run.task, run.data.train, run.data.val)
    options = {"train_dataloaders": train, "val_dataloaders": val, "curvature": curvature, "epochs": epochs}
    ranking = retrace(run.run_dir, module_of(run.task), **options)
    result = np.zeros(len(run.data.wrong))
    result[ranking.sample_id] = -ranking.influence
    return result


def influence(run, solver):
    low, high = run.eigenvalues
    damping = influence_functions.damping_for(low)
    if solver == "cg":
        solve = partial(influence_functions.solve_cg, run.net, run.some(HESSIAN_SAMPLES), damping=damping)
    else:
        options = {"damping": damping, "scale": 3 * high + damping, "seed": run.seed}
        solve = partial(influence_functions.solve_lissa, run.net, run.data.train, **options)
    return influence_functions.badness(run.net, run.data.train, run.data.val, solve)


def over_checkpoints(run, badness, *data):
    net = run.task.build().eval()
    return badness(net, run.checkpoints, *data)


def truth(run):
    return run.data.wrong + random_order.badness(len(run.data.wrong), run.seed) / 2


@dataclass(frozen=True)
class Method:
    """A way to say how bad each training sample is."""

    words: str
    badness: Callable[[Trained], np.ndarray]
    asks_validation: bool = False
    retrain: bool = True


def ours_methods():
    words = {"exact": "exact", "finite": "finite", "none": "without Hessian"}
    for curvature, epochs in (("exact", "all"), ("finite", "all"), ("exact", 1), ("finite", 1), ("none", "all")):
        window = "whole training" if epochs == "all" else "last epoch"
        call = partial(ours, curvature=curvature, epochs=epochs)
        yield f"ours_{curvature}_{epochs}", Method(f"SGDInfluence, {words[curvature]}, {window}", call, True)


def detector_methods():
    for name, (words, detector) in DETECTORS.items():
        yield f"{name}_raw", Method(f"{words}, inputs", lambda run, ask=detector: ask(run.raw))
        yield f"{name}_features", Method(f"{words}, features", lambda run, ask=detector: ask(run.features))
        within = Method(
            f"{words}, features, within each class",
            lambda run, ask=detector: by_class.badness(run.features, run.data.train[1].numpy(), ask),
            retrain=False,
        )
        yield f"{name}_by_class", within


def quality(run, method):
    return label_quality.badness(run.data.train[1], run.out_of_sample, method)


METHODS = {
    **dict(ours_methods()),
    "random": Method("random", lambda run: random_order.badness(len(run.data.wrong), run.seed)),
    "truth": Method("the wrong labels themselves", truth),
    "last_loss": Method("loss at the end", lambda run: last_loss.badness(run.net, run.data.train)),
    "influence_cg": Method("influence function, CG", partial(influence, solver="cg"), True),
    "influence_lissa": Method("influence function, LiSSA", partial(influence, solver="lissa"), True),
    "tracin": Method("TracIn", lambda run: over_checkpoints(run, tracin.badness, run.data.train, run.data.val), True),
    "tracin_self": Method(
        "self-influence, TracIn", lambda run: over_checkpoints(run, tracin.self_badness, run.data.train)
    ),
    "gradient_norm": Method("gradient norm at the end", lambda run: gradient_norm.badness(run.net, run.data.train)),
    "self_confidence": Method("cleanlab, self-confidence", partial(quality, method="self_confidence")),
    "normalized_margin": Method("cleanlab, normalized margin", partial(quality, method="normalized_margin")),
    **dict(detector_methods()),
}
