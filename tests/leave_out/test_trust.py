# SPDX-License-Identifier: Apache-2.0
"""What is said of a ranking's trust is what whole fits without the samples say; rerank puts the truth in its place."""

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pytorch_lightning.callbacks import LambdaCallback, ModelCheckpoint
from scipy import stats
from torch.nn import functional as F

from cases import CASES, NUM_TRAIN, Case, Plain, adam, fit, loaders, objective, scaled
from left_out import again, weights_without, without
from lightning_sgdclean import Ranking, SGDInfluence, retrace, retracing
from lightning_sgdclean.base.errors import SGDInfluenceWarning
from lightning_sgdclean.leave_out import trust as trust_room
from lightning_sgdclean.leave_out.trust import stratified
from lightning_sgdclean.report import words as report
from lightning_sgdclean.report.words import TrustLine, trust_lines
from reference import leave_one_out, ranked

CASE = Case("verified", {"norm": True, "dropout": 0.2, "options": {"momentum": 0.9, "lr": 0.05}})
STEPS_TOO_LARGE = Case("steps too large", {"options": {"lr": 20.0, "momentum": 0.9}})


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return ranked(CASE, verify="auto", dirpath=tmp_path_factory.mktemp("plain") / "run")


@pytest.fixture(scope="module")
def verified(tmp_path_factory):
    return ranked(CASE, verify=12, dirpath=tmp_path_factory.mktemp("verified") / "run")


@pytest.fixture(scope="module")
def truth():
    return leave_one_out(CASE)


def test_the_figures_are_those_of_whole_fits(plain, verified, truth):
    trust, ids = verified.summary["trust"], plain.ranking.sample_id
    samples = trust["samples"]
    assert samples["id"][:8] == [*ids[:4], *ids[-4:]]
    assert samples["stratum"] == ["worst"] * 4 + ["best"] * 4 + ["random"] * 4
    assert samples["real"] == pytest.approx(truth[samples["id"]], rel=1e-6, abs=1e-13)
    influence = dict(zip(ids.tolist(), plain.ranking.influence.tolist(), strict=True))
    predicted = [influence[name] for name in samples["id"]]
    assert samples["predicted"] == predicted
    real = truth[samples["id"]]
    assert trust["kendall_tau"] == pytest.approx(stats.kendalltau(predicted, real).statistic)
    assert trust["kendall_tau_random"] == pytest.approx(stats.kendalltau(predicted[8:], real[8:]).statistic)
    assert trust["spearman"] == pytest.approx(stats.spearmanr(predicted, real).statistic)
    ends = [{*np.argsort(column)[:4], *np.argsort(column)[-4:]} for column in (predicted, real)]
    assert trust["jaccard"] == pytest.approx(len(ends[0] & ends[1]) / len(ends[0] | ends[1]))
    assert (trust["num_verified"], trust["num_reranked"], trust["jaccard_k"]) == (12, 0, 4)


def test_samples_left_out_together_are_those_of_whole_fits(verified):
    trust, whole = verified.summary["trust"], verified.summary["objective"]["recomputed"]
    for key, ids in (("together", trust["samples"]["id"]), ("worst_together", trust["samples"]["id"][:4])):
        real, predicted = without(CASE, ids) - whole, sum(trust["samples"]["predicted"][: len(ids)])
        assert trust[key]["real"] == pytest.approx(real, rel=1e-6)
        assert trust[key]["predicted"] == pytest.approx(predicted)
        assert trust[key]["error"] == pytest.approx(abs(predicted - real) / abs(real), rel=1e-5)


def test_verifying_changes_nothing_but_a_column(plain, verified):
    assert np.array_equal(verified.ranking.influence, plain.ranking.influence)
    assert np.array_equal(verified.ranking.sample_id, plain.ranking.sample_id)
    real = verified.ranking.columns["real"]
    samples = verified.summary["trust"]["samples"]
    found = dict(zip(verified.ranking.sample_id.tolist(), real.tolist(), strict=True))
    assert [found[name] for name in samples["id"]] == samples["real"]
    assert np.isnan(real).sum() == NUM_TRAIN - 12
    assert "real" not in plain.ranking.columns


def test_training_and_random_states_are_untouched():
    def trained(callback):
        module = fit(CASE, callback)
        return {name: tensor.clone() for name, tensor in module.state_dict().items()}, torch.get_rng_state()

    (one, state), (other, other_state) = trained(None), trained(SGDInfluence(verify=6, rerank=2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(state, other_state)


def test_every_figure_stands_in_the_summary_on_the_terminal_and_on_the_page(verified):
    trust = verified.summary["trust"]
    said = [
        "12 samples really left out (4 worst, 4 best, 4 random)",
        f"tau {trust['kendall_tau']:.2f} ({trust['kendall_tau_random']:.2f} among the random ones)",
        f"Spearman {trust['spearman']:.2f}, Jaccard {trust['jaccard']:.2f}",
        *(
            f"{name} together {sums['real']:.3g}, predicted {sums['predicted']:.3g}, off by {sums['error']:.0%}"
            for name, sums in (("all of them", trust["together"]), ("the worst", trust["worst_together"]))
        ),
        f"{trust['num_within_noise']} of 12 within noise",
        f"rounding alone {trust['noise_floor']:.1g}",
    ]
    in_file = json.loads((verified.run_dir / "summary.json").read_text())["trust"]
    terminal = report.closing_text(verified.ranking, verified.summary, verified.run_dir)
    page = (verified.run_dir / "report.html").read_text(encoding="utf-8")
    assert in_file == trust
    assert trust["doubts"] == []
    for words in said:
        for text in (trust["words"], terminal, page):
            assert words in text
    assert trust_lines(verified.summary)[-1] == TrustLine("Leave-one-out", trust["words"], "plain")


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (Case("hardly a step", {"options": {"lr": 1e-8}}, {"precision": "32-true"}), "most differences are within"),
        (STEPS_TOO_LARGE, "tau is below 0.3"),
    ],
    ids=str,
)
def test_what_is_not_to_be_trusted_is_doubted_everywhere(case, words):
    callback = ranked(case, verify=12)
    trust = callback.summary["trust"]
    (doubt,) = [doubt for doubt in trust["doubts"] if words in doubt]
    assert trust["words"].startswith("Do not trust the order: ")
    assert doubt in report.closing_text(callback.ranking, callback.summary, callback.run_dir)
    assert doubt in (callback.run_dir / "report.html").read_text(encoding="utf-8")
    assert trust_lines(callback.summary)[-1].state == "warning"


# By default ---------------------------------------------------------------------------------------------


def test_by_default_a_few_are_left_out_and_one_sentence_says_what_came_of_it(plain, truth):
    trust = plain.summary["trust"]
    samples = trust["samples"]
    assert trust["num_verified"] >= 4
    assert samples["stratum"][:4] == ["worst", "best", "random", "random"]
    assert samples["id"][:2] == [plain.ranking.sample_id[0], plain.ranking.sample_id[-1]]
    assert samples["real"] == pytest.approx(truth[samples["id"]], rel=1e-6, abs=1e-13)
    assert trust["verdict"].startswith(f"Leaving out {trust['num_verified']} samples for real agreed with the ranking")
    assert trust["words"].startswith(trust["verdict"])
    assert report.closing_text(plain.ranking, plain.summary, plain.run_dir).count(trust["verdict"]) == 1
    assert "Rounding alone" not in report.closing_text(plain.ranking, plain.summary, plain.run_dir)
    assert trust["verdict"] in (plain.run_dir / "report.html").read_text(encoding="utf-8")
    assert json.loads((plain.run_dir / "summary.json").read_text())["trust"] == trust


def test_none_are_left_out_where_nobody_wants_it_yet_sizes_are_looked_at(plain):
    trust = ranked(CASE, verify=0).summary["trust"]
    assert (trust["num_verified"], trust["samples"]["id"], trust["runs"]) == (0, [], "")
    assert trust["verdict"] == "No sample was left out for real to test the order (verify=0)."
    for key in ("influence_sum", "influence_largest", "objective_before", "objective_at_end", "adjoint_growth"):
        assert trust[key] == plain.summary["trust"][key]


def test_sizes_are_those_of_the_ranking_and_of_whole_fits(plain):
    trust, influence = plain.summary["trust"], plain.ranking.influence
    assert trust["influence_sum"] == pytest.approx(influence.sum())
    assert abs(trust["influence_largest"]) == np.abs(influence).max()
    untrained = CASE.make(**CASE.module)
    assert trust["objective_before"] == pytest.approx(objective(untrained), rel=1e-9)
    assert trust["objective_at_end"] == pytest.approx(objective(fit(CASE)), rel=1e-9)


def test_with_time_left_more_are_left_out(plain, truth, monkeypatch):
    monkeypatch.setattr(retracing, "_SHARE", 1e6)
    callback = ranked(CASE, verify="auto")
    trust = callback.summary["trust"]
    assert trust["num_verified"] == NUM_TRAIN
    assert trust["samples"]["real"] == pytest.approx(truth[trust["samples"]["id"]], rel=1e-6, abs=1e-13)
    assert callback.ranking == plain.ranking  # how many they are depends on the clock, the ranking does not


def test_when_the_time_is_up_what_is_not_done_is_given_up(plain, monkeypatch):
    now, begun, runs = [0.0], [], trust_room.leave_out

    def watched(this, groups, *, progress, **given):
        begun.append(len(groups))

        def later(done, total):
            now[0] += 1e6 if len(begun) == 2 else 1e-3
            progress(done, total)

        return runs(this, groups, progress=later, **given)

    monkeypatch.setattr(retracing, "_SHARE", 1e4)
    monkeypatch.setattr(trust_room, "leave_out", watched)
    monkeypatch.setattr(trust_room, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    callback = ranked(CASE, verify="auto")
    assert begun == [4, NUM_TRAIN - 4]
    assert callback.summary["trust"]["num_verified"] == 4
    assert callback.ranking == plain.ranking


def test_what_nobody_asked_for_fails_without_a_warning():
    callback = ranked(CASES["sgd"], objective=Tired(CALLS, RuntimeError("out of coffee")), verify="auto")
    trust = callback.summary["trust"]
    assert trust["verdict"].endswith("so the order is untested: RuntimeError: out of coffee")
    assert trust["failure"] == "RuntimeError: out of coffee"
    assert (trust["num_verified"], trust["doubts"]) == (0, [])
    assert trust["influence_sum"] == pytest.approx(callback.ranking.influence.sum())


def test_of_a_training_whose_derivative_explodes_the_order_is_not_to_be_trusted():
    callback = ranked(STEPS_TOO_LARGE, verify="auto")
    assert callback.summary["trust"]["verdict"].startswith("Do not trust the order: ")
    assert trust_lines(callback.summary)[-1].state == "warning"


class Quadratic(Plain):
    """Linear least squares, so that the Hessian stays as it is."""

    def loss(self, batch, reduction="mean"):
        return F.mse_loss(self.net(batch[0]), F.one_hot(batch[1], 3).to(batch[0].dtype), reduction=reduction)


def test_the_adjoint_grows_as_the_hessian_says():
    case = Case(
        "quadratic", {"net": lambda: torch.nn.Linear(5, 3), "options": {"lr": 6.0}}, {}, {"batch_size": 23}, Quadratic
    )
    growth = ranked(case, verify=0).summary["trust"]["adjoint_growth"]
    module = fit(case)
    (x, *_), (val_x, val_y, _) = (data.tensors for data in (case.train, case.val))
    inputs = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    val_inputs = torch.cat([val_x, torch.ones(len(val_x), 1)], 1).double()
    weights = torch.cat([module.net.weight, module.net.bias[:, None]], 1).detach()
    adjoint = (val_inputs @ weights.T - F.one_hot(val_y, 3)).T @ val_inputs / len(val_inputs)
    step = torch.eye(6).double() - 6.0 * (2 / 3) * inputs.T @ inputs / len(inputs)
    norms = [float((adjoint @ torch.linalg.matrix_power(step, n)).norm() / adjoint.norm()) for n in (3, 2, 1)]
    assert growth["epoch"] == [0, 1, 2]
    assert growth["factor"] == pytest.approx(norms)
    assert norms[0] > 5


# Reranked -----------------------------------------------------------------------------------------------


def test_the_worst_are_ranked_by_what_really_happens(plain, truth, tmp_path):
    callback = ranked(CASE, rerank=6, verify=3, dirpath=tmp_path / "run")
    before = dict(zip(plain.ranking.sample_id.tolist(), plain.ranking.influence.tolist(), strict=True))
    ranking = callback.ranking
    known = {*plain.ranking.sample_id[:6].tolist(), *callback.summary["trust"]["samples"]["id"]}
    assert len(known) in (7, 8)
    for name, influence, real, predicted in zip(
        ranking.sample_id.tolist(),
        ranking.influence.tolist(),
        ranking.columns["real"].tolist(),
        ranking.columns["predicted"].tolist(),
        strict=True,
    ):
        assert predicted == before[name]
        assert math.isnan(real) == (name not in known)
        assert influence == (real if name in known else predicted)
        if name in known:
            assert real == pytest.approx(truth[name], rel=1e-6, abs=1e-13)
    assert (np.diff(ranking.influence) >= 0).all()
    assert Ranking.load(tmp_path / "run") == ranking
    assert "the 6 worst ranked by what leaving them out really does" in callback.summary["trust"]["words"]


def test_reranked_alone_there_is_no_agreement_to_report():
    trust = ranked(CASES["sgd"], rerank=4, verify=0).summary["trust"]
    assert trust["kendall_tau"] is trust["together"] is None
    assert trust["samples"]["stratum"] == ["reranked"] * 4
    assert (trust["num_verified"], trust["num_reranked"]) == (0, 4)


def test_more_than_there_are_means_all(truth):
    callback = ranked(CASE, rerank=100, verify=100)
    assert callback.ranking.influence == pytest.approx(np.sort(truth), rel=1e-6, abs=1e-13)
    assert callback.summary["trust"]["num_verified"] == NUM_TRAIN


def test_a_value_that_should_be_high_has_the_sign_of_an_influence():
    trust = ranked(CASES["sgd"], mode="max", verify=9).summary["trust"]
    assert trust["kendall_tau"] > 0.9
    assert trust["samples"]["real"][0] < 0
    assert trust["samples"]["real"][0] == pytest.approx(
        -(without(CASES["sgd"], [trust["samples"]["id"][0]]) - objective(fit(CASES["sgd"]))), rel=1e-6
    )


def test_a_smooth_training_is_predicted_well():
    case = Case("smooth", {"options": {"lr": 0.02}})
    trust = ranked(case, verify=23).summary["trust"]
    assert trust["kendall_tau"] > 0.97
    assert trust["worst_together"]["error"] < 0.2
    assert trust["num_within_noise"] == 0


# Training that diverges -------------------------------------------------------------------------------------


class Edge:
    """A function of one weight that ends at a limit, as the logarithm or the root of what is left until there."""

    def __init__(self, function, limit):
        self.function, self.limit = function, limit
        self.__name__ = "edge"

    def __call__(self, module, batch):
        return self.function(self.limit - module.net[0].bias[0])


EDGE = Case("edge", {"options": {"lr": 0.05}})


@pytest.fixture(scope="module")
def beyond():
    """Samples by how far the weight goes without them, each alone, and a limit that two of them go beyond."""
    twins = [fit(EDGE, weights=weights_without([i])).net[0].bias[0].item() for i in range(NUM_TRAIN)]
    order = np.argsort(twins)
    return order.tolist(), (twins[order[-3]] + twins[order[-2]]) / 2


@pytest.mark.parametrize(
    ("function", "rerank"), [(torch.sqrt, 0), (lambda left: left.clamp(min=0).log(), 8)], ids=["nan", "inf, reranked"]
)
def test_samples_without_which_training_diverges_cost_nothing_but_themselves(beyond, function, rerank):
    order, limit = beyond
    gone = {*order[-2:]}
    given = {"objective": Edge(function, limit)}
    predicted = ranked(EDGE, **given).ranking
    influence = dict(zip(predicted.sample_id.tolist(), predicted.influence.tolist(), strict=True))
    callback = ranked(EDGE, verify=NUM_TRAIN, rerank=rerank, **given)
    trust, ranking = callback.summary["trust"], callback.ranking
    samples = trust["samples"]
    assert {name for name, real in zip(samples["id"], samples["real"], strict=True) if real is None} == gone
    assert trust["num_diverged"] == 2
    ended = [(p, r) for p, r in zip(samples["predicted"], samples["real"], strict=True) if r is not None]
    assert trust["kendall_tau"] == pytest.approx(stats.kendalltau(*zip(*ended, strict=True)).statistic)
    assert trust["spearman"] == pytest.approx(stats.spearmanr(*zip(*ended, strict=True)).statistic)
    marks = dict(zip(ranking.sample_id.tolist(), ranking.columns["diverged"].tolist(), strict=True))
    assert {name for name, mark in marks.items() if mark == "yes"} == gone
    for name, value, real in zip(ranking.sample_id, ranking.influence, ranking.columns["real"], strict=True):
        assert value == (influence[name] if name in gone or not rerank else real)
        assert np.isnan(real) == (name in gone)
    assert Ranking.load(callback.run_dir) == ranking
    assert re.search(r"without 2 of them training diverges \(\d+, \d+\)", trust["words"])
    assert trust_lines(callback.summary)[-1].state == "warning"
    text = (callback.run_dir / "summary.json").read_text()
    assert json.loads(text, parse_constant=refused)["trust"] == trust


def refused(constant):
    raise AssertionError(f"{constant} is no JSON")


def test_where_all_together_diverge_the_sum_has_no_error(beyond):
    order, limit = beyond
    trust = ranked(EDGE, objective=Edge(torch.sqrt, limit), verify=NUM_TRAIN).summary["trust"]
    for sums, ids in ((trust["together"], order), (trust["worst_together"], trust["samples"]["id"][: NUM_TRAIN // 3])):
        end = fit(EDGE, weights=weights_without(ids)).net[0].bias[0].item()
        assert (sums["real"] is None) == (sums["error"] is None) == (end > limit)
    assert trust["worst_together"]["real"] is None
    assert "the worst together diverging, predicted -" in trust["words"]


@pytest.mark.parametrize("batched", [True, False])
def test_a_run_that_diverges_is_the_same_at_once_and_alone(beyond, batched):
    order, limit = beyond
    callback = ranked(EDGE)
    for last in order[-1], order[0]:
        given = {"objective": Edge(torch.sqrt, limit), "batched": batched}
        found = again(callback, EDGE, without=[*order[-2:], last], **given)
        assert np.isnan(found.values).tolist() == [True, True, last == order[-1]]
        assert math.isfinite(found.whole)


def test_where_rounding_alone_makes_training_diverge_there_is_no_floor():
    case = Case("unstable", {"options": {"lr": 1e-8}}, {"precision": "32-true"})
    end = fit(case).net[0].bias[0].item()
    trust = ranked(case, objective=Edge(root_up_to, end), verify=3).summary["trust"]
    assert trust["noise_floor"] is None
    assert any("rounding alone makes training diverge" in doubt for doubt in trust["doubts"])
    assert trust["num_within_noise"] == 3 - trust["num_diverged"]


def root_up_to(left):
    """As far as the limit itself, with a slope there."""
    return left + torch.where(left < 0, torch.nan, 0.0)


# The noise floor -------------------------------------------------------------------------------------------


def nudge(trainer, module):
    with torch.no_grad():
        for param in module.parameters():
            signs = 2.0 * torch.randint(0, 2, param.shape, generator=torch.Generator().manual_seed(9)) - 1
            param.mul_(1 + torch.finfo(param.dtype).eps * signs)


def test_the_noise_floor_is_about_what_rounding_does_to_a_whole_fit():
    case = Case("noise", {"norm": True, "make_optimizer": adam}, {"precision": "32-true"})
    floor = ranked(case, verify=3).summary["trust"]["noise_floor"]
    nudged = Case("nudged", case.module, case.trainer, callbacks=lambda: [LambdaCallback(on_fit_start=nudge)])
    off = abs(objective(fit(nudged)) - objective(fit(case)))
    assert off > 0
    assert off / 30 < floor < 30 * off


# Which samples ------------------------------------------------------------------------------------------------


def test_the_choice_is_stratified_and_the_same_each_time():
    ranking = Ranking.from_influence(range(100), np.linspace(-1, 1, 100), np.ones(100, dtype=int))
    state = np.random.get_state()[1].copy()
    chosen = stratified(ranking, 32)
    assert [name for name, stratum in chosen.items() if stratum == "worst"] == [*range(10)]
    assert [name for name, stratum in chosen.items() if stratum == "best"] == [*range(90, 100)]
    random = [name for name, stratum in chosen.items() if stratum == "random"]
    assert len({*random} & {*range(10, 90)}) == 12
    assert stratified(ranking, 32) == chosen
    assert np.array_equal(np.random.get_state()[1], state)
    assert [*stratified(ranking, 2).values()] == ["random", "random"]
    assert len(stratified(ranking, 1000)) == 100
    assert stratified(ranking, 0) == {}


# Other runs ----------------------------------------------------------------------------------------------------


def test_one_epoch_in_float32_with_names_for_ids():
    def names(batch):
        return [f"sample {i}" for i in batch[2].tolist()]

    callback = SGDInfluence("val_loss", sample_ids=names, verify=9)
    fit(Case("names", {"options": {"momentum": 0.9}}, {"precision": "32-true"}), callback)
    assert callback.summary["trust"]["kendall_tau"] > 0.8
    assert callback.summary["trust"]["samples"]["id"][0] == callback.ranking.harmful(1)[0]


@pytest.mark.parametrize("make_optimizer", [adam, torch.optim.SGD])
def test_scaled_steps_and_those_that_were_skipped(make_optimizer):
    def case():  # the plugin keeps its scale, so a run needs one of its own
        return scaled("scaled", {"norm": True, "make_optimizer": make_optimizer, "options": {"lr": 0.02}})

    trust = ranked(case(), verify=6).summary["trust"]
    whole = objective(fit(case()))
    real = [without(case(), [name]) - whole for name in trust["samples"]["id"]]
    assert trust["samples"]["real"] == pytest.approx(real, rel=1e-6, abs=1e-13)
    assert "16 bits" in trust["runs"]


def test_at_best_the_runs_end_there(tmp_path):
    def best():
        return [ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=1)]

    case = Case("best", {"options": {"lr": 1.5}}, {"max_epochs": 4, "enable_checkpointing": True}, callbacks=best)
    callback = ranked(case, at="best", verify=6)
    shorter = Case("shorter", case.module, {"max_steps": callback.summary["window"]["last_step"] + 1, "max_epochs": 4})
    samples = callback.summary["trust"]["samples"]
    real = [without(shorter, [name]) - objective(fit(shorter)) for name in samples["id"]]
    assert samples["real"] == pytest.approx(real, rel=1e-6, abs=1e-13)


def test_a_retrace_verifies_and_reranks_as_well(tmp_path):
    callback = ranked(CASE, verify=6, rerank=3, dirpath=tmp_path / "run")
    train, val = loaders()
    again = retrace(
        callback.run_dir,
        CASE.make(**CASE.module),
        train_dataloaders=train,
        val_dataloaders=val,
        epochs="all",
        verify=6,
        rerank=3,
    )
    assert again == callback.ranking


# Never at the ranking's cost -------------------------------------------------------------------------------------


CALLS = 3 + 4  # the gradient over all batches, and its check on the first: gradient, look, two values


class Tired:
    """An objective that fails once it has been asked so often."""

    def __init__(self, calls, error):
        self.calls, self.error = calls, error
        self.__name__ = "tired"

    def __call__(self, module, batch):
        self.calls -= 1
        if self.calls < 0:
            raise self.error
        return F.cross_entropy(module.net(batch[0]), batch[1])


@pytest.mark.parametrize(
    ("error", "words"),
    [(RuntimeError("out of coffee"), "RuntimeError: out of coffee"), (KeyboardInterrupt(), "interrupted")],
)
def test_what_goes_wrong_leaves_the_ranking(error, words):
    plain = ranked(CASES["sgd"], objective=Tired(10**6, error))
    callback = SGDInfluence(objective=Tired(CALLS, error), epochs="all", verify=6, rerank=3)
    with pytest.warns(SGDInfluenceWarning, match=rf"ranking is there, but could not be put to the test .*{words}"):
        fit(CASES["sgd"], callback)
    assert callback.ranking == plain.ranking
    assert callback.summary["trust"]["num_verified"] == 0
    assert words in callback.summary["trust"]["verdict"]
    assert Ranking.load(callback.run_dir) == callback.ranking


@pytest.mark.parametrize("value", [-1, 2.5, "all", True, None])
@pytest.mark.parametrize("name", ["verify", "rerank"])
def test_numbers_that_are_none_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be a whole number, 0 or more"):
        SGDInfluence(**{name: value})
