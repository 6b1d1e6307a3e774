# SPDX-License-Identifier: Apache-2.0
"""An objective a part of which has no gradient: refused in the first validation, or when it is ranked by."""

import pytest
import torch
from torch.nn import functional as F

from cases import NUM_TRAIN, Plain, loaders, quiet_trainer
from lightning_sgdclean import SGDInfluence, retrace
from lightning_sgdclean.base.errors import ObjectiveError, SGDInfluenceWarning


class Validated(Plain):
    """Logs a loss with a part whose gradient ends at ``self.stop``."""

    stop = staticmethod(lambda value: value)

    def validation_step(self, batch, batch_idx):
        scores = self.net(batch[0])
        self.log("val_loss", F.cross_entropy(scores, batch[1]) * (1 + self.stop(self.net[0].weight.norm())))


STOPS = {
    "detach": lambda value: value.detach(),
    "item": lambda value: value.item(),
    "data": lambda value: value.data,
    "numpy": lambda value: float(value.numpy(force=True)),
}


def validated(name):
    return type("Stopped", (Validated,), {"stop": staticmethod(STOPS[name])})()


@pytest.mark.parametrize("name", STOPS)
def test_a_part_without_a_gradient_is_refused_in_the_sanity_check(name):
    trainer = quiet_trainer([SGDInfluence("val_loss")], num_sanity_val_steps=1)
    with pytest.raises(ObjectiveError, match=rf"stops gradients \({name} at test_objective_check.py:\d+\).*off by"):
        trainer.fit(validated(name), *loaders())
    assert trainer.global_step == 0


def test_without_a_sanity_check_it_is_refused_in_the_first_validation():
    trainer = quiet_trainer([SGDInfluence("val_loss")])
    with pytest.raises(ObjectiveError, match=r"val_loss.*is not the derivative of its value"):
        trainer.fit(validated("detach"), *loaders())
    assert trainer.global_step == trainer.num_training_batches


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_so_is_a_callable_of_the_users_in_fewer_bits(precision):
    def half(module, batch):
        scores = module.net(batch[0])
        return F.cross_entropy(scores, batch[1]) + 0.1 * F.cross_entropy(scores.detach() * scores, batch[1])

    trainer = quiet_trainer([SGDInfluence(objective=half, retrace_precision="float32")], precision=precision)
    with pytest.raises(ObjectiveError, match="'half'"):
        trainer.fit(Plain(), *loaders())


class LateInValidation(Plain):
    """Stops a gradient in one validation batch, which is not the first."""

    def validation_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("val_loss", loss * loss.item() if batch_idx == 2 else loss)


def test_a_batch_that_is_made_otherwise_than_the_others_is_checked_too():
    with pytest.raises(ObjectiveError, match=r"stops gradients \(item at"):
        quiet_trainer([SGDInfluence("val_loss")]).fit(LateInValidation(), *loaders())


def test_it_is_warned_about_on_wish():
    callback = SGDInfluence("val_loss", on_mismatch="warn")
    with pytest.warns(SGDInfluenceWarning, match="is not the derivative of its value"):
        quiet_trainer([callback]).fit(validated("item"), *loaders())
    assert len(callback.ranking) == NUM_TRAIN


def test_what_is_whole_passes_in_silence_with_kinks_dropout_and_running_statistics():
    for options in (
        {"norm": True, "dropout": 0.3},
        {"net": lambda: torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(5, 3))},
    ):
        trainer = quiet_trainer([SGDInfluence("val_loss")], num_sanity_val_steps=1, precision="32-true")
        trainer.fit(Plain(**options), *loaders())


def test_validation_data_that_differ_a_little_from_those_of_the_fit_are_told(tmp_path):
    callback = SGDInfluence("val_loss", dirpath=tmp_path / "run")
    train, val = loaders()
    quiet_trainer([callback], precision="32-true").fit(Plain(), train, val)
    x, y, number = val.dataset.tensors
    other = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x * 1.0001, y, number), val.batch_size)
    retrace(callback.run_dir, Plain(), train_dataloaders=train, val_dataloaders=val)
    with pytest.warns(SGDInfluenceWarning, match="more than rounding.*other validation data than the fit had"):
        retrace(callback.run_dir, Plain(), train_dataloaders=train, val_dataloaders=other)
