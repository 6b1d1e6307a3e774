# SPDX-License-Identifier: Apache-2.0
"""Forecasting models of darts, which make the module and the Trainer; the callback goes in by ``pl_trainer_kwargs``."""

import numpy as np
import pytest
import torch
from darts import TimeSeries
from darts.models import BlockRNNModel, DLinearModel, NBEATSModel, TCNModel, TiDEModel
from darts.utils.likelihood_models import GaussianLikelihood
from torch import nn

from lightning_sgdclean import SGDInfluence
from reference import assert_derivative, influences

LENGTHS = {"input_chunk_length": 5, "output_chunk_length": 2}


def series(num, seed):
    noise = np.random.default_rng(seed).normal(size=num)
    return TimeSeries.from_values(np.sin(np.arange(num) / 3 + seed) + 0.1 * noise)


TRAIN, VAL = series(20, 0), series(12, 1)
NUM = 20 - 5 - 2 + 1  # windows
FIRST = TRAIN.values()[-2:4:-1, 0].copy()  # what each window, from the last on, has to forecast first: no two alike


class Weighted(nn.Module):
    """The mean squared error with weights on the samples, which are told by what they have to forecast."""

    def __init__(self, weights):
        super().__init__()
        self.weights = weights

    def forward(self, forecast, target):
        rows = (forecast - target).square().flatten(1).mean(1)
        if not torch.is_grad_enabled():
            return rows.mean()
        window = (target[:, 0, 0, None] - torch.from_numpy(FIRST).to(target)).abs().argmin(1)
        return (rows * self.weights[window]).mean()


def fit(model, options, callbacks=(), weights=None):
    trainer = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    trainer |= {"logger": False, "enable_checkpointing": False, "callbacks": list(callbacks)}
    loss = {} if weights is None else {"loss_fn": Weighted(weights)}
    made = model(**LENGTHS, **options, **loss, n_epochs=2, batch_size=5, random_state=1, pl_trainer_kwargs=trainer)
    made.fit(TRAIN, val_series=VAL)
    return made.model


SMOOTH = {"optimizer_kwargs": {"lr": 0.01, "eps": 1e-4}}
MODELS = {
    "BlockRNN": (BlockRNNModel, {"model": "LSTM", "hidden_dim": 4, **SMOOTH}),
    "DLinear": (DLinearModel, {"kernel_size": 3, "use_reversible_instance_norm": True, **SMOOTH}),
    "N-BEATS": (NBEATSModel, {"num_stacks": 2, "num_layers": 1, "layer_widths": 6, "activation": "Tanh", **SMOOTH}),
}


pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")


@pytest.mark.parametrize("name", MODELS)
def test_influence_is_the_derivative_of_the_whole_fit(name):
    model, options = MODELS[name]
    callback = SGDInfluence("val_loss", epochs="all", verify=0)
    found, plain = fit(model, options, [callback]).state_dict(), fit(model, options).state_dict()
    assert all(torch.equal(tensor, plain[key]) for key, tensor in found.items())

    def objective_of(weights):
        return float(fit(model, options, weights=weights).trainer.callback_metrics["val_loss"])

    assert_derivative(influences(callback, NUM), objective_of, 1e-6)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (TCNModel, {"num_filters": 2, "kernel_size": 2}),
        (TiDEModel, {"hidden_size": 4, "likelihood": GaussianLikelihood()}),
    ],
    ids=["TCN", "TiDE, likelihood"],
)
def test_others_are_ranked_and_left_alone(model, options):
    callback = SGDInfluence("val_loss", epochs="all")
    found, plain = fit(model, options, [callback]).state_dict(), fit(model, options).state_dict()
    assert all(torch.equal(tensor, plain[key]) for key, tensor in found.items())
    assert len(callback.ranking) == NUM
    assert callback.summary["trust"]["num_verified"] >= 4
