# SPDX-License-Identifier: Apache-2.0
"""Forecasting models of pytorch-forecasting on its own loaders, with its own losses and optimizers."""

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import torch
from pytorch_forecasting import DeepAR, NBeats, NormalDistributionLoss, QuantileLoss, TemporalFusionTransformer
from pytorch_forecasting import TimeSeriesDataSet as Series
from pytorch_forecasting.data import GroupNormalizer
from pytorch_forecasting.metrics import MAE

from cases import quiet_trainer
from lightning_sgdclean import SGDInfluence
from lightning_sgdclean.base.errors import ObjectiveError
from reference import assert_derivative, influences

pytestmark = pytest.mark.filterwarnings("ignore")  # its own and pandas', of many kinds
LENGTH, CONTEXT, HORIZON = 14, 4, 2


def table():
    source = np.random.default_rng(0)
    rows = [(str(s), t, 3 + np.sin(t / 3 + s) + 0.1 * source.normal()) for s in range(2) for t in range(LENGTH + 6)]
    return pd.DataFrame(rows, columns=["series", "time", "value"])


TABLE = table()


def data_sets(**options):
    train = Series(
        TABLE[TABLE.time < LENGTH],
        time_idx="time",
        target="value",
        group_ids=["series"],
        max_encoder_length=CONTEXT,
        max_prediction_length=HORIZON,
        time_varying_unknown_reals=["value"],
        target_normalizer=GroupNormalizer(groups=["series"]),
        **options,
    )
    return train, Series.from_dataset(train, TABLE, min_prediction_idx=LENGTH, stop_randomization=True)


def key_of(x, row):
    return int(x["groups"][row, 0]), int(x["decoder_time_idx"][row, 0])


def positions(train):
    """Where in the data set a window stands, by its series and the time that it begins to forecast at."""
    loader = train.to_dataloader(train=False, batch_size=len(train))
    x, _ = next(iter(loader))
    return {key_of(x, row): row for row in range(len(train))}


def weighted(model, place, weights):
    """The model as its own weighted twin: its losses take a weight for each time that is to be forecast."""
    step = model.training_step

    def training_step(batch, batch_idx):
        x, (target, _) = batch
        own = weights[[place[key_of(x, row)] for row in range(len(target))]]
        return step((x, (target, own[:, None].expand(target.shape))), batch_idx)

    model.training_step = training_step
    return model


ADAM = {"optimizer": "adam", "log_interval": -1, "learning_rate": 0.01, "optimizer_params": {"eps": 1e-4}}
TFT = {"hidden_size": 4, "hidden_continuous_size": 4, "attention_head_size": 1, "output_size": 3}
MODELS = {
    "N-BEATS": (NBeats, {"widths": [8, 8], "loss": MAE(), "backcast_loss_ratio": 0.0}, {}),
    "DeepAR": (DeepAR, {"hidden_size": 6, "rnn_layers": 1, "loss": NormalDistributionLoss()}, {}),
    "TFT": (
        TemporalFusionTransformer,
        {"loss": QuantileLoss([0.1, 0.5, 0.9]), **TFT},
        {"time_varying_known_reals": ["time"], "static_categoricals": ["series"]},
    ),
}


def fit(name, callbacks=(), weights=None, precision="32-true", **changed):
    model, options, columns = MODELS[name]
    train, val = data_sets(**columns)
    place = positions(train)  # which draws
    pl.seed_everything(1, verbose=False)
    module = model.from_dataset(train, **{**ADAM, **options, **changed})
    if weights is not None:
        module = weighted(module, place, weights)
    trainer = quiet_trainer(callbacks, pl, max_epochs=2, precision=precision, gradient_clip_val=0.5)
    loaders = train.to_dataloader(batch_size=4), val.to_dataloader(train=False, batch_size=4)
    trainer.fit(module, *loaders)
    return module, len(train), float(trainer.callback_metrics["val_loss"])


@pytest.mark.parametrize("name", MODELS)
def test_it_trains_as_without_and_its_influence_is_the_derivative_of_the_whole_fit(name):
    callback = SGDInfluence("val_loss", epochs="all", verify=0)
    module, num, _ = fit(name, [callback], precision="64-true")
    plain = fit(name, precision="64-true")[0].state_dict()
    assert all(torch.equal(tensor, plain[key]) for key, tensor in module.state_dict().items())
    found = influences(callback, num)
    assert_derivative(found, lambda weights: fit(name, weights=weights, precision="64-true")[2], 1e-4)


def test_samples_are_left_out_of_a_model_that_reaches_its_parts_by_several_names():
    callback = SGDInfluence("val_loss", epochs="all", verify=2)
    module = fit("TFT", [callback])[0]
    plain = fit("TFT")[0].state_dict()
    assert all(torch.equal(tensor, plain[key]) for key, tensor in module.state_dict().items())
    assert callback.summary["trust"]["num_verified"] == 2


def test_a_logged_value_that_is_another_than_what_is_returned_is_refused_with_a_way_out():
    with pytest.raises(ObjectiveError, match="objective="):
        fit("N-BEATS", [SGDInfluence("val_loss")], loss=MAE(), backcast_loss_ratio=0.5)
