# SPDX-License-Identifier: Apache-2.0
"""What validation_step logs without a graph, or at the end of the epoch: the loss that it returns stands for it."""

import re

import pytest
import torch
import torchmetrics
from torch.nn import functional as F
from torch.utils.data import DataLoader

from cases import VAL, Case, Plain, fit, loaders, quiet_trainer
from lightning_sgdclean import SGDInfluence, counterfactual, retrace
from lightning_sgdclean.base.errors import ObjectiveError, SGDInfluenceWarning
from reference import assert_derivative, assert_influence_is_the_derivative, influences, ranked

CURVED = {"options": {"momentum": 0.5}}
CHECKED = {"max_epochs": 2, "num_sanity_val_steps": 2}


class Detached(Plain):
    """As pytorch-forecasting does."""

    def validation_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("val_loss", loss.detach())
        return {"loss": loss, "scores": self.net(batch[0])}


class AsNumber(Plain):
    """As neuralforecast does."""

    def validation_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("val_loss", loss.item(), batch_size=len(batch[0]))
        return loss


class MeanLoss(torchmetrics.Metric):
    """Cross-entropy over all samples of an epoch."""

    full_state_update = False

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("number", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, scores, labels):
        self.total = self.total + F.cross_entropy(scores, labels, reduction="sum")
        self.number = self.number + len(labels)

    def compute(self):
        return self.total / self.number


class AsMetric(Plain):
    """As chemprop does: nothing is returned."""

    def __init__(self, **options):
        super().__init__(**options)
        self.metric = MeanLoss()

    def validation_step(self, batch, batch_idx):
        self.metric(self.net(batch[0]), batch[1])
        self.log("val_loss", self.metric, batch_size=len(batch[0]))


@pytest.mark.parametrize("make", [Detached, AsNumber, AsMetric])
def test_a_value_logged_without_a_graph_is_followed_exactly(make):
    case = Case(make.__name__, CURVED, CHECKED, make=make)
    callback = assert_influence_is_the_derivative(case)
    assert callback.summary["objective"]["recomputed"] == pytest.approx(callback.summary["objective"]["logged"])
    plain = influences(ranked(Case("plain", CURVED, CHECKED)))
    assert influences(callback) == pytest.approx(plain, rel=1e-9)


class AtTheEnd(Plain):
    """As Lightning's GLUE tutorial does; its validation batches have 4, 4 and 3 samples, and count alike."""

    factor = 1.0

    def __init__(self, **options):
        super().__init__(**options)
        self.outputs = []

    def validation_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.outputs.append(loss)
        return {"loss": loss, "labels": batch[1]}

    def on_validation_epoch_end(self):
        self.log("val_loss", self.factor * torch.stack(self.outputs).mean())
        self.outputs.clear()


def mean_of_batches(module):
    module.eval()
    with torch.no_grad():
        batches = [[x.double(), y, number] for x, y, number in DataLoader(VAL, batch_size=4)]
        return float(torch.stack([module.loss(batch) for batch in batches]).mean())


@pytest.mark.parametrize("trainer", [CHECKED, {"max_epochs": 2}], ids=["sanity check", "none"])
def test_the_mean_logged_at_the_end_of_the_epoch_is_followed_exactly(trainer):
    case = Case("at the end", CURVED, trainer, make=AtTheEnd)
    found = influences(ranked(case))
    assert_derivative(found, lambda weights: mean_of_batches(fit(case, weights=weights)))


class Doubled(AtTheEnd):
    factor = 2.0


def test_another_value_at_the_end_is_refused_in_the_sanity_check():
    trainer = quiet_trainer([SGDInfluence("val_loss")], num_sanity_val_steps=2)
    with pytest.raises(ObjectiveError, match=r"returns has the mean [\d.]+, but [\d.]+ was logged at the end"):
        trainer.fit(Doubled(), *loaders())
    assert trainer.global_step == 0


def test_without_a_sanity_check_it_is_refused_in_the_first_validation():
    trainer = quiet_trainer([SGDInfluence("val_loss")])
    with pytest.raises(ObjectiveError, match="was logged at the end of the epoch, so that is another"):
        trainer.fit(Doubled(), *loaders())
    assert trainer.current_epoch == 0


def test_what_cannot_be_held_against_a_logged_value_is_refused():
    with pytest.raises(ObjectiveError, match="nothing of that name was logged at the end of the epoch"):
        quiet_trainer([SGDInfluence("val_loss")], max_steps=7).fit(AtTheEnd(), *loaders())
    trainer = quiet_trainer([SGDInfluence("val_lss")], num_sanity_val_steps=2)
    with pytest.raises(ObjectiveError, match="No value named 'val_lss'"):
        trainer.fit(AtTheEnd(), *loaders())
    callback = SGDInfluence("val_loss", on_mismatch="warn")
    with pytest.warns(SGDInfluenceWarning, match="nothing of that name was logged"):
        quiet_trainer([callback], max_steps=7).fit(AtTheEnd(), *loaders())


def test_later_and_in_counterfactual_runs_it_is_the_same_value(tmp_path):
    case = Case("at the end", CURVED, CHECKED, make=AtTheEnd)
    callback = ranked(case, dirpath=tmp_path / "run", verify=0)
    train, val = loaders()
    given = {"train_dataloaders": train, "val_dataloaders": val, "epochs": "all"}
    again = retrace(callback.run_dir, AtTheEnd(**CURVED), verify=0, **given)
    assert again.influence.tolist() == callback.ranking.influence.tolist()
    found = counterfactual(callback.run_dir, AtTheEnd(**CURVED), without=[3], **given)
    assert found.whole == pytest.approx(callback.summary["objective"]["logged"], rel=1e-12)
    other = DataLoader(torch.utils.data.Subset(VAL, range(5)), batch_size=4)
    for function, more in ((retrace, {}), (counterfactual, {"without": [3]})):
        with pytest.raises(ObjectiveError, match="other validation data than the fit had"):
            function(callback.run_dir, AtTheEnd(**CURVED), **given | {"val_dataloaders": other}, **more)


class ReturnsAnother(AsNumber):
    def validation_step(self, batch, batch_idx):
        return 2 * super().validation_step(batch, batch_idx)


class ReturnsNothing(AsNumber):
    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)


@pytest.mark.parametrize("make", [ReturnsAnother, ReturnsNothing])
def test_another_value_is_not_taken_and_the_line_in_the_error_was_tried(make):
    case = Case("line", CURVED, CHECKED, make=make)
    with pytest.raises(ObjectiveError, match="which has that value here") as refused:
        ranked(case)
    line = re.search(r"objective=(lambda .*), which has that value here", str(refused.value))[1]
    assert_influence_is_the_derivative(case, objective=eval(line, {"F": F}))


class Counts(Plain):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", float((self.net(batch[0]).argmax(1) == batch[1]).sum()))


def test_where_no_line_fits_none_is_shown():
    trainer = quiet_trainer([SGDInfluence("val_loss")], num_sanity_val_steps=1)
    with pytest.raises(ObjectiveError, match="or give objective=, a callable") as refused:
        trainer.fit(Counts(), *loaders())
    assert "lambda" not in str(refused.value)


class Drifting(AsNumber):
    """Returns a value that is the logged one only where the parameters are."""

    def validation_step(self, batch, batch_idx):
        loss = super().validation_step(batch, batch_idx)
        start = self.start if hasattr(self, "start") else [param.detach().clone() for param in self.parameters()]
        object.__setattr__(self, "start", start)
        return loss + sum((p - q).pow(2).sum() for p, q in zip(self.parameters(), start, strict=True))


def test_a_value_that_is_the_logged_one_by_chance_is_refused():
    trainer = quiet_trainer([SGDInfluence("val_loss")], num_sanity_val_steps=1)
    with pytest.raises(ObjectiveError, match="returns another value"):
        trainer.fit(Drifting(), *loaders())


class OwnGenerator(Plain):
    def __init__(self, **options):
        super().__init__(**options)
        self.generator = torch.Generator().manual_seed(0)

    def validation_step(self, batch, batch_idx):
        noise = torch.randn(batch[0].shape, generator=self.generator).to(batch[0])
        self.log("val_loss", self.loss([batch[0] + noise, *batch[1:]]))


def test_a_validation_that_draws_from_a_generator_of_its_own_is_refused_in_the_sanity_check():
    trainer = quiet_trainer([SGDInfluence("val_loss")], num_sanity_val_steps=1)
    with pytest.raises(ObjectiveError, match="draws from a generator of its own"):
        trainer.fit(OwnGenerator(), *loaders())
    assert trainer.global_step == 0
