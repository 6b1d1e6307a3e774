# SPDX-License-Identifier: Apache-2.0
"""Lightning's averages of the weights as end point: the influence is the derivative of the averaged model's loss."""

import copy

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from torch.nn import functional as F

from cases import Case, Plain, adam, fit, loaders, objective, quiet_trainer
from lightning_sgdclean import SGDInfluence, counterfactual, retrace
from lightning_sgdclean.base.errors import RunDirectoryError, SGDInfluenceWarning, UnsupportedTrainingError
from reference import assert_influence_is_the_derivative, influences, one_hot, ranked

MOMENTUM = {"momentum": 0.5}


def double(**options):
    """In 64 bits from the start: Lightning copies the module for its averages before the Trainer converts it."""
    return Plain(**options).double()


def case(averaging=EMAWeightAveraging, module=None, trainer=None, **options):
    given = {"options": MOMENTUM, **(module or {})}
    return Case(
        "averaged",
        given,
        {"max_epochs": 2, **(trainer or {})},
        make=double,
        callbacks=lambda: [] if averaging is None else [averaging(**options)],
    )


class Late(WeightAveraging):
    """A running mean of the weights from some step on, of Lightning's own recipe."""

    def should_update(self, step_idx=None, epoch_idx=None):
        return step_idx is not None and step_idx >= 3


CASES = {
    "each step": case(decay=0.8),
    "every 2 steps": case(decay=0.7, update_every_n_steps=2),
    "from a step on": case(decay=0.7, update_starting_at_step=4),
    "each epoch": case(decay=0.6, update_every_n_steps=0, update_starting_at_epoch=0),
    "steps and epochs": case(decay=0.6, update_starting_at_step=2, update_starting_at_epoch=0),
    "running mean": case(Late),
    "averaged statistics": case(decay=0.8, module={"norm": True}),
    "copied statistics": case(decay=0.8, update_every_n_steps=2, use_buffers=False, module={"norm": True}),
    "accumulated": case(decay=0.7, module={"norm": True}, trainer={"accumulate_grad_batches": 2}),
    "adam": case(decay=0.8, module={"make_optimizer": adam, "options": {}}),
    "ends within an epoch": case(decay=0.8, trainer={"max_steps": 8}),
}


@pytest.mark.parametrize("name", CASES)
def test_influence_is_the_derivative_of_the_averaged_model_s_loss(name):
    callback = assert_influence_is_the_derivative(CASES[name])
    last = callback.summary["window"]["last_step"]
    by = "Late" if name == "running mean" else "EMAWeightAveraging"
    assert callback.summary["end_point"] == f"after step {last}, weights averaged by {by}"


def test_the_derivative_of_the_last_trained_weights_is_another():
    averaged, trained = (influences(ranked(one)) for one in (case(decay=0.8), case(None)))
    assert np.abs(averaged - trained).max() > 0.1 * np.abs(trained).max()


@pytest.mark.parametrize("options", [{"epochs": 1}, {"snapshots": 4}], ids=str)
def test_influence_over_a_part_of_the_run_and_between_snapshots(options):
    whole, part = ranked(case(decay=0.9), columns=["by_epoch"]), ranked(case(decay=0.9), **options)
    wanted = np.zeros(23)
    columns = [values for name, values in whole.ranking.columns.items() if options != {"epochs": 1} or name[-1] == "1"]
    wanted[whole.ranking.sample_id] = np.sum(columns, axis=0)
    assert np.allclose(influences(part), wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("use_buffers", [True, False])
def test_samples_are_left_out_as_training_would_be_without_them(use_buffers, tmp_path):
    this = case(decay=0.8, use_buffers=use_buffers, update_every_n_steps=2, module={"norm": True})
    callback = ranked(this, verify=2, dirpath=tmp_path / "run")
    whole, table = objective(fit(this)), callback.ranking
    assert callback.summary["objective"]["recomputed"] == pytest.approx(whole, rel=1e-12)
    real = {name: value for name, value in zip(table.sample_id, table.columns["real"], strict=True) if value == value}
    assert len(real) == 2
    for name, value in real.items():
        without = objective(fit(this, weights=1 - one_hot(name)))
        assert value == pytest.approx(without - whole, rel=1e-9)
    # And from the files alone.
    train, val = loaders()
    options = {"train_dataloaders": train, "val_dataloaders": val}
    found = counterfactual(tmp_path / "run", double(norm=True, options=MOMENTUM), without=[name], **options)
    assert found.differences[0] == pytest.approx(value, rel=1e-9)


def test_a_run_is_ranked_again_from_its_files(tmp_path):
    callback = ranked(case(decay=0.8), dirpath=tmp_path / "run")
    train, val = loaders()
    again = retrace(tmp_path / "run", double(options=MOMENTUM), train_dataloaders=train, val_dataloaders=val, verify=0)
    assert again.summary["end_point"] == callback.summary["end_point"]
    assert np.array_equal(again.influence, callback.ranking.influence)
    path = tmp_path / "run" / "trajectory" / "averages.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunDirectoryError, match=r"averages.safetensors is damaged"):
        retrace(tmp_path / "run", double(options=MOMENTUM), train_dataloaders=train, val_dataloaders=val)
    path.unlink()
    with pytest.raises(RunDirectoryError, match=r"averages.safetensors is missing"):
        retrace(tmp_path / "run", double(options=MOMENTUM), train_dataloaders=train, val_dataloaders=val)


def test_in_32_bits_the_influences_are_those_of_64_and_the_logged_value_is_that_of_the_averages():
    def run(precision, make):
        plain = case(decay=0.8, module={"norm": True}, trainer={"precision": precision})
        plain.make = make
        return ranked(plain)

    narrow, wide = run("32-true", Plain), run("64-true", double)
    found, wanted = influences(narrow), influences(wide)
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
    said = narrow.summary["objective"]
    assert said["logged"] == pytest.approx(said["recomputed"], rel=1e-6)


def test_training_stays_as_it_is():
    this = case(decay=0.8, module={"norm": True}, trainer={"precision": "32-true", "num_sanity_val_steps": 1})
    this.make = Plain
    plain, followed = fit(this), fit(this, SGDInfluence("val_loss", verify=0))
    for one, other in zip(plain.state_dict().values(), followed.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def swa(trainer=None, module=None, **options):
    given = {"swa_lrs": 0.05, "swa_epoch_start": 1, "annealing_epochs": 1, **options}
    return case(lambda: StochasticWeightAveraging(**given), module, {"max_epochs": 3, **(trainer or {})})


def test_with_stochastic_weight_averaging_the_mean_over_epochs_is_the_end_point(tmp_path):
    callback = assert_influence_is_the_derivative(swa(), dirpath=tmp_path / "run", verify=1)
    assert callback.summary["end_point"] == "after step 14, weights averaged by StochasticWeightAveraging"
    assert callback.summary["objective"]["logged"] is None
    table = callback.ranking
    ((name, value),) = [(a, b) for a, b in zip(table.sample_id, table.columns["real"], strict=True) if b == b]
    without = objective(fit(swa(), weights=1 - one_hot(name)))
    assert value == pytest.approx(without - objective(fit(swa())), rel=1e-9)


def test_stochastic_weight_averaging_that_ends_early_leaves_the_trained_weights():
    callback = assert_influence_is_the_derivative(swa({"max_steps": 8}))
    assert callback.summary["end_point"].endswith(
        "averaged weights of StochasticWeightAveraging are not what is ranked"
    )


def test_stochastic_weight_averaging_holds_nothing_of_the_last_epoch_and_says_so():
    with pytest.warns(SGDInfluenceWarning, match="Every influence is exactly zero.*more epochs"):
        callback = ranked(swa(), epochs=1)
    assert not influences(callback).any()


class Taught(Plain):
    """Follows a teacher, which is moved before the loss is computed or by a hook behind the step."""

    def __init__(self, where, **options):
        super().__init__(**options)
        self.teacher, self.where = copy.deepcopy(self.net).requires_grad_(False), where
        self.double()

    def follow(self):
        with torch.no_grad():
            for theirs, ours in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                theirs.lerp_(ours, 0.3)

    def training_step(self, batch, batch_idx):
        if self.where == "before":
            self.follow()
        return super().training_step(batch, batch_idx)

    def loss(self, batch, reduction="mean"):
        x, y, _ = batch
        return F.cross_entropy(self.net(x) + 0.5 * self.teacher(x), y, reduction=reduction)

    def on_train_batch_end(self, *arguments):
        if self.where == "behind":
            self.follow()


def taught(where):
    found = case(decay=0.8, module={"where": where})
    found.make = Taught
    return found


def test_averages_of_a_teacher_are_followed():
    assert_influence_is_the_derivative(taught("before"))


def test_a_teacher_that_a_hook_moves_after_it_was_averaged_is_refused_by_name():
    with (
        pytest.warns(SGDInfluenceWarning, match="Recording stopped"),
        pytest.raises(UnsupportedTrainingError, match=r"average of 'teacher\.\d\.\w+'"),
    ):
        ranked(taught("behind"))


class Stop(pl.Callback):
    """A power cut."""

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 8:
            raise OSError("power cut")


def resumed(folder, averaging, lose=False):
    """Trained up to a cut within the second epoch, and on from a checkpoint at the end of the first."""

    def train(folder, module, callbacks, ckpt_path=None):
        pl.seed_everything(1, verbose=False)
        callback = SGDInfluence("val_loss", epochs="all", verify=0, dirpath=folder)
        trainer = quiet_trainer([callback, *callbacks], enable_checkpointing=True)
        trainer.fit(module, *loaders(shuffle=False), ckpt_path=ckpt_path)
        return callback

    saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    with pytest.raises(OSError, match="power cut"):
        train(folder / "run", double(), [EMAWeightAveraging(decay=0.8), saving, Stop()])
    if lose:
        (folder / "run" / "trajectory" / "averaged.json").unlink()
    again = train(folder / "run", double(), [averaging, saving], folder / "step=5.ckpt")
    return again, lambda: train(folder / "whole", double(), [EMAWeightAveraging(decay=0.8)])


def test_a_fit_that_goes_on_knows_the_averages_before_its_checkpoint(tmp_path):
    again, whole = resumed(tmp_path, EMAWeightAveraging(decay=0.8))
    assert np.array_equal(influences(again), influences(whole()))


@pytest.mark.parametrize(
    "how", [{"lose": True}, {"averaging": EMAWeightAveraging(decay=0.7)}], ids=["lost", "of another callback"]
)
def test_a_fit_that_goes_on_and_does_not_know_them_is_refused(how, tmp_path):
    with pytest.raises(UnsupportedTrainingError, match=r"averaged before step 5.*Ask for fewer epochs"):
        resumed(tmp_path, **{"averaging": EMAWeightAveraging(decay=0.8), **how})


def test_of_a_fit_that_was_cut_off_the_trained_weights_are_ranked_and_said_so(tmp_path):
    trainer = quiet_trainer([SGDInfluence("val_loss", dirpath=tmp_path), EMAWeightAveraging(decay=0.8), Stop()])
    with pytest.raises(OSError, match="power cut"):
        trainer.fit(double(), *loaders())
    train, val = loaders()
    with pytest.warns(SGDInfluenceWarning, match="did not come to its end"):
        again = retrace(tmp_path, double(), train_dataloaders=train, val_dataloaders=val, verify=0)
    assert again.summary["end_point"].endswith("the averaged weights of EMAWeightAveraging are not what is ranked")


# Not followed --------------------------------------------------------------------------------------


def with_function(function):
    return case(lambda: WeightAveraging(avg_fn=function))


def test_averages_of_a_plain_function_are_followed_and_of_squares_refused_before_training():
    share = 0.3
    callback = ranked(with_function(lambda average, weights, num: (1 - share) * average + share * weights))
    assert np.allclose(influences(callback), influences(ranked(case(decay=0.7))), rtol=1e-9, atol=1e-12)
    with pytest.raises(UnsupportedTrainingError, match="no sums of multiples"):
        ranked(with_function(lambda average, weights, num: 0.9 * average + 0.1 * weights**2))


def test_averages_that_depend_on_the_tensor_are_refused():
    function = lambda average, weights, num: average + (weights - average) * (0.1 if weights.ndim > 1 else 0.2)  # noqa: E731
    with (
        pytest.warns(SGDInfluenceWarning, match="Recording stopped"),
        pytest.raises(UnsupportedTrainingError, match=r"average of 'net\.\d\.\w+'.*not what its function makes"),
    ):
        ranked(with_function(function))


DECAY = 0.9


def by_a_global_number(average, weights, num):
    return DECAY * average + (1 - DECAY) * weights


class Annealing(pl.Callback):
    """Changes that number in the second epoch."""

    def on_train_epoch_start(self, trainer, module):
        global DECAY  # noqa: PLW0603
        DECAY = 0.9 if trainer.current_epoch == 0 else 0.8


def test_a_function_that_changes_during_the_training_is_refused():
    changing = with_function(by_a_global_number)
    changing.callbacks = lambda: [Annealing(), WeightAveraging(avg_fn=by_a_global_number)]
    with (
        pytest.warns(SGDInfluenceWarning, match="Recording stopped"),
        pytest.raises(UnsupportedTrainingError, match="changed during the training"),
    ):
        ranked(changing)


class Counting:
    """An average that counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, average, weights, num):
        self.calls += 1
        return average + (weights - average) / self.calls


class Own(EMAWeightAveraging):
    """Updates by itself."""

    def on_train_batch_end(self, *arguments):
        super().on_train_batch_end(*arguments)


@pytest.mark.parametrize(
    ("averaging", "why"),
    [
        (lambda: WeightAveraging(avg_fn=Counting()), "its function may remember something"),
        (Own, "it has a method on_train_batch_end of its own"),
    ],
)
def test_averages_that_are_not_followed_are_not_ranked_and_said_so(averaging, why, tmp_path):
    with pytest.warns(SGDInfluenceWarning, match=f"replaces the weights.*{why}"):
        callback = ranked(case(averaging), dirpath=tmp_path / "run")
    assert "are not what is ranked" in callback.summary["end_point"]
    assert np.array_equal(influences(callback), influences(ranked(case(None))))
    train, val = loaders()
    again = retrace(tmp_path / "run", double(options=MOMENTUM), train_dataloaders=train, val_dataloaders=val, verify=0)
    assert again.summary["end_point"] == callback.summary["end_point"]


def test_the_best_model_s_averages_are_refused_before_training():
    trainer = quiet_trainer(
        [SGDInfluence("val_loss", at="best"), EMAWeightAveraging(), ModelCheckpoint(monitor="val_loss")],
        enable_checkpointing=True,
    )
    with pytest.raises(UnsupportedTrainingError, match=r'at="best".*averages of EMAWeightAveraging'):
        trainer.fit(double(), *loaders())
    assert trainer.global_step == 0


def test_averages_that_round_the_weights_of_a_64_bit_run_are_refused_before_training():
    trainer = quiet_trainer([SGDInfluence("val_loss"), EMAWeightAveraging()])
    with pytest.raises(UnsupportedTrainingError, match=r"averages in torch.float32.*model.double\(\)"):
        trainer.fit(Plain(), *loaders())
    assert trainer.global_step == 0


class Anew(pl.Callback):
    """Has running statistics begin anew at the end, as torch's update_bn does before it makes them."""

    def on_train_end(self, trainer, module):
        for callback in trainer.callbacks:
            if isinstance(callback, WeightAveraging):
                callback._average_model.module.net[1].reset_running_stats()


def test_averages_that_something_else_writes_to_at_the_end_are_refused():
    anew = case(module={"norm": True})
    anew.callbacks = lambda: [Anew(), EMAWeightAveraging(use_buffers=False)]
    with (
        pytest.warns(SGDInfluenceWarning, match="Recording stopped"),
        pytest.raises(UnsupportedTrainingError, match=r"wrote to the averages.*after their last update"),
    ):
        ranked(anew)
