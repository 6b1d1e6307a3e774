# SPDX-License-Identifier: Apache-2.0
"""What a module sees while it is replayed, and what is left of that afterwards: nothing."""

from collections import deque

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from cases import Case, Plain, fit, loaders, quiet_trainer
from lightning_sgdclean import SGDInfluence
from lightning_sgdclean.base.errors import ReplayMismatchError
from reference import assert_influence_is_the_derivative, ranked


class Scheduled(Plain):
    """Its loss depends on the epoch and the step, and on a schedule kept in an attribute."""

    def __init__(self, **options):
        super().__init__(**options)
        self.factors = [1.0, 0.7, 0.4]

    def loss(self, batch, reduction="mean"):
        loss = super().loss(batch, reduction)
        if not self.training:
            return loss
        return loss * self.factors[self.current_epoch] / (1 + 0.1 * self.global_step + 0.2 * self.trainer.current_epoch)


def test_the_loss_may_depend_on_epoch_and_step():
    assert_influence_is_the_derivative(Case("scheduled", {"options": {"momentum": 0.9}}, make=Scheduled))


def test_the_loss_may_depend_on_the_step_where_a_step_is_several_batches():
    trainer = {"accumulate_grad_batches": 2}
    assert_influence_is_the_derivative(Case("accumulated", {"options": {"momentum": 0.9}}, trainer, make=Scheduled))


class Schedule:
    """State in an object of the user's own, counting within it and in a list of it."""

    def __init__(self):
        self.count, self.history, self.nested = 0, [], {"a": [1]}

    def step(self):
        self.count += 1
        self.history.append(self.count)
        self.nested["a"][0] += 1


class Logging(Plain):
    """Logs in every form there is, and keeps whatever a module may keep."""

    def __init__(self, **options):
        super().__init__(**options)
        self.accuracy = MulticlassAccuracy(3)
        self.metrics = MetricCollection({"top": MulticlassAccuracy(3), "macro": MulticlassAccuracy(3, average="macro")})
        self.losses, self.recent, self.by_label, self.seen = [], deque(maxlen=4), {}, set()
        self.count, self.average, self.last = 0, torch.zeros(()), None
        self.schedule, self.array = Schedule(), np.zeros(3)

    def training_step(self, batch, batch_idx):
        x, y, index = batch
        logits = self.net(x)
        loss = F.cross_entropy(logits, y)
        self.log("loss", loss, prog_bar=True, on_step=True, on_epoch=True, batch_size=len(x))
        self.log_dict({"double": 2 * loss, "lr": self.optimizers().param_groups[0]["lr"]}, on_epoch=True)
        self.log("accuracy", self.accuracy(logits, y))
        self.metrics.update(logits, y)
        self.log_dict(self.metrics, on_epoch=True, on_step=False)
        self.losses.append(loss)
        self.recent.append(loss.item())
        self.by_label.setdefault(int(y[0]), []).append(loss.item())
        self.seen |= set(index.tolist())
        self.count += 1
        self.average = 0.9 * self.average + 0.1 * loss.detach()
        self.last = loss
        self.schedule.step()
        self.array += 1
        return {"loss": loss, "logits": logits}

    def everything(self):
        losses = [loss.item() for loss in self.losses]
        plain = losses, list(self.recent), self.by_label, self.seen, self.count, self.average.item()
        return *plain, vars(self.schedule), self.array.tolist()


def test_lists_metrics_counters_and_logs_are_those_of_a_run_without_the_callback():
    found = []
    for callback in (SGDInfluence("val_loss", epochs="all"), None):
        module = fit(Case("logging", {"norm": True}, {"precision": "32-true"}, make=Logging), callback)
        states = dict(module.metrics["top"].metric_state)
        metrics = {name: value.item() for name, value in module.trainer.callback_metrics.items()}
        found.append((module.everything(), states, metrics, module.accuracy.compute().item(), module.last.item()))
        assert module.last is module.losses[-1]  # the very object, not a copy
    (with_callback, without) = found
    assert with_callback[0] == without[0]
    assert with_callback[1].keys() == without[1].keys()
    assert all(torch.equal(with_callback[1][name], without[1][name]) for name in without[1])
    assert with_callback[2:] == without[2:]


class Momentous(Plain):
    """Reads the learning rate from the optimizer, which has moved on by the time of the replay."""

    def loss(self, batch, reduction="mean"):
        loss = super().loss(batch, reduction)
        return loss * (1 + self.optimizers().param_groups[0]["lr"]) if self.training else loss


def test_a_loss_that_reads_the_optimizer_is_a_mismatch():
    trainer = quiet_trainer([SGDInfluence("val_loss")])
    with pytest.raises(ReplayMismatchError, match=r"Step 1 .*loss"):
        trainer.fit(Momentous(warmup=True), *loaders())
    assert trainer.global_step == 3


class Annealed(Plain):
    factor = 1.0

    def training_step(self, batch, batch_idx):
        return self.factor * super().training_step(batch, batch_idx)


class AnnealedByBatch(Annealed):
    def on_train_batch_end(self, *_):
        self.factor *= 0.9


class AnnealedBefore(Annealed):
    def on_train_batch_start(self, *_):
        self.factor *= 0.9


class AnnealedByEpoch(Annealed):
    def on_train_epoch_end(self):
        self.factor *= 0.9


class Counting(Annealed):
    def training_step(self, batch, batch_idx):
        self.factor *= 0.9
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("make", "num_steps"), [(AnnealedByBatch, 2), (AnnealedBefore, 2), (Counting, 2), (AnnealedByEpoch, 15)], ids=str
)
def test_an_annealed_attribute_is_a_mismatch_that_says_so_after_two_steps_if_it_shows_by_then(make, num_steps):
    trainer = quiet_trainer([SGDInfluence("val_loss", epochs="all")])
    with pytest.raises(ReplayMismatchError, match=r"Step \d+ .*(attribute of the module, moved|state that is kept)"):
        trainer.fit(make(), *loaders())
    assert trainer.global_step == num_steps


def test_a_module_that_collects_losses_does_not_grow_while_it_is_replayed():
    sizes = []

    class Watching(Logging):
        def training_step(self, batch, batch_idx):
            sizes.append(len(self.losses))
            return super().training_step(batch, batch_idx)

    callback = ranked(Case("watching", {}, make=Watching))
    assert callback.summary["replay"]["batches"] == 15
    assert max(sizes) == 15


class Rotary(Plain):
    """Turns its inputs by angles that it holds as complex numbers, as language models do."""

    def __init__(self, **options):
        super().__init__(**options)
        self.register_buffer("turns", torch.polar(torch.ones(2), torch.tensor([0.3, 1.1])))

    def loss(self, batch, reduction="mean"):
        x, y, i = batch
        pairs = torch.view_as_complex(x[:, :4].reshape(-1, 2, 2).contiguous())
        turned = torch.view_as_real(pairs * self.turns.to(pairs.dtype)).flatten(1)
        return super().loss((torch.cat([turned, x[:, 4:]], 1), y, i), reduction)


@pytest.mark.parametrize("snapshots", ["every", 4])
def test_complex_buffers_are_held_as_they_are(snapshots):
    case = Case("rotary", {"options": {"momentum": 0.9}}, make=Rotary)
    assert_influence_is_the_derivative(case, snapshots=snapshots)
