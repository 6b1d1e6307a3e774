# SPDX-License-Identifier: Apache-2.0
"""Estimators of gluonts, which draw their training windows at random and without end; equal windows are one sample."""

import random

import lightning.pytorch
import numpy as np
import pytest
import torch
from gluonts.dataset.common import ListDataset
from gluonts.torch import DeepAREstimator, SimpleFeedForwardEstimator
from gluonts.torch.model.simple_feedforward.lightning_module import SimpleFeedForwardLightningModule
from torch.utils.data import TensorDataset

from cases import NUM_TRAIN, NUM_VAL, Case
from lightning_sgdclean import SGDInfluence
from lightning_sgdclean.base.errors import SampleIdError
from reference import assert_influence_is_the_derivative

LENGTHS = {"prediction_length": 2, "context_length": 4}
ESTIMATORS = {
    "feedforward": lambda **options: SimpleFeedForwardEstimator(hidden_dimensions=[4], **LENGTHS, **options),
    "DeepAR": lambda **options: DeepAREstimator("D", hidden_size=4, num_layers=1, **LENGTHS, **options),
}


def series(num, length, seed):
    source = np.random.default_rng(seed)
    waves = (np.sin(np.arange(length) / 3 + i) + 0.1 * source.normal(size=length) + 3 for i in range(num))
    return ListDataset([{"start": "2020-01-01", "target": wave} for wave in waves], freq="D")


def train(name, *callbacks):
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(1)
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    made = ESTIMATORS[name](
        batch_size=4, num_batches_per_epoch=4, trainer_kwargs={**quiet, "max_epochs": 2, "callbacks": [*callbacks]}
    )
    return made.train_model(series(6, 30, 0), series(6, 36, 0)).trained_net.state_dict()


@pytest.mark.filterwarnings("ignore")  # its own, of many kinds
@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimator_trains_as_without_and_its_windows_are_ranked_by_what_they_hold(name):
    callback = SGDInfluence("val_loss", epochs="all", sample_ids="content")
    found, plain = train(name, callback), train(name)
    assert all(torch.equal(tensor, plain[key]) for key, tensor in found.items())
    assert 16 < len(callback.ranking) <= 32
    assert callback.ranking.visits.sum() == 32
    assert callback.summary["trust"]["num_verified"] >= 4


@pytest.mark.filterwarnings("ignore")
def test_windows_without_positions_are_refused_with_a_way_out():
    with pytest.raises(SampleIdError, match="sample_ids="):
        train("feedforward", SGDInfluence("val_loss"))


def windows(num, seed):
    source = torch.Generator().manual_seed(seed)
    time = torch.rand(num, 1, generator=source) * 6 + torch.arange(6) / 3
    waves = time.sin() + 3 + 0.1 * torch.randn(num, 6, generator=source)
    return TensorDataset(waves[:, :4], waves[:, 4:], torch.ones(num, 2), torch.arange(num))


class Windows(SimpleFeedForwardLightningModule):
    """The estimator's own module, whose batches are put into a dict."""

    def __init__(self):
        torch.manual_seed(3)
        super().__init__({"prediction_length": 2, "context_length": 4, "hidden_dimensions": [4]}, lr=0.01)
        self.sample_weights = None

    def loss(self, batch, reduction="mean"):
        past, future, observed, _ = batch
        rows = self.model.loss(past, future_target=future, future_observed_values=observed)
        return rows.mean() if reduction == "mean" else rows

    def training_step(self, batch, batch_idx):
        if self.sample_weights is None:
            names = ("past_target", "future_target", "future_observed_values")
            return super().training_step(dict(zip(names, batch[:3], strict=True)), batch_idx)
        return (self.loss(batch, "none") * self.sample_weights[batch[-1]]).mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), batch_size=len(batch[0]))


@pytest.mark.filterwarnings("ignore:.*logger", "ignore:Trying to infer the `batch_size`")
def test_influence_is_the_derivative_of_the_whole_fit_by_the_estimators_own_module():
    case = Case(
        "Student-T",
        {},
        {"package": lightning.pytorch},
        make=Windows,
        train=windows(NUM_TRAIN, 1),
        val=windows(NUM_VAL, 2),
    )
    assert_influence_is_the_derivative(case, 1e-5)
