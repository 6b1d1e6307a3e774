# SPDX-License-Identifier: Apache-2.0
"""A run tampered with in one place is caught, and the message names the step and the likely cause."""

import re
import shutil

import pytest
import pytorch_lightning as pl
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from cases import TRAIN, Plain, adam, adamw, loaders, quiet_trainer
from lightning_sgdclean import SGDInfluence
from lightning_sgdclean.base.errors import ReplayMismatchError, RunDirectoryError, UnsupportedTrainingError


def caught(module, match, train=None, callbacks=(), error=ReplayMismatchError, **options):
    """The fit must end in a mismatch; gives the Trainer, to ask how far it came."""
    trainer = quiet_trainer([SGDInfluence("val_loss", epochs="all"), *callbacks], **options)
    with pytest.raises(error, match=match):
        trainer.fit(module, *([train, loaders()[1]] if train is not None else loaders()))
    return trainer


class At(pl.Callback):
    """Does something once, before or behind one step."""

    def __init__(self, step, action, hook="on_train_batch_end"):
        self.done = False

        def act(trainer, module, *_):
            if trainer.global_step == step and not self.done:
                self.done = True
                action(trainer, module)

        setattr(self, hook, act)


class Mutable(Dataset):
    """A data set whose transform can be changed, or whose file can be swapped."""

    def __init__(self):
        self.factor, self.swapped = 1.0, {}

    def __len__(self):
        return len(TRAIN)

    def __getitem__(self, index):
        x, y, _ = TRAIN[self.swapped.get(index, index)]
        return self.factor * x, y, torch.tensor(index)


def test_a_transform_that_changed_since():
    data = Mutable()
    change = At(15, lambda *_: setattr(data, "factor", 1.001), "on_train_end")
    caught(
        Plain(),
        r"Step \d+ .*(5 of 5|3 of 3) samples of its batch.*data that changed since",
        DataLoader(data, batch_size=5),
        [change],
    )


def test_a_file_that_was_swapped_is_named():
    data = Mutable()
    change = At(15, lambda *_: data.swapped.update({7: 8}), "on_train_end")
    match = r"Step \d+ .*1 of 5 samples of its batch.*\(sample 7 first\).*data that changed since"
    caught(Plain(), match, DataLoader(data, batch_size=5), [change])


def test_a_seed_that_was_lost():
    class OwnNoise(Plain):
        """Draws from a generator of its own, which nobody resets."""

        def __init__(self):
            super().__init__()
            self.source = torch.Generator().manual_seed(1)

        def training_step(self, batch, batch_idx):
            noise = torch.randn(batch[0].shape, generator=self.source, dtype=batch[0].dtype)
            return F.cross_entropy(self.net(batch[0] + noise), batch[1])

    trainer = caught(
        OwnNoise(), r"loss of a batch, computed twice.*randomness that is not torch's, NumPy's or Python's"
    )
    assert trainer.global_step == 0


def nudge(amount):
    def act(trainer, module):
        with torch.no_grad():
            next(module.parameters()).view(-1)[3] += amount

    return act


@pytest.mark.parametrize("options", [{}, {"make_optimizer": adam}], ids=["sgd", "adam"])
@pytest.mark.parametrize("precision", ["64-true", "32-true"])
def test_a_parameter_moved_between_steps(options, precision):
    amount = 1e-6 if precision == "64-true" else 1e-2
    trainer = caught(
        Plain(**options), r"Step 8 .*moved between the steps", callbacks=[At(8, nudge(amount))], precision=precision
    )
    assert trainer.global_step == 15


def test_only_causes_that_were_seen_are_named():
    noticing = At(99, nudge(0.0), "on_validation_end")
    match = r"seen here: .* these hooks: At\.on_train_batch_end, At\.on_validation_end\. on_mismatch"
    caught(Plain(), match, callbacks=[At(8, nudge(1e-6)), noticing])

    class Annealed(Plain):
        """Another loss once training is over, as no hook of its shows."""

        def training_step(self, batch, batch_idx):
            is_over = self.trainer.fit_loop.epoch_progress.total.completed >= self.trainer.max_epochs
            return super().training_step(batch, batch_idx) * (1.001 if is_over else 1.0)

    caught(Annealed(), "No hook beside the steps, no generator and no compiled part was seen")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_sample_losses_whose_mean_is_not_the_loss_are_named_with_both_numbers(accumulate):
    def half(module, batch):
        return 0.5 * module.loss(batch, "none")

    callback = SGDInfluence("val_loss", epochs="all", sample_losses=half)
    trainer = quiet_trainer([callback], accumulate_grad_batches=accumulate)
    with pytest.raises(ReplayMismatchError, match=r"The former is the mean of sample_losses=, the latter") as caught:
        trainer.fit(Plain(norm=True), *loaders())
    mean, loss = map(float, re.search(r"loss ([\d.]+) instead of ([\d.]+)\. ", str(caught.value)).groups())
    assert mean == pytest.approx(loss / 2)
    assert loss == pytest.approx(1.2, abs=0.4)
    assert "ikely cause" not in str(caught.value)


def test_an_optimizer_state_changed_between_steps():
    def halve(trainer, module):
        for entries in trainer.optimizers[0].state.values():
            entries["exp_avg"].mul_(0.5)

    caught(Plain(make_optimizer=adam), r"Step 8 .*update differs", callbacks=[At(8, halve)])


# Hooks that edit gradients -------------------------------------------------------------------------


def halve_gradients(module):
    for param in module.parameters():
        if param.grad is not None:
            param.grad.mul_(0.5)


class InModule(Plain):
    def on_before_optimizer_step(self, optimizer):
        halve_gradients(self)


class AfterBackward(Plain):
    def on_after_backward(self):
        halve_gradients(self)


class InClipping(Plain):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")


class InStep(Plain):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        def closure():
            loss = optimizer_closure()
            halve_gradients(self)
            return loss

        optimizer.step(closure=closure)


class ByCallback(pl.Callback):
    def on_before_optimizer_step(self, trainer, module, optimizer):
        halve_gradients(module)


@pytest.mark.parametrize("make_optimizer", [None, adam, adamw], ids=["sgd", "adam", "adamw"])
@pytest.mark.parametrize(
    ("module", "callbacks", "name"),
    [
        (InModule, [], "InModule.on_before_optimizer_step"),
        (AfterBackward, [], "AfterBackward.on_after_backward"),
        (InClipping, [], "InClipping.configure_gradient_clipping"),
        (InStep, [], "InStep.optimizer_step"),
        (Plain, [ByCallback()], "ByCallback.on_before_optimizer_step"),
    ],
    ids=["module", "backward", "clipping", "step", "callback"],
)
@pytest.mark.parametrize("precision", ["64-true", "32-true"])
def test_a_hook_that_edits_gradients_is_refused_by_name_after_two_steps(
    module, callbacks, name, make_optimizer, precision
):
    options = {} if make_optimizer is None else {"make_optimizer": make_optimizer}
    match = rf"Step 0 .*update differs.*gradients edited in a hook.*{name}"
    trainer = caught(module(**options), match, callbacks=callbacks, precision=precision)
    assert trainer.global_step == 2


def test_a_mismatch_that_is_only_warned_about_is_counted():
    callback = SGDInfluence("val_loss", on_mismatch="warn")
    with pytest.warns(UserWarning, match="update differs"):
        quiet_trainer([callback]).fit(InModule(), *loaders())
    assert len(callback.ranking) == len(TRAIN)
    assert callback.summary["replay"]["complaints"]


# Parameters that come and go -----------------------------------------------------------------------


class Growing(Plain):
    """Trains its last layer from the second epoch on."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.net[0].parameters(), lr=0.1)

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.optimizers().add_param_group({"params": list(self.net[-1].parameters())})


class Freezing(Plain):
    def on_train_epoch_start(self):
        self.net[0].requires_grad_(self.current_epoch == 0)


@pytest.mark.filterwarnings("ignore:Recording stopped at step 5")
@pytest.mark.parametrize(("make", "name"), [(Growing, "net.4.bias"), (Freezing, "net.0.bias")])
def test_parameters_that_join_or_leave_on_the_way_are_noticed_and_training_goes_on(make, name):
    match = rf"parameters that the optimizer trains changed before step 5 \(first of all: {name}"
    assert caught(make(), match, error=UnsupportedTrainingError).global_step == 15


# Files of the trajectory ---------------------------------------------------------------------------


def segments(run_dir):
    return sorted((run_dir / "trajectory").glob("segment-*"))


def tampered(action, match, tmp_path, error=(ReplayMismatchError, RunDirectoryError)):
    """Training is over and all of it is on disk, which saving a checkpoint sees to; then the files change."""

    def act(trainer, module):
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        action(tmp_path / "run")

    callback = SGDInfluence("val_loss", epochs="all", dirpath=tmp_path / "run")
    with pytest.raises(error, match=match):
        quiet_trainer([callback, At(15, act, "on_train_end")]).fit(Plain(), *loaders())


def test_two_segments_that_changed_places(tmp_path):
    def swap(run_dir):
        first, second, *_ = segments(run_dir)
        first.rename(run_dir / "aside")
        second.rename(first)
        (run_dir / "aside").rename(second)

    tampered(swap, r"segment-00000\d.safetensors", tmp_path)


def test_a_segment_of_another_run(tmp_path):
    other = SGDInfluence("val_loss", epochs="all", dirpath=tmp_path / "other")
    quiet_trainer([other]).fit(Plain(options={"lr": 0.2}), *loaders())
    tampered(
        lambda run_dir: shutil.copy(segments(tmp_path / "other")[1], segments(run_dir)[1]),
        r"segment-\d+|Step \d+",
        tmp_path,
    )
