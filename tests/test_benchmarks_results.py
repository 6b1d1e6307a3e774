# SPDX-License-Identifier: Apache-2.0
"""docs/results.md has the figures of its JSON, and the baselines of the benchmark are what they are called."""

import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from captum.influence import TracInCP
from torch import nn
from torch.nn import functional as F

import methods
import results
import results_page
import tasks
import training
from baselines import (
    autoencoder,
    by_class,
    gradient_norm,
    gradients,
    influence_functions,
    isolation_forest,
    label_quality,
    last_loss,
    local_outlier_factor,
    one_class_svm,
    random_order,
    tracin,
)
from pages import assert_figures_are

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch's own forward mode


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double().eval()


def samples(count, seed):
    random = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 3, generator=random, dtype=torch.float64)
    return inputs, torch.randint(3, (count,), generator=random)


def gradient_rows(net, data):
    """Each sample's gradient, by as many backward passes: (N, P)."""
    rows = []
    for one, label in zip(*data, strict=True):
        grads = torch.autograd.grad(F.cross_entropy(net(one[None]), label[None]), list(net.parameters()))
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    return torch.stack(rows)


def dense_hessian(net, data):
    """The Hessian of the mean loss, by torch's own dense one: (P, P)."""
    names, params = zip(*net.named_parameters(), strict=True)

    def loss(flat):
        pieces = flat.split([param.numel() for param in params])
        values = {n: v.view_as(p) for n, v, p in zip(names, pieces, params, strict=True)}
        return F.cross_entropy(torch.func.functional_call(net, values, (data[0],)), data[1])

    return torch.autograd.functional.hessian(loss, torch.cat([param.detach().flatten() for param in params]))


def checkpoints_of(net):
    random = torch.Generator().manual_seed(3)
    for rate in (0.1, 0.05):
        state = {name: value.clone() for name, value in net.state_dict().items()}
        for name in [name for name, value in state.items() if value.is_floating_point()]:
            state[name] += 0.1 * torch.rand(state[name].shape, generator=random, dtype=torch.float64)
        yield state, rate


def test_gradients_along_a_direction_and_their_lengths_are_those_of_one_backward_a_sample(net):
    data, rows = samples(7, 1), gradient_rows(net, samples(7, 1))
    direction = torch.randn(rows.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(gradients.along(net, data, direction), rows @ direction)
    torch.testing.assert_close(gradients.squared_norms(net, data), rows.square().sum(1))
    torch.testing.assert_close(gradients.mean_gradient(net, data), rows.mean(0))
    np.testing.assert_allclose(gradient_norm.badness(net, data), rows.norm(dim=1))


def test_hessian_products_are_those_of_the_dense_hessian(net, monkeypatch):
    monkeypatch.setattr(gradients, "CHUNK", 3)
    data, hessian = samples(7, 1), dense_hessian(net, samples(7, 1))
    columns = [gradients.hessian_product(net, data, row) for row in torch.eye(len(hessian), dtype=torch.float64)]
    torch.testing.assert_close(torch.stack(columns), hessian)
    low, high = influence_functions.extreme_eigenvalues(net, data)
    eigenvalues = torch.linalg.eigvalsh(hessian)
    assert low == pytest.approx(float(eigenvalues[0]), abs=0.05 * float(eigenvalues[-1]))
    assert high == pytest.approx(float(eigenvalues[-1]), rel=0.05)


def test_influence_functions_by_cg_are_those_of_the_inverse_hessian(net):
    train, val, damping = samples(20, 1), samples(8, 2), 0.8
    hessian = dense_hessian(net, train)
    damped = hessian + damping * torch.eye(len(hessian), dtype=torch.float64)
    assert torch.linalg.eigvalsh(damped)[0] > 0
    solved = torch.linalg.solve(damped, gradient_rows(net, val).mean(0))
    expected = -gradient_rows(net, train) @ solved / 20
    solve = partial(influence_functions.solve_cg, net, train, damping=damping, rtol=1e-12)
    np.testing.assert_allclose(influence_functions.badness(net, train, val, solve), expected.numpy(), rtol=1e-6)


def test_influence_functions_predict_leaving_one_out_of_a_convex_problem():
    torch.manual_seed(0)
    net, train, val, penalty = nn.Linear(3, 3).double(), samples(300, 1), samples(30, 2), 0.1

    def validation_loss(kept):
        optimizer = torch.optim.LBFGS(net.parameters(), max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14)

        def closure():
            optimizer.zero_grad()
            losses = F.cross_entropy(net(train[0][kept]), train[1][kept], reduction="sum") / 300
            loss = losses + penalty / 2 * sum(param.square().sum() for param in net.parameters())
            loss.backward()
            return loss

        optimizer.step(closure)
        with torch.no_grad():
            return float(F.cross_entropy(net(val[0]), val[1]))

    everything = list(range(300))
    full = validation_loss(everything)
    solve = partial(influence_functions.solve_cg, net, train, damping=penalty, rtol=1e-10)
    predicted = -influence_functions.badness(net, train, val, solve)[:30]
    real = [validation_loss([j for j in everything if j != left_out]) - full for left_out in range(30)]
    np.testing.assert_allclose(predicted, real, rtol=0, atol=0.05 * np.abs(real).max())


def test_lissa_converges_to_cg(net):
    train, gradient = samples(20, 1), gradients.mean_gradient(net, samples(8, 2))
    exact = influence_functions.solve_cg(net, train, gradient, 0.8, rtol=1e-12)
    whole = {"damping": 0.8, "scale": 3.0, "depth": 60}
    # Batches drawn with replacement never are the whole: they only have its mean, which repeats approach.
    near = influence_functions.solve_lissa(net, train, gradient, **whole, batch=200)
    nearer = influence_functions.solve_lissa(net, train, gradient, **whole, batch=200, repeats=9)
    errors = [float((found - exact).norm() / exact.norm()) for found in (near, nearer)]
    assert errors[0] < 0.1
    assert errors[1] < 0.05


def test_tracin_is_that_of_brute_force_and_of_captum(net, tmp_path):
    train, val, saved = samples(9, 1), samples(5, 2), list(checkpoints_of(net))
    brute, brute_self = 0.0, 0.0
    for state, rate in saved:
        net.load_state_dict(state)
        rows = gradient_rows(net, train)
        brute -= rate * rows @ gradient_rows(net, val).mean(0)
        brute_self += rate * rows.square().sum(1)
    found, found_self = tracin.badness(net, saved, train, val), tracin.self_badness(net, saved, train)
    np.testing.assert_allclose(found, brute.numpy())
    np.testing.assert_allclose(found_self, brute_self.numpy())

    def load(model, saved_as):
        state, rate = torch.load(saved_as, weights_only=True)
        model.load_state_dict(state)
        return rate

    paths = []
    for number, pair in enumerate(saved):
        paths.append(str(tmp_path / f"{number}.pt"))
        torch.save(pair, paths[-1])
    peer = TracInCP(
        net,
        torch.utils.data.TensorDataset(*train),
        paths,
        checkpoints_load_func=load,
        loss_fn=nn.CrossEntropyLoss(reduction="none"),
        batch_size=4,
    )
    np.testing.assert_allclose(found, -peer.influence(val, aggregate=True)[0].numpy() / 5)
    np.testing.assert_allclose(found_self, peer.self_influence().numpy())


def test_last_loss_is_the_loss_of_each_sample(net):
    data = samples(6, 1)
    expected = [F.cross_entropy(net(one[None]), label[None]).item() for one, label in zip(*data, strict=True)]
    np.testing.assert_allclose(last_loss.badness(net, data), expected)


DETECTORS = [isolation_forest.badness, local_outlier_factor.badness, one_class_svm.badness, autoencoder.badness]


@pytest.mark.parametrize("detector", DETECTORS, ids=lambda detector: detector.__module__.partition(".")[2])
def test_detectors_rank_strangers_first(detector):
    random = np.random.default_rng(0)
    points = random.standard_normal((400, 3)) @ random.standard_normal((3, 30))  # on a plane of three dimensions
    points[[3, 60]] += 6 * random.standard_normal((2, 30))
    assert set(np.argsort(-detector(points))[:2]) == {3, 60}


def test_within_classes_a_wrong_label_is_a_stranger():
    random = np.random.default_rng(0)
    labels = np.repeat([0, 1], 50)
    points = random.standard_normal((100, 2)) + 8 * labels[:, None]
    labels[[4, 70]] = 1 - labels[[4, 70]]
    found = by_class.badness(points, labels, local_outlier_factor.badness)
    assert set(np.argsort(-found)[:2]) == {4, 70}


def test_label_quality_asks_networks_that_have_not_seen_the_sample():
    labels = np.array([0, 1, 2] * 10)
    asked = []

    def predict(train_rows, rows):
        assert not set(train_rows) & set(rows)
        asked.extend(rows)
        return np.eye(3)[labels[rows]] * 0.8 + 0.2 / 3

    probabilities = label_quality.out_of_sample(labels, predict)
    assert sorted(asked) == list(range(30))
    np.testing.assert_array_equal(probabilities.argmax(1), labels)
    given = labels.copy()
    given[5] = 0
    for method in ("self_confidence", "normalized_margin"):
        assert np.argmax(label_quality.badness(given, probabilities, method)) == 5


def test_random_order_is_that_of_the_seed():
    assert random_order.badness(5, 1).tolist() == random_order.badness(5, 1).tolist()
    assert random_order.badness(5, 1).tolist() != random_order.badness(5, 2).tolist()


@pytest.fixture
def folder(tmp_path):
    """Ten bright and ten dark patterns a class, in the form of MNIST."""
    random = np.random.default_rng(0)
    prototypes = random.integers(0, 256, (10, 28, 28))

    def split(count):
        labels = np.arange(count) % 10
        images = np.clip(prototypes[labels] + random.integers(-60, 60, (count, 28, 28)), 0, 255)
        return images.astype(np.uint8), labels.astype(np.uint8)

    train, test = split(400), split(1200)
    np.savez(tmp_path / "mnist.npz", x_train=train[0], y_train=train[1], x_test=test[0], y_test=test[1])
    return tmp_path


def test_ranking_and_judging_samples_are_disjoint_and_flips_are_what_they_are_called(folder):
    data = tasks.TASKS["mnist"].smaller(200, 1).data(folder, 0)
    whole = np.load(folder / "mnist.npz", allow_pickle=False)
    assert data.wrong.sum() == 20
    assert len(data.val[1]) == 1000
    assert len(data.test[1]) == 200
    parts = [{image.numpy().tobytes() for image in part[0]} for part in (data.train, data.val, data.test)]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]
    images, labels = tasks.samples(whole["x_train"][..., None], whole["y_train"], (0.1307,), (0.3081,))
    truth = {image.numpy().tobytes(): int(label) for image, label in zip(images, labels, strict=True)}
    given = zip(data.train[0], data.train[1].tolist(), strict=True)
    wrong = [truth[image.numpy().tobytes()] != label for image, label in given]
    np.testing.assert_array_equal(wrong, data.wrong)


def test_a_run_in_little_leaves_a_part_for_each_method_and_is_not_repeated(folder, tmp_path, monkeypatch, capsys):
    task, work = tasks.TASKS["mnist"].smaller(200, 2), tmp_path / "work"
    monkeypatch.setattr(tasks, "NUM_VAL", 300)
    names = ["ours_exact_all", "truth", "lof_by_class"]
    results.run_seed(task, 0, folder, work, names)
    gathered = results.gathered(work, task)
    parts = gathered["seeds"][0]
    assert set(parts) == {"none", *names}
    assert parts["truth"]["auroc"] == 1
    assert parts["truth"]["precision"] == {"0.01": 1, "0.05": 1, "0.1": 1}
    assert set(parts["ours_exact_all"]["retrained"]) == {"0.01", "0.05", "0.1"}
    assert "retrained" not in parts["lof_by_class"]
    words = {name: (method.words, method.asks_validation) for name, method in methods.METHODS.items()}
    assert "| the wrong labels themselves | 1.000 | 100 | 100 | 100 |" in results_page.markdown([gathered], words)
    monkeypatch.setattr(results, "trained", None)  # would be called
    results.run_seed(task, 0, folder, work, names)
    capsys.readouterr()


def test_scores_of_ours_are_minus_the_influence_of_each_sample(folder, monkeypatch):
    monkeypatch.setattr(tasks, "NUM_VAL", 300)
    task = tasks.TASKS["mnist"].smaller(200, 1)
    with methods.trained(task, 0, task.data(folder, 0)) as run:
        found = methods.ours(run, "exact", "all")
        train, val = training.loaders(task, run.data.train, run.data.val)
        options = {"train_dataloaders": train, "val_dataloaders": val, "curvature": "exact"}
        ranking = methods.retrace(run.run_dir, training.module_of(task), **options)
        assert len(run.checkpoints) == 1
    assert {int(name): -float(found[name]) for name in ranking.sample_id} == pytest.approx(
        dict(zip(ranking.sample_id.tolist(), ranking.influence.tolist(), strict=True)), rel=1e-5
    )


def test_intervals_are_student_s():
    mean, half = results_page.interval([1.0, 2.0, 6.0])
    assert mean == 3
    assert half == pytest.approx(4.302653 * math.sqrt(7) / math.sqrt(3))
    assert results_page.clear_sign([1.0, 2.0, 6.0]) == 0
    assert results_page.clear_sign([-1.0, -1.1, -1.2]) == -1
    assert results_page.clear_sign([0.0, 0.0, 0.0]) == 0


def test_figures_of_the_page_are_those_of_the_json_and_so_is_which_method_it_calls_better():
    page, measured = (ROOT / "docs" / "results.md").read_text(encoding="utf-8"), results.page()
    assert_figures_are(page, measured)
    verdicts = [line for line in measured.splitlines() if line.startswith("- ") and "better than" in line]
    assert verdicts
    assert [line for line in verdicts if line not in page.splitlines()] == []


def test_gathered_results_name_methods_that_exist():
    for path in results.RESULTS.glob("cleansing_*.json"):
        for parts in json.loads(path.read_text(encoding="utf-8"))["seeds"].values():
            assert set(parts) <= {"none", *methods.METHODS}
