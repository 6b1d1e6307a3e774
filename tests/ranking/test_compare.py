# SPDX-License-Identifier: Apache-2.0
"""Runs compared: by hand, against pandas and SciPy, and on real trainings with other seeds."""

import csv
import math

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from scipy import stats
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

from cases import quiet_trainer
from lightning_sgdclean import Ranking, SGDInfluence, compare
from lightning_sgdclean.base.errors import SGDInfluenceWarning
from lightning_sgdclean.ranking.agreement import top_k_jaccard


def ranked(**influence):
    return Ranking.from_influence(list(influence), list(influence.values()), [1] * len(influence))


def random_rankings(num_runs=3, size=30, seed=0):
    draw = np.random.default_rng(seed)
    truth = draw.normal(size=size)
    return [
        Ranking.from_influence(range(size), truth + 0.5 * draw.normal(size=size), [2] * size) for _ in range(num_runs)
    ]


def test_by_hand():
    first = ranked(a=-3.0, b=-2.0, c=1.0, d=2.0)
    second = ranked(a=-1.0, b=3.0, c=-2.0, d=4.0)
    found = compare({"one": first, "two": second}, worst=2, ends=1)
    assert found.names == ("one", "two")
    assert found.worst == (2, 2)
    assert found.sample_id.tolist() == ["a", "c", "b", "d"]  # b and c are among the worst once; c ranks 3 and 1
    assert found.worst_share.tolist() == [1.0, 0.5, 0.5, 0.0]
    assert found.mean_rank.tolist() == [1.5, 2.0, 2.5, 4.0]
    assert found.mean_influence.tolist() == [-2.0, -0.5, 0.5, 3.0]
    assert found.noise == pytest.approx([math.sqrt(2), 3 / math.sqrt(2), 5 / math.sqrt(2), math.sqrt(2)])
    assert found.agreement["kendall_tau"][0, 1] == pytest.approx(2 / 6)
    assert found.agreement["top_k_jaccard"][0, 1] == pytest.approx(1 / 3)
    assert found.systematic() == ["a"]
    assert found.systematic(share=0.5) == ["a", "c", "b"]
    assert found.missing == {}


def test_against_pandas_and_scipy():
    rankings = random_rankings()
    found = compare(rankings)
    frame = pd.DataFrame([pd.Series(r.influence, index=r.sample_id) for r in rankings]).T.sort_index()
    by_id = np.argsort(found.sample_id)
    assert found.mean_influence[by_id] == pytest.approx(frame.mean(axis=1).to_numpy())
    assert found.noise[by_id] == pytest.approx(frame.std(axis=1).to_numpy())
    assert found.mean_rank[by_id] == pytest.approx(frame.rank().mean(axis=1).to_numpy())
    assert found.agreement["spearman"] == pytest.approx(frame.corr("spearman").to_numpy())
    assert found.agreement["kendall_tau"] == pytest.approx(frame.corr("kendall").to_numpy())
    assert found.agreement["top_k_jaccard"][0, 2] == pytest.approx(top_k_jaccard(frame[0], frame[2]))
    assert (found.visits == 6).all()
    assert (np.diff(found.worst_share) <= 0).all()
    assert found.ranking.influence.tolist() == sorted(found.mean_influence.tolist())
    assert found.ranking.columns["num_runs"].tolist() == [3] * 30


def test_only_harmful_samples_count_as_worst_and_ties_share_the_last_places():
    flat = ranked(a=-1.0, b=-1.0, c=0.0, d=0.0)
    found = compare([flat, flat], worst=1, ends=1)
    assert found.worst_share.tolist() == [0.5, 0.5, 0.0, 0.0]
    assert found.mean_rank.tolist() == [1.5, 1.5, 3.5, 3.5]
    assert compare([flat, flat], worst=3, ends=1).worst_share.tolist() == [1.0, 1.0, 0.0, 0.0]


def test_samples_that_some_runs_lack_are_named_and_count_as_not_among_the_worst_there():
    found = compare({"one": ranked(a=-1.0, b=-0.5, c=1.0), "two": ranked(b=-2.0, c=2.0, d=-1.0)}, worst=2, ends=1)
    assert found.missing == {"a": ["two"], "d": ["one"]}
    table = dict(zip(found.sample_id.tolist(), found.worst_share.tolist(), strict=True))
    assert table == {"b": 1.0, "a": 0.5, "d": 0.5, "c": 0.0}
    assert dict(zip(found.sample_id.tolist(), found.num_runs.tolist(), strict=True)) == {"a": 1, "b": 2, "c": 2, "d": 1}
    assert math.isnan(found.noise[found.sample_id.tolist().index("a")])
    assert found.num_shared.tolist() == [[3, 2], [2, 3]]
    assert found.agreement["kendall_tau"][0, 1] == 1
    assert "2 runs, 2 samples in all of them, 2 more in some of them only" in str(found)


def test_agreement_is_missing_where_it_is_not_defined():
    found = compare([ranked(a=0.0, b=0.0, c=0.0), ranked(a=1.0, b=2.0, c=3.0)], ends=1)
    assert math.isnan(found.agreement["kendall_tau"][0, 1])
    assert "tau" not in str(found)


def test_the_csv_holds_the_table(tmp_path):
    found = compare([ranked(**{"=a": -1.0, "b": 0.1}), ranked(b=0.2, c=-1.0)], worst=1)
    path = found.save(tmp_path / "new" / "compared.csv")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        *("sample_id", "worst_share", "mean_rank", "mean_influence", "noise", "num_runs"),
        *("influence:run 1", "influence:run 2"),
    ]
    assert {row["sample_id"] for row in rows} == {"'=a", "b", "c"}
    by_id = {row["sample_id"]: row for row in rows}
    assert by_id["'=a"]["influence:run 2"] == by_id["'=a"]["noise"] == ""
    assert float(by_id["b"]["mean_influence"]) == (0.1 + 0.2) / 2
    frame = found.to_pandas()
    assert list(frame.columns) == list(rows[0])
    assert frame["mean_influence"].tolist() == found.mean_influence.tolist()


@pytest.mark.parametrize(
    ("runs", "options", "says"),
    [
        (ranked(a=1.0), {}, "found a single one"),
        ([ranked(a=1.0)], {}, "two or more runs of different names, found 1"),
        ([ranked(a=1.0), ranked(b=1.0)], {}, "no sample in common"),
        ([ranked(a=1.0), Ranking.from_influence([1], [1.0], [1])], {}, "str in run 1, int in run 2"),
        ([ranked(a=1.0), ranked(a=1.0)], {"worst": 0}, "worst above 0"),
        ([ranked(a=1.0), ranked(a=1.0)], {"worst": 2}, "number up to 1, found 2"),
        ([ranked(a=1.0), ranked(a=1.0)], {"ends": 0}, "ends of 1 or more"),
    ],
)
def test_what_cannot_be_compared_is_refused(runs, options, says):
    with pytest.raises(ValueError, match=says):
        compare(runs, **options)


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def clusters(size, wrong=0):
    y = torch.randint(0, 2, (size,))
    x = torch.randn(size, 2) + 3 * y[:, None]
    y[:wrong] = 1 - y[:wrong]
    return TensorDataset(x, y)


def run_of_seed(seed, train, val, folder, objective=None, num_epochs=3, **options):
    callback = SGDInfluence(objective=objective, **{"epochs": "all", "dirpath": folder, **options})
    pl.seed_everything(seed, verbose=False)
    trainer = quiet_trainer([callback], precision="32-true", max_epochs=num_epochs)
    trainer.fit(Classifier(), DataLoader(train, batch_size=20, shuffle=True), DataLoader(val, batch_size=100))
    return callback.run_dir


def doubled_loss(module, batch):
    return 2 * F.cross_entropy(module.net(batch[0]), batch[1])


def test_wrong_labels_are_harmful_with_every_seed(tmp_path):
    train, val = clusters(200, wrong=10), clusters(100)
    folders = [run_of_seed(seed, train, val, tmp_path / f"seed{seed}") for seed in range(3)]
    found = compare(folders, worst=10)
    systematic = found.systematic()
    assert sum(sample < 10 for sample in systematic) >= 5
    assert found.sample_id[0] in systematic
    first, second = (Ranking.load(folder) for folder in folders[:2])
    columns = [r.influence[np.argsort(r.sample_id)] for r in (first, second)]
    assert found.agreement["kendall_tau"][0, 1] == pytest.approx(stats.kendalltau(*columns).statistic)
    assert found.names == tuple(map(str, folders))
    assert compare([folder / "influence.csv" for folder in folders]).sample_id.tolist()
    assert f"{len(systematic)} samples are among the worst 10 of every run (0.025 would be by chance)" in str(found)

    other = run_of_seed(0, train, val, tmp_path / "other", doubled_loss)
    with pytest.raises(ValueError, match="one objective, found val_loss"):
        compare([folders[0], other])
    assert len(compare([Ranking.load(folders[0]), Ranking.load(other)])) == 200
    with pytest.raises(ValueError, match="more than once"):
        compare([folders[0], folders[0]])


def places(batch):
    return list(range(len(batch[0])))


def test_runs_whose_influences_or_ids_are_of_two_kinds_are_refused_by_name(tmp_path):
    train, val = clusters(40), clusters(30)
    first = run_of_seed(0, train, val, tmp_path / "first", num_epochs=2)
    fewer = TensorDataset(*(tensor[:30] for tensor in train.tensors))
    for data, options, says in (
        (fewer, {}, "Expected training datasets of one size, found 40 in .*first, 30 in .*other"),
        (train, {"epochs": 1}, 'Expected windows of the same epochs, found "all" in .*first, 1 in .*other'),
        (
            train,
            {"curvature": "none"},
            "Expected engines of one kind, found with curvature in .*first, without curvature",
        ),
        (train, {"sample_ids": places}, "found 40 in .*first, names instead of positions in"),
    ):
        other = run_of_seed(1, data, val, tmp_path / "other", num_epochs=2, overwrite=True, **options)
        with pytest.raises(ValueError, match=f"{says}.*give rankings"):
            compare([first, other])
        assert len(compare([Ranking.load(first), Ranking.load(other)])) == 40
    for num_epochs, options, says in ((2, {"curvature": "finite"}, "engines"), (1, {}, "4 steps .*first, 2 steps in")):
        other = run_of_seed(1, train, val, tmp_path / "other", num_epochs=num_epochs, overwrite=True, **options)
        with pytest.warns(SGDInfluenceWarning, match=says):
            compare([first, other])


def test_positions_in_different_splits_show_by_their_labels(tmp_path):
    whole, val = clusters(60), clusters(30)
    splits = [random_split(whole, [40, 20], torch.Generator().manual_seed(seed))[0] for seed in range(2)]
    runs = [
        run_of_seed(seed, split, val, tmp_path / f"{seed}", num_epochs=1, columns=["label"])
        for seed, split in enumerate(splits)
    ]
    differ = sum(int(one[1] != other[1]) for one, other in zip(*splits, strict=True))
    for given in (runs, [Ranking.load(run) for run in runs]):
        with pytest.raises(ValueError, match=rf"{differ} samples have another label in .* than in other runs; .*ids="):
            compare(given)
    unlabelled = [Ranking.from_influence(r.sample_id, r.influence, r.visits) for r in map(Ranking.load, runs)]
    assert len(compare(unlabelled)) == 40


def test_labels_that_are_not_known_differ_from_none():
    known, unknown = (
        Ranking.from_influence([0, 1], [1.0, 2.0], [1, 1], {"label": labels}) for labels in ([1, 0], [math.nan, 0])
    )
    assert len(compare([known, unknown, known], ends=1)) == 2
