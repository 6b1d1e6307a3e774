# SPDX-License-Identifier: Apache-2.0
"""Label, prediction and loss of samples, read off the loss calls of unmodified modules, against the module itself."""

import math

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from cases import NUM_CLASSES, NUM_TRAIN, TRAIN, Case, Plain, fit, loaders, quiet_trainer
from datasets import Augmented, noisy_collate
from lightning_sgdclean import Ranking, SGDInfluence, retrace
from lightning_sgdclean.base.errors import SGDInfluenceWarning
from lightning_sgdclean.base.options import Options
from lightning_sgdclean.base.randomness import random_state
from lightning_sgdclean.data.datasets import source_of
from lightning_sgdclean.losses.readings import plain_numbers
from lightning_sgdclean.replay.inspection import inspect_samples
from lightning_sgdclean.replay.open import reopened

CLASS_WEIGHTS = torch.tensor([0.5, 2.0, 1.2], dtype=torch.float64)
DATA = TensorDataset(*(t.double() if t.is_floating_point() else t for t in TRAIN.tensors))


class Trained(Plain):
    """Trains by ``step(module, batch)``."""

    def __init__(self, step, **options):
        super().__init__(**{"norm": True, "dropout": 0.3, **options})
        self.step = step

    def training_step(self, batch, batch_idx):
        return self.step(self, batch)


def inspected(callback, module, ids, train=TRAIN, sample_losses=None, **loader):
    options = Options(epochs="all", sample_losses=sample_losses)
    train, val = loaders(train, **loader)
    module.train()
    return reopened(
        callback.run_dir,
        module,
        options,
        lambda this: inspect_samples(this, ids),
        train_dataloaders=train,
        val_dataloaders=val,
    )


def trained(step, tmp_path, train=TRAIN, callback_options=None, **options):
    callback_options = {"keep_batches": False, **(callback_options or {})}
    callback = SGDInfluence("val_loss", epochs="all", dirpath=tmp_path / "run", **callback_options)
    case = Case("inspected", {"step": step, **options}, {"max_epochs": 2}, make=Trained, train=train)
    return callback, fit(case, callback)


@torch.no_grad()
def alone(module, index, data=DATA):
    """``training_step`` on a batch of one sample, in evaluation mode."""
    module.eval()
    return float(module.step(module, [torch.as_tensor(t)[None] for t in data[index]]))


@torch.no_grad()
def outputs(module):
    return module.eval().net(DATA.tensors[0])


def assert_seen(found, label=None, prediction=None, loss=None, num=NUM_TRAIN):
    assert found.complaints == []
    assert list(found.seen) == list(range(num))
    seen = found.seen.values()
    assert [one.label for one in seen] == ([None] * num if label is None else label.tolist())
    if prediction is None:
        assert {one.prediction for one in seen} == {None}
    else:
        assert [one.prediction for one in seen] == pytest.approx(prediction.tolist(), rel=1e-12)
    if loss is None:
        assert {one.loss for one in seen} == {None}
    else:
        assert [one.loss for one in seen] == pytest.approx(loss, rel=1e-10)


def soft(y):
    return F.one_hot(y, NUM_CLASSES).double() * 0.7 + 0.1


def binary(y):
    return (y > 0).double()


def tokens(m, b, reduction="mean"):
    """Four labels a sample, some of them ignored, as a tagger has them."""
    x, y, _ = b
    label = torch.where(x[:, :4] > 0.9, -100, y[:, None].expand(-1, 4))
    scores = torch.stack([m.net(x), m.net(2 * x), m.net(-x), m.net(x - 1)], 1)
    return F.cross_entropy(scores.flatten(0, 1), label.flatten(), reduction=reduction)


CLASSES = {
    "mean": lambda m, b: F.cross_entropy(m.net(b[0]), b[1]),
    "class weights": lambda m, b: F.cross_entropy(m.net(b[0]), b[1], weight=CLASS_WEIGHTS),
    "smoothed": lambda m, b: F.cross_entropy(m.net(b[0]), b[1], label_smoothing=0.1),
    "soft labels": lambda m, b: F.cross_entropy(m.net(b[0]), soft(b[1])),
    "nll": lambda m, b: F.nll_loss(m.net(b[0]).log_softmax(1), b[1]),
    "divergence": lambda m, b: F.kl_div(m.net(b[0]).log_softmax(1), soft(b[1]), reduction="batchmean"),
    "sum": lambda m, b: F.cross_entropy(m.net(b[0]), b[1], reduction="sum"),
    "sum by size": lambda m, b: F.cross_entropy(m.net(b[0]), b[1], reduction="sum") / len(b[1]),
    "by hand": lambda m, b: (2 * F.cross_entropy(m.net(b[0]), b[1], reduction="none")).mean(),
    "two heads": lambda m, b: F.cross_entropy(m.net(b[0]), b[1]) + 0.3 * F.cross_entropy(3 * m.net(b[0]), b[1]),
    "reconstruction": lambda m, b: F.cross_entropy(m.net(b[0]), b[1]) + F.mse_loss(m.net(b[0]), b[0][:, :3]),
}


@pytest.mark.parametrize("name", CLASSES)
def test_classes_are_those_of_the_module_and_losses_those_of_each_sample_alone(name, tmp_path):
    callback, module = trained(CLASSES[name], tmp_path)
    found = inspected(callback, module, range(len(TRAIN)))
    losses = [alone(module, i) for i in range(len(TRAIN))]
    assert_seen(found, TRAIN.tensors[1], outputs(module).argmax(1), losses)


BINARY = {
    "logits": lambda m, b: F.binary_cross_entropy_with_logits(m.net(b[0])[:, 0], binary(b[1])),
    "column": lambda m, b: F.binary_cross_entropy_with_logits(m.net(b[0])[:, :1], binary(b[1])[:, None]),
    "chances": lambda m, b: F.binary_cross_entropy(m.net(b[0])[:, 0].sigmoid(), binary(b[1])),
}


@pytest.mark.parametrize("name", BINARY)
def test_one_score_predicts_by_its_sign(name, tmp_path):
    callback, module = trained(BINARY[name], tmp_path)
    found = inspected(callback, module, range(len(TRAIN)))
    losses = [alone(module, i) for i in range(len(TRAIN))]
    assert_seen(found, binary(TRAIN.tensors[1]), (outputs(module)[:, 0] > 0).int(), losses)


def test_signs_as_labels(tmp_path):
    callback, module = trained(lambda m, b: F.soft_margin_loss(m.net(b[0])[:, 0], 2 * binary(b[1]) - 1), tmp_path)
    found = inspected(callback, module, range(len(TRAIN)))
    losses = [alone(module, i) for i in range(len(TRAIN))]
    assert_seen(found, 2 * binary(TRAIN.tensors[1]) - 1, outputs(module)[:, 0].sign(), losses)


VALUES = {
    "mse": lambda m, b: F.mse_loss(m.net(b[0])[:, 0], b[0][:, 4]),
    "mae column": lambda m, b: F.l1_loss(m.net(b[0])[:, :1], b[0][:, 4:]),
    "weighted mse": lambda m, b: F.mse_loss(m.net(b[0])[:, 0], b[0][:, 4], weight=b[0][:, 1].abs() + 0.1),
    "huber": lambda m, b: F.huber_loss(m.net(b[0])[:, 0], b[0][:, 4]),
    "gaussian": lambda m, b: F.gaussian_nll_loss(m.net(b[0])[:, 0], b[0][:, 4], m.net(b[0])[:, 1].exp()),
}


@pytest.mark.parametrize("name", VALUES)
def test_measured_values(name, tmp_path):
    callback, module = trained(VALUES[name], tmp_path)
    found = inspected(callback, module, range(len(TRAIN)))
    losses = [alone(module, i) for i in range(len(TRAIN))]
    assert_seen(found, DATA.tensors[0][:, 4], outputs(module)[:, 0], losses)


def test_rates_of_counts(tmp_path):
    callback, module = trained(lambda m, b: F.poisson_nll_loss(m.net(b[0])[:, 0], b[1].double()), tmp_path)
    found = inspected(callback, module, range(len(TRAIN)))
    losses = [alone(module, i) for i in range(len(TRAIN))]
    assert_seen(found, TRAIN.tensors[1], outputs(module)[:, 0].exp(), losses)


UNKNOWN = {
    "several labels": lambda m, b: F.binary_cross_entropy_with_logits(m.net(b[0]), b[0][:, :3].sigmoid()),
    "several values": lambda m, b: F.mse_loss(m.net(b[0]), b[0][:, :3]),
    "a distance": lambda m, b: F.triplet_margin_loss(m.net(b[0]), m.net(b[0] + 1), m.net(-b[0])),
    "two tasks": lambda m, b: F.mse_loss(m.net(b[0])[:, 0], b[0][:, 4]) + F.mse_loss(m.net(b[0])[:, 1], b[0][:, 3]),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_where_no_single_label_is_known_it_is_empty_and_the_loss_is_not(name, tmp_path):
    callback, module = trained(UNKNOWN[name], tmp_path)
    found = inspected(callback, module, range(len(TRAIN)))
    assert_seen(found, loss=[alone(module, i) for i in range(len(TRAIN))])


def test_the_loss_of_several_tokens_is_the_mean_of_the_samples_own(tmp_path):
    callback, module = trained(tokens, tmp_path)
    found = inspected(callback, module, range(len(TRAIN)))
    assert_seen(found, loss=[alone(module, i) for i in range(len(TRAIN))])


def test_a_sample_all_of_whose_labels_are_ignored_has_no_loss(tmp_path):
    def step(m, b):
        return F.cross_entropy(m.net(b[0]), torch.where(b[2] == 7, -100, b[1]))

    callback, module = trained(step, tmp_path)
    seen = inspected(callback, module, [6, 7]).seen
    assert (seen[7].label, seen[7].loss) == (None, None)
    assert seen[7].prediction == int(outputs(module)[7].argmax())
    assert seen[6].loss == pytest.approx(alone(module, 6))


def test_a_loss_that_is_bent_after_the_call_is_not_given_but_its_label_is(tmp_path):
    def focal(m, b):
        rows = F.cross_entropy(m.net(b[0]), b[1], reduction="none")
        return ((1 - (-rows).exp()) ** 2 * rows).mean()

    callback, module = trained(focal, tmp_path)
    assert_seen(inspected(callback, module, range(len(TRAIN))), TRAIN.tensors[1], outputs(module).argmax(1))


def test_a_penalty_is_nobodys_loss(tmp_path):
    def step(m, b):
        return F.cross_entropy(m.net(b[0]), b[1]) + 0.1 * F.mse_loss(m.net[0].weight, torch.zeros(8, 5).double())

    callback, module = trained(step, tmp_path)
    found = inspected(callback, module, range(len(TRAIN)))
    losses = F.cross_entropy(outputs(module), TRAIN.tensors[1], reduction="none").tolist()
    assert_seen(found, TRAIN.tensors[1], outputs(module).argmax(1), losses)


def test_equal_scores_predict_nothing(tmp_path):
    def step(m, b):
        scores = m.net(b[0])
        return F.cross_entropy(torch.stack([scores[:, 0], scores[:, 0], scores[:, 0] - 1], 1), b[1])

    callback, module = trained(step, tmp_path)
    assert {one.prediction for one in inspected(callback, module, range(5)).seen.values()} == {None}


def test_the_users_own_split_says_whose_row_is_whose(tmp_path):
    def losses(m, b):
        return F.cross_entropy(m.net(b[0]), b[1], reduction="none")

    def step(m, b):
        return -(m.net(b[0]).log_softmax(1)[torch.arange(len(b[1])), b[1]]).mean()

    callback, module = trained(step, tmp_path, callback_options={"sample_losses": losses})
    found = inspected(callback, module, range(len(TRAIN)), sample_losses=losses)
    assert_seen(found, TRAIN.tensors[1], outputs(module).argmax(1), [alone(module, i) for i in range(len(TRAIN))])


def test_a_split_in_another_order_than_the_calls_gives_no_label(tmp_path):
    def losses(m, b):
        return F.cross_entropy(m.net(b[0]).flip(0), b[1].flip(0), reduction="none").flip(0)

    def step(m, b):
        return losses(m, b).mean()

    callback, module = trained(step, tmp_path, callback_options={"sample_losses": losses})
    found = inspected(callback, module, range(len(TRAIN)), sample_losses=losses)
    assert_seen(found, loss=[alone(module, i) for i in range(len(TRAIN))])


@pytest.mark.parametrize("data", ["samples", "batches"])
def test_random_samples_are_seen_as_they_were_last_trained_on(data, tmp_path):
    """The loss tells which augmentation it was: that of the last visit."""
    last = {}

    class Noting(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            last.update({int(i): (x.clone(), y) for x, y, i in zip(*batch, strict=True)})

    train = Augmented() if data == "samples" else TRAIN
    loader = {"collate_fn": noisy_collate} if data == "batches" else {}
    callback = SGDInfluence("val_loss", epochs="all", keep_batches=True, dirpath=tmp_path / "run")
    options = {"make": Trained, "train": train, "callbacks": lambda: [Noting()]}
    module = fit(Case("random", {"step": CLASSES["mean"]}, {"max_epochs": 2}, loader, **options), callback)
    seen = inspected(callback, module, range(len(TRAIN)), train, **loader).seen
    for i, (x, y) in last.items():
        with torch.no_grad():
            scores = module.eval().net(x.double()[None])
        assert seen[i].loss == pytest.approx(float(F.cross_entropy(scores, y[None])), rel=1e-10)
        assert (seen[i].label, seen[i].prediction) == (int(y), int(scores.argmax()))


def test_samples_with_names_of_their_own(tmp_path):
    def names(batch):
        return [f"n{int(i)}" for i in batch[2]]

    callback, module = trained(CLASSES["mean"], tmp_path, callback_options={"sample_ids": names})
    found = inspected(callback, module, ["n3", "nobody", "n11"])
    assert {name: one.label for name, one in found.seen.items()} == {
        name: int(TRAIN.tensors[1][i]) for name, i in (("n3", 3), ("n11", 11))
    }
    assert found.sources == {}
    assert found.seen["n3"].loss == pytest.approx(alone(module, 3))


def test_few_samples_are_fetched_in_batches_as_large_as_those_of_training(tmp_path):
    sizes = []

    def step(m, b):
        if not m.training:
            sizes.append(len(b[0]))
        return F.cross_entropy(m.net(b[0]), b[1])

    callback, module = trained(step, tmp_path)
    found = inspected(callback, module, [4, 9, 1])
    assert set(sizes) == {5}
    assert {i: one.loss for i, one in found.seen.items()} == pytest.approx({i: alone(module, i) for i in (1, 4, 9)})


def test_a_step_that_fails_in_evaluation_mode_costs_columns_and_not_the_ranking(tmp_path):
    def step(m, b):
        if not m.training:
            raise RuntimeError("only in training")
        return F.cross_entropy(m.net(b[0]), b[1])

    with pytest.warns(SGDInfluenceWarning, match="only in training"):  # the page wants to show them, too
        callback, module = trained(step, tmp_path)
    found = inspected(callback, module, [1, 2])
    assert {one.loss for one in found.seen.values()} == {None}
    assert found.complaints == ["Label, prediction and loss of 2 samples are not known: RuntimeError: only in training"]


def test_module_and_random_states_stay_as_they_were(tmp_path):
    callback, module = trained(CLASSES["mean"], tmp_path)
    module.train()
    with torch.no_grad():
        module.net[0].weight.add_(1)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = random_state(torch.device("cpu"))
    inspected(callback, module, range(5))
    assert module.training
    assert all(param.grad is None for param in module.parameters())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(torch.equal(value, state[name]) for name, value in random_state(torch.device("cpu")).items())


def test_numbers_have_no_more_digits_than_their_precision():
    assert plain_numbers(torch.tensor([0.3, math.nan, math.inf])) == [0.3, None, None]
    assert plain_numbers(torch.tensor([0.1], dtype=torch.float64)) == [0.1]
    assert plain_numbers(torch.tensor([0.5], dtype=torch.bfloat16)) == [0.5]


def test_sources_behind_subsets_and_unions(tmp_path):
    union = ConcatDataset([TRAIN, Subset(TRAIN, [4, 2]), ConcatDataset([TRAIN, Subset(TRAIN, [9])])])
    outer = Subset(union, [1, 24, 25, 48])
    sources = ["dataset 0[1]", "dataset 1[2]", "dataset 2.0[0]", "dataset 2.1[9]"]
    assert [source_of(outer, i) for i in range(4)] == sources
    assert [source_of(TRAIN, 3), source_of(Subset(TRAIN, [8, 7]), 1)] == ["dataset[3]", "dataset[7]"]
    assert source_of(Subset(TRAIN, [8, 7]), 2) is None
    callback = SGDInfluence("val_loss", epochs="all", dirpath=tmp_path / "run")
    train, val = loaders(outer, batch_size=2)
    module = Plain()
    quiet_trainer([callback], max_epochs=1).fit(module, train, val)
    found = inspected(callback, module, range(4), outer, batch_size=2)
    assert found.sources == dict(enumerate(sources))


class Files(Dataset):
    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return self.samples[index]


def test_the_source_of_a_file_is_its_path(tmp_path):
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        path.touch()
    assert source_of(Subset(Files([(str(path), 0) for path in paths]), [1]), 0) == str(paths[1])
    assert source_of(Files(paths), 0) == str(paths[0])
    assert source_of(Files([("a text", 0), ("another", 1)]), 1) == "dataset[1]"
    assert source_of(Files([*paths, paths[0]]), 1) == "dataset[1]"  # a list of something else


# --- as columns of the ranking

ASKED = ("source", "label", "loss", "prediction")


@pytest.fixture(scope="module")
def with_columns(tmp_path_factory):
    return trained(CLASSES["mean"], tmp_path_factory.mktemp("columns"), callback_options={"columns": ASKED})


def test_the_columns_that_are_asked_for_stand_in_the_csv_in_that_order(with_columns):
    callback, module = with_columns
    ranking = callback.ranking
    assert list(ranking.columns) == list(ASKED)
    assert Ranking.load(callback.run_dir) == ranking
    ids = ranking.sample_id.tolist()
    assert ranking.columns["label"].tolist() == TRAIN.tensors[1][ids].tolist()
    assert ranking.columns["prediction"].tolist() == outputs(module).argmax(1)[ids].tolist()
    assert ranking.columns["loss"].tolist() == pytest.approx([alone(module, i) for i in ids], rel=1e-10)
    assert ranking.columns["source"].tolist() == [f"dataset[{i}]" for i in ids]
    assert len(set(ranking.columns["loss"].tolist())) > 20
    assert ranking.by(dict(zip(ids, ranking.columns["label"].tolist(), strict=True))).keys() == {0, 1, 2}


def test_a_later_retrace_gives_the_same_columns(with_columns):
    callback, _ = with_columns
    train, val = loaders()
    options = {"train_dataloaders": train, "val_dataloaders": val, "epochs": "all", "columns": ASKED}
    assert retrace(callback.run_dir, Trained(CLASSES["mean"]), **options) == callback.ranking


def test_columns_leave_training_and_ranking_as_they_are(with_columns, tmp_path):
    callback, module = with_columns
    plain, other = trained(CLASSES["mean"], tmp_path)
    assert (plain.ranking.influence == callback.ranking.influence).all()
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))
    assert plain.ranking.columns == {}


def test_the_best_models_weights_are_those_of_the_columns(tmp_path):
    """Label and loss belong to the end point, not to the last step."""
    case = Case(
        "best",
        {"step": CLASSES["mean"]},
        {"max_epochs": 4, "enable_checkpointing": True},
        make=Trained,
        callbacks=lambda: [ModelCheckpoint(tmp_path / "ckpt", monitor="val_loss", save_top_k=-1, filename="{epoch}")],
    )
    callback = SGDInfluence("val_loss", at="best", epochs="all", columns=("loss",), dirpath=tmp_path / "run")
    module = fit(case, callback)
    best = torch.load(module.trainer.checkpoint_callback.best_model_path, weights_only=True)
    module.load_state_dict(best["state_dict"])
    ids = callback.ranking.sample_id.tolist()
    assert callback.ranking.columns["loss"].tolist() == pytest.approx([alone(module, i) for i in ids], rel=1e-10)


def test_text_of_the_users_is_no_formula_in_a_spreadsheet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "=1+1.png").touch()

    class Named(Files):
        def __len__(self):
            return len(TRAIN)

        def __getitem__(self, index):
            return TRAIN[index]

    data = Named([("=1+1.png", 0)] * len(TRAIN))
    callback, _ = trained(CLASSES["mean"], tmp_path, data, {"columns": ("source",)})
    assert {row.rpartition(",")[2] for row in (tmp_path / "run/influence.csv").read_text().splitlines()[1:]} == {
        "'=1+1.png"
    }
    assert set(Ranking.load(callback.run_dir).columns["source"].tolist()) == {"=1+1.png"}


def test_an_empty_column_is_explained(tmp_path):
    with pytest.warns(
        SGDInfluenceWarning, match=r"No sample has a label or a prediction: .*one class or value a sample"
    ):
        callback, _ = trained(
            UNKNOWN["several values"], tmp_path, callback_options={"columns": ("label", "prediction")}
        )
    assert set(callback.ranking.columns["label"].tolist()) == {""}
    assert Ranking.load(callback.run_dir) == callback.ranking


def test_gaps_are_explained_and_the_ranking_stands(tmp_path):
    def step(m, b):
        assert m.training
        return F.cross_entropy(m.net(b[0]), b[1])

    with pytest.warns(SGDInfluenceWarning, match="loss of 23 samples are not known: AssertionError"):
        callback, _ = trained(step, tmp_path, callback_options={"columns": ("loss", "source")})
    assert set(callback.ranking.columns["loss"].tolist()) == {""}
    assert callback.ranking.columns["source"][0].startswith("dataset[")


def test_unknown_columns_are_refused():
    with pytest.raises(ValueError, match=r"columns holds 'colour'; expected a sequence of some of label, prediction"):
        SGDInfluence(columns=("colour",))
