# SPDX-License-Identifier: Apache-2.0
"""Cleansing tried out on real trainings: what it concludes, what it refuses, and that it goes on where it stopped."""

import csv
import importlib
import json
import math
import os
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

from cases import quiet_trainer
from lightning_sgdclean import Ranking, SGDInfluence, Training, cleanse, compare
from lightning_sgdclean.base.errors import RunDirectoryError, SGDInfluenceWarning
from processes import killed, search_path

WRONG = 60


def clusters(size, seed, wrong=0):
    """Two clusters; some points of one carry the label of the other."""
    source = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 2, (size,), generator=source)
    x = torch.randn(size, 2, generator=source) + 2 * y[:, None]
    y[torch.nonzero(y)[:wrong, 0]] = 0
    return TensorDataset(x, y)


TRAIN, CLEAN, VAL, TEST = clusters(300, 1, WRONG), clusters(300, 1), clusters(400, 2), clusters(1000, 3)


def module_of(name):
    class Net(importlib.import_module(name).LightningModule):
        def __init__(self, seed):
            super().__init__()
            self.seed = seed
            self.net = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2))

        def loss(self, batch):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def training_step(self, batch, batch_idx):
            return self.loss(batch)

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.loss(batch))

        def test_step(self, batch, batch_idx):
            self.log("test_loss", self.loss(batch))
            self.log("test_right", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())
            self.log("odd", math.nan if self.seed == 1 else 1.0)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05)

    return Net


def build(seed, name="pytorch_lightning", train=TRAIN, val=VAL, test=TEST, epochs=6):
    package = importlib.import_module(name)
    trainer = quiet_trainer([], package, max_epochs=epochs, precision="32-true")
    return Training(
        trainer,
        module_of(name)(seed),
        train_dataloaders=DataLoader(train, batch_size=20, shuffle=True),
        val_dataloaders=DataLoader(val, batch_size=200),
        test_dataloaders=DataLoader(test, batch_size=500),
    )


short = partial(build, epochs=1)


def run(builder, folder="cleansing", **options):
    return cleanse(
        builder,
        **{
            "metric": "test_loss",
            "drop": (WRONG,),
            "seeds": 2,
            "random_draws": 1,
            "influence": {"epochs": "all"},
            "dirpath": folder,
            "verbose": False,
            **options,
        },
    )


def numbers_of(found):
    return [array.tolist() for array in (found.metric.none, found.metric.worst, found.metric.random)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The numbers of the short trainings, made one after another and in one go."""
    return numbers_of(run(short, tmp_path_factory.mktemp("whole") / "cleansing"))


def num_trained(folder="cleansing"):
    return len(list(Path(folder, "trials").glob("*.json")))


def test_wrong_labels_are_worth_removing(capsys):
    found = run(build, seeds=4, drop=(0.1, WRONG), verbose=True)
    assert found.verdict.outcome == "improvement", str(found)
    assert found.counts == (30, WRONG)
    assert found.verdict.recommended == WRONG
    assert found.verdict.gain.low > 0
    assert found.metric.random.shape == (2, 4, 1)
    assert "Verdict: improvement." in str(found)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 * 5
    assert lines[1].startswith("training 2 (of 20 at most): seed 0, the 30 worst changed: test_loss 0.")
    for ranking in found.rankings.values():
        wrong = torch.nonzero(TRAIN.tensors[1] != CLEAN.tensors[1])[:, 0]
        assert np.isin(ranking.sample_id[:WRONG], wrong).mean() > 0.6
    assert len(compare(found.rankings)) == 300

    report = json.loads(Path("cleansing", "report.json").read_text(encoding="utf-8"))
    assert report["verdict"]["outcome"] == "improvement"
    assert report["verdict"]["gain"]["mean"] == found.verdict.gain.mean
    assert report["metric"]["worst"] == found.metric.worst.tolist()
    with Path("cleansing", "table.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["arm"], row["samples"]) for row in table] == [
        *[("none", "0"), ("worst", "30"), ("worst", "60"), ("random", "30"), ("random", "60")]
    ]
    assert float(table[2]["mean"]) == pytest.approx(found.metric.worst[1].mean())
    assert float(table[2]["gain"]) == pytest.approx((found.metric.none - found.metric.worst[1]).mean())
    assert table[0]["gain"] == ""
    assert found.to_pandas()["mean"].tolist() == [row["mean"] for row in found.rows]
    assert Path("cleansing", "figure.png").stat().st_size > 1000


def test_the_other_package_of_lightning_comes_to_the_same_numbers(whole):
    assert numbers_of(run(partial(short, name="lightning.pytorch"))) == whole


def test_right_labels_are_not_found_to_be_worth_removing():
    found = run(partial(build, train=CLEAN), seeds=4)
    assert found.verdict.outcome == "no improvement"
    assert "Verdict: no improvement. Training with the worst samples removed was not shown to be better" in str(found)


def test_the_trainings_are_those_that_one_would_do_by_hand():
    """With the callback or without, and with samples left out by a Subset."""
    found = run(short)
    package = importlib.import_module("pytorch_lightning")

    def by_hand(seed, removed):
        package.seed_everything(seed, workers=True, verbose=False)
        kept = [position for position in range(len(TRAIN)) if position not in removed]
        made = short(seed, train=Subset(TRAIN, kept))
        made.trainer.fit(made.model, made.train_dataloaders, made.val_dataloaders)
        return made.trainer.test(made.model, made.test_dataloaders, verbose=False)[0]["test_loss"]

    for seed in (0, 1):
        ranking = Ranking.load(f"cleansing/rankings/seed{seed}")
        random = json.loads(Path(f"cleansing/trials/seed{seed}-random-{WRONG}-0.json").read_text(encoding="utf-8"))
        assert found.metric.none[seed] == by_hand(seed, ())
        assert found.metric.worst[0, seed] == by_hand(seed, ranking.sample_id[:WRONG].tolist())
        assert found.metric.random[0, seed, 0] == by_hand(seed, random["changed"])
        assert len(set(random["changed"])) == WRONG


def test_samples_can_be_relabelled_by_prediction_instead():
    found = run(short, action="relabel", drop=(30,))
    package = importlib.import_module("pytorch_lightning")
    for seed in (0, 1):
        ranking = Ranking.load(f"cleansing/rankings/seed{seed}")
        mistaken = ranking.columns["prediction"] != ranking.columns["label"]
        worst = ranking.sample_id[mistaken][:30].tolist()
        labels = TRAIN.tensors[1].clone()
        labels[worst] = torch.tensor(ranking.columns["prediction"][mistaken][:30].tolist())
        assert (labels != TRAIN.tensors[1]).sum() == 30
        random = json.loads(Path(f"cleansing/trials/seed{seed}-random-30-0.json").read_text(encoding="utf-8"))[
            "changed"
        ]
        assert len(set(random)) == 30
        assert set(random) != set(worst)
        assert set(random) <= set(ranking.sample_id[mistaken].tolist())  # as many labels change
        package.seed_everything(seed, workers=True, verbose=False)
        made = short(seed, train=TensorDataset(TRAIN.tensors[0], labels))
        made.trainer.fit(made.model, made.train_dataloaders, made.val_dataloaders)
        by_hand = made.trainer.test(made.model, made.test_dataloaders, verbose=False)[0]["test_loss"]
        assert found.metric.worst[0, seed] == by_hand
    assert "gain over as many random samples relabelled:" in str(found)
    assert repr(found).endswith("2 seeds, 30 relabelled)")
    with pytest.raises(RunDirectoryError, match="another action"):
        run(short)
    with pytest.raises(ValueError, match="A build that leaves samples out itself cannot relabel"):
        run(leaving_out, "out", action="relabel")


def test_more_labels_than_predictions_differ_from_are_not_changed():
    with pytest.raises(
        ValueError, match=r"found 290 in drop= and \d+ samples with seed 0 whose prediction is not their"
    ):
        run(short, action="relabel", drop=(290,))
    assert num_trained() == 1


def numbered(seed):
    """Samples whose second entry is not the label."""
    x, y = TRAIN.tensors
    made = short(seed, train=TensorDataset(x, torch.arange(len(y)) + 5, y))
    made.model.training_step = lambda batch, batch_idx: made.model.loss((batch[0], batch[2]))
    return made


def shifted(seed):
    """Pairs whose second entry becomes the label only in training_step."""
    x, y = TRAIN.tensors
    made = short(seed, train=TensorDataset(x, y + 5))
    made.model.training_step = lambda batch, batch_idx: made.model.loss((batch[0], batch[1] - 5))
    return made


def set_third(sample, label):
    return *sample[:2], torch.tensor(int(label))


def test_labels_that_stand_elsewhere_are_not_overwritten_by_mistake():
    with pytest.raises(TypeError, match=r"Sample \d+: .* not clear: found tuple of 3 items; give set_label="):
        run(numbered, action="relabel", drop=(30,))
    with pytest.raises(ValueError, match=r"Sample \d+: the loss held it to the label \d, but .* set_label="):
        run(shifted, "shifted", action="relabel", drop=(30,))
    found = run(numbered, "third", action="relabel", drop=(30,), set_label=set_third)
    assert numbers_of(found) == numbers_of(run(short, "second", action="relabel", drop=(30,)))


def test_random_states_and_seeds_are_left_alone(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "12")
    monkeypatch.delenv("PL_SEED_WORKERS", raising=False)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    run(short)
    assert torch.rand(1) == expected
    assert os.environ["PL_GLOBAL_SEED"] == "12"
    assert "PL_SEED_WORKERS" not in os.environ


# Going on -----------------------------------------------------------------------------------------------


class Stopping:
    """A build that fails at its n-th call, and counts its calls."""

    config = "the same"

    def __init__(self, at=None):
        self.at, self.calls = at, 0

    def __call__(self, seed):
        self.calls += 1
        if self.calls == self.at:
            raise OSError("no space left")
        return short(seed)


def test_an_interrupted_cleansing_goes_on_and_comes_to_the_same_numbers(whole):
    stopping = Stopping(at=5)
    with pytest.raises(OSError, match="no space left") as caught:
        run(stopping)
    assert (
        "This was the training with seed 1, the 60 worst changed. Those that were finished" in caught.value.__notes__[0]
    )
    assert num_trained() == stopping.calls - 1 == 4
    rest = Stopping()
    found = run(rest)
    assert rest.calls == 2
    assert numbers_of(found) == whole

    more = Stopping()
    wider = run(more, seeds=3, drop=(WRONG, 20), random_draws=2)
    assert wider.counts == (20, WRONG)
    assert more.calls == 3 * 7 - 6
    assert numbers_of(run(Stopping())) == numbers_of(found)


def test_a_killed_cleansing_goes_on(whole):
    killed(partial(run, short, verbose=True), when="training 3 ", after=0.05)
    assert 3 <= num_trained() < 6
    assert numbers_of(run(short)) == whole


class Slow(importlib.import_module("pytorch_lightning.callbacks").ModelCheckpoint):
    """As on a slow file system: others have time to write where it writes."""

    def file_exists(self, *arguments):
        found = super().file_exists(*arguments)
        time.sleep(0.3)
        return found


def with_checkpoints(seed):
    package = importlib.import_module("pytorch_lightning")
    options = {"max_epochs": 2, "precision": "32-true", "enable_checkpointing": True}
    return short(seed)._replace(trainer=quiet_trainer([Slow("models", monitor="val_loss")], package, **options))


def failing_at_last(seed):
    """While there is no space, no training begins once four of the six are finished."""
    if Path("full").exists() and num_trained() >= 4:
        raise OSError("no space left")
    return with_checkpoints(seed)


def test_a_build_that_no_process_can_be_given_is_refused():
    with pytest.raises(ValueError, match=r"build and influence= must be picklable.*processes=1"):
        run(lambda seed: None, "local", processes=2)


def test_processes_come_to_the_same_numbers_and_none_is_measured_by_the_checkpoint_of_another(monkeypatch):
    """Four or five of the six trainings are made in processes, the rest after these have failed."""
    monkeypatch.setenv("PYTHONPATH", search_path())
    before = {path.name for path in Path().iterdir()}
    Path("full").touch()
    with pytest.raises(OSError, match="no space left") as caught:
        run(failing_at_last, ckpt_path="best", processes=2)
    assert "This was the training with seed " in caught.value.__notes__[0]
    assert 4 <= num_trained() < 6
    Path("full").unlink()
    found = run(failing_at_last, ckpt_path="best")
    assert numbers_of(found) == numbers_of(run(with_checkpoints, "one after another", ckpt_path="best"))
    assert {path.name for path in Path().iterdir()} - before == {"cleansing", "one after another"}
    assert not list(Path().rglob("*.ckpt"))


def other(seed):
    return build(seed, epochs=1)


def test_other_trainings_are_not_mixed_in():
    run(short)
    for builder, options, differs in (
        (other, {}, "build"),
        (partial(build, epochs=2), {}, "build"),
        (short, {"influence": {"epochs": 1}}, "influence"),
        (short, {"ckpt_path": "best"}, "ckpt_path"),
    ):
        with pytest.raises(RunDirectoryError, match=f"another {differs}.*Give another dirpath="):
            run(builder, **options)
    Path("full").mkdir()
    Path("full", "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(RunDirectoryError, match="full is not empty and holds no cleansing"):
        run(short, "full")
    path = Path("cleansing", "trials", "seed0-none.json")
    path.write_text(
        path.read_text(encoding="utf-8").replace('"num_changeable": 300', '"num_changeable": 301'), encoding="utf-8"
    )
    with pytest.raises(RunDirectoryError, match="is damaged"):
        run(short)
    path.unlink()
    run(short)


def test_kept_trainings_that_went_without_other_samples_are_refused():
    run(short)
    path = Path("cleansing", "rankings", "seed0", "influence.csv")
    ranking = Ranking.load(path)
    Ranking.from_influence(ranking.sample_id, -ranking.influence, ranking.visits).save(path)
    with pytest.raises(ValueError, match="changed other samples than that seed's ranking names now"):
        run(short)


# Other ways to build ------------------------------------------------------------------------------------


def with_module_and_callback(seed):
    package = importlib.import_module("pytorch_lightning")

    class Data(package.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(TRAIN, batch_size=20, shuffle=True, num_workers=1)

        def val_dataloader(self):
            return DataLoader(VAL, batch_size=200)

        def test_dataloader(self):
            return DataLoader(TEST, batch_size=500)

    influence = SGDInfluence("val_loss", epochs=1, dirpath="elsewhere")
    best = importlib.import_module("pytorch_lightning.callbacks").ModelCheckpoint("models", monitor="val_loss")
    options = {"max_epochs": 2, "precision": "32-true", "enable_checkpointing": True}
    return Training(quiet_trainer([influence, best], **options), module_of("pytorch_lightning")(seed), Data())


def test_data_modules_own_callbacks_and_the_best_checkpoint():
    found = run(
        with_module_and_callback, influence=None, ckpt_path="best", metric="test_right", mode="max", drop=(0.1,)
    )
    assert found.counts == (30,)
    assert found.question.select == "val_loss"
    assert not Path("elsewhere").exists()
    assert Path("cleansing", "rankings", "seed1", "trajectory").exists()  # as the callback says
    with pytest.raises(
        ValueError, match="Expected one SGDInfluence, found 1 among the Trainer's callbacks and influence="
    ):
        run(with_module_and_callback, "twice")


def leaving_out(seed, without):
    kept = [position for position in range(len(TRAIN)) if position not in without]
    return short(seed, train=Subset(TRAIN, kept))


def test_a_build_may_leave_samples_out_itself(whole):
    assert numbers_of(run(leaving_out)) == whole


def named(seed):
    """Each sample holds a number that is another one's position."""
    return short(seed, train=TensorDataset(*TRAIN.tensors, torch.arange(len(TRAIN)).flip(0)))


def other_positions(batch):
    return batch[2]


def digits(batch):
    return [str(int(number)) for number in batch[2]]


def leaving_names_out(seed, without):
    kept = [position for position in range(len(TRAIN)) if len(TRAIN) - 1 - position not in without]
    made = named(seed)
    return made._replace(
        train_dataloaders=DataLoader(Subset(made.train_dataloaders.dataset, kept), batch_size=20, shuffle=True)
    )


@pytest.mark.parametrize("sample_ids", [other_positions, digits])
def test_ids_that_are_names_are_not_taken_for_positions(sample_ids):
    influence = {"epochs": "all", "sample_ids": sample_ids}
    with pytest.raises(ValueError, match=r"sample_ids=.*not positions.*build\(seed, without\)"):
        run(named, influence=influence)
    assert num_trained() == 0


def test_a_build_that_leaves_samples_out_itself_is_given_names(whole):
    """Which random samples are changed depends on their names."""
    found = run(leaving_names_out, influence={"epochs": "all", "sample_ids": other_positions})
    assert numbers_of(found)[:2] == whole[:2]


def mean_loss(module, batch):
    return module.loss(batch)


def test_an_objective_of_ones_own_needs_a_metric_to_select_by():
    influence = {"epochs": "all", "objective": mean_loss}
    with pytest.raises(ValueError, match="Expected select= to be one of val_loss, found None"):
        run(short, influence=influence)
    with pytest.raises(ValueError, match="Expected select_mode="):
        run(short, influence=influence, select="val_loss")
    found = run(short, influence=influence, select="val_loss", select_mode="min")
    assert found.question.select_mode == "min"
    assert num_trained() == 6


def with_accuracy(seed):
    made = short(seed)
    made.model.validation_step = partial(accuracy_too, made.model)
    return made


def accuracy_too(module, batch, batch_idx):
    module.log("val_loss", module.loss(batch))
    module.log("val_right", (module.net(batch[0]).argmax(1) == batch[1]).float().mean())


def test_whether_the_value_that_chooses_is_to_be_low_is_not_guessed():
    """What the metric should be says nothing of another value."""
    with pytest.raises(ValueError, match=r"Expected select_mode= beside select='val_right', .*max"):
        run(with_accuracy, select="val_right")
    assert num_trained() == 1
    found = run(with_accuracy, select="val_right", select_mode="max")
    means = [found.selection.none.mean(), *found.selection.worst.mean(1)]
    assert found.verdict.recommended == (0, *found.counts)[int(np.argmax(means))]
    assert run(with_accuracy, select="val_loss", metric="test_right", mode="max").question.select_mode == "min"
    assert run(with_accuracy, select_mode="max").question.select_mode == "max"


# Refusals -----------------------------------------------------------------------------------------------

KEPT_MODEL = []


def reusing(seed):
    made = short(seed)
    KEPT_MODEL.append(made.model)
    return made._replace(model=KEPT_MODEL[0])


def test_a_module_that_is_used_again_is_refused():
    KEPT_MODEL.clear()
    with pytest.raises(ValueError, match="began with other weights than the first one of its seed"):
        run(reusing)


def without_test_step(seed):
    made = short(seed)
    made.model.test_step = None
    del made.model.test_step
    return made._replace(test_dataloaders=None)


def no_training(seed):
    return short(seed).model


def test_what_cannot_be_measured_is_refused_before_the_first_step():
    with pytest.raises(ValueError, match=r"measured by what the test logs.*Net has no test_dataloaders"):
        run(without_test_step)
    with pytest.raises(TypeError, match=r"Expected build\(seed\) to return a lightning_sgdclean.Training, found Net"):
        run(no_training, "second")
    assert num_trained() == num_trained("second") == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"metric": "accuracy"}, "Expected metric= to be one of test_loss, test_right, odd, found 'accuracy'"),
        ({"select": "val_acc", "select_mode": "max"}, "Expected select= to be one of val_loss, found 'val_acc'"),
        ({"drop": (300,)}, "found 300 in drop= and 300 samples with seed 0 that were ranked"),
        ({"drop": ()}, "Expected drop="),
        ({"drop": (0,)}, "whole numbers, found 0"),
        ({"drop": (1.5,)}, "whole numbers, found 1.5"),
        ({"seeds": 1}, "two or more seeds"),
        ({"seeds": [3, -1]}, r"found \[3, -1\]"),
        ({"random_draws": 0}, "found 0, 1 and 0.95"),
        ({"mode": "best"}, "mode must be one of"),
    ],
)
def test_questions_that_have_no_answer_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        run(short, **options)


def test_a_mistaken_name_costs_no_training_twice():
    with pytest.raises(ValueError, match="Expected metric="):
        run(short, metric="accuracy")
    assert num_trained() == 1
    run(short)


def test_data_that_ranked_are_no_test_data():
    with pytest.raises(ValueError, match="The test data hold samples of the data that the ranking is by"):
        run(partial(short, val=Subset(TEST, range(400)), test=Subset(TEST, range(300, 1000))))
    run(partial(short, val=Subset(TEST, range(400)), test=Subset(TEST, range(400, 1000))), "apart")
    with pytest.warns(SGDInfluenceWarning, match="val_loss was measured on data that the ranking is by"):
        found = run(short, "validated", on="val", metric="val_loss", seeds=3)
    assert found.verdict.outcome == "undecided"
    assert "shows nothing" in str(found)
    own = {"epochs": "all", "val_dataloaders": DataLoader(VAL, batch_size=100)}
    held_out = partial(short, val=TEST)
    assert run(held_out, "own", on="val", metric="val_loss", influence=own).verdict.outcome != "undecided"


def test_a_training_without_a_number_leaves_the_rest_to_be_read():
    found = run(short, metric="odd")
    assert found.verdict.outcome == "undecided"
    assert "3 trainings gave no finite odd; the first is that with seed 1, nothing changed." in str(found)
    assert json.loads(Path("cleansing", "report.json").read_text(encoding="utf-8"))["metric"]["none"] == [1.0, None]


def test_more_than_the_harmful_samples_is_said():
    found = run(short, drop=(0.01, 295))
    assert found.counts == (3, 295)
    assert any("samples are harmful; beyond these, helpful ones were changed." in note for note in found.notes)
