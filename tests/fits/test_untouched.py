# SPDX-License-Identifier: Apache-2.0
"""With the callback, training is what it is without it: to the last bit."""

import random

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torchmetrics import MeanMetric

from cases import Plain, loaders, quiet_trainer
from lightning_sgdclean import SGDInfluence


class Busy(Plain):
    """Keeps losses in a list, a metric and a counter; draws from every random source."""

    def __init__(self, **options):
        super().__init__(**options)
        self.losses, self.seen, self.mean = [], 0, MeanMetric()
        self.order = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.order.append(batch[2].tolist())
        self.losses.append(loss.item())
        self.seen += 1
        self.mean.update(loss.detach())
        self.log("noise", random.random() + np.random.rand() + float(torch.rand(())))
        return loss


def run(callback, workers, sanity=2):
    pl.seed_everything(5, verbose=False)
    module = Busy(norm=True, dropout=0.3, options={"momentum": 0.9})
    logged = []
    watch = pl.callbacks.LambdaCallback(
        on_train_batch_end=lambda trainer, *_: logged.append({k: v.item() for k, v in trainer.callback_metrics.items()})
    )
    trainer = quiet_trainer(
        [watch, callback] if callback else [watch], precision="32-true", num_sanity_val_steps=sanity
    )
    trainer.fit(module, *loaders(num_workers=workers))
    randomness = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
    return module, logged, randomness, trainer


def assert_same_optimizer(one, other):
    assert one.param_groups[0].keys() == other.param_groups[0].keys()
    options = {key: value for key, value in one.param_groups[0].items() if key != "params"}
    assert options == {key: other.param_groups[0][key] for key in options}
    for param, twin in zip(one.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
        assert torch.equal(one.state[param]["momentum_buffer"], other.state[twin]["momentum_buffer"])
        assert param.grad is twin.grad is None or torch.equal(param.grad, twin.grad)
    assert len(one._optimizer_step_post_hooks) == len(other._optimizer_step_post_hooks) == 0


@pytest.mark.parametrize(
    ("workers", "snapshots", "sanity"), [(0, "every", 2), (2, "every", 2), (0, 4, 2), (0, "every", 0)]
)
def test_weights_metrics_order_and_random_states_are_bit_for_bit_those_without(workers, snapshots, sanity):
    callback = SGDInfluence("val_loss", epochs="all", snapshots=snapshots)
    module, logged, randomness, trainer = run(callback, workers, sanity)
    plain, plain_logged, plain_randomness, plain_trainer = run(None, workers, sanity)
    assert_same_optimizer(trainer.optimizers[0], plain_trainer.optimizers[0])
    for name, tensor in plain.state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor), name
    assert logged == plain_logged
    assert module.order == plain.order
    assert torch.equal(randomness[0], plain_randomness[0])
    assert np.array_equal(randomness[1], plain_randomness[1])
    assert randomness[2] == plain_randomness[2]
    assert len(callback.ranking) == 23
    assert (module.losses, module.seen) == (plain.losses, plain.seen)
    assert module.mean.compute() == plain.mean.compute()
    assert module.training == plain.training
    assert "log" not in vars(module)
    assert type(trainer.train_dataloader.batch_sampler) is torch.utils.data.BatchSampler
    assert "process_dataloader" not in vars(trainer.strategy)


def test_ctrl_c_leaves_a_whole_trajectory(tmp_path):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 7:
                raise KeyboardInterrupt

    from lightning_sgdclean.trajectory.store import Trajectory

    callback = SGDInfluence("val_loss", epochs="all", dirpath=tmp_path / "run")
    with pytest.raises(SystemExit):
        quiet_trainer([callback, Stop()]).fit(Plain(), *loaders())
    trajectory = Trajectory(tmp_path / "run" / "trajectory")
    assert [step.index for step in trajectory.steps] == list(range(7))
    assert trajectory.state(7).params
    assert not list((tmp_path / "run").rglob("*.tmp"))
