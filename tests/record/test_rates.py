# SPDX-License-Identifier: Apache-2.0
"""Learning rates that follow the training are named; those that are functions of the step alone pass in silence."""

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import LambdaCallback, ModelCheckpoint
from torch.optim import lr_scheduler as schedules

from cases import Case, Plain, adam, fit, loaders, objective, quiet_trainer, scaled
from lightning_sgdclean import SGDInfluence, retrace
from lightning_sgdclean.base.errors import SGDInfluenceWarning
from reference import dense_direction, directional, influences, ranked

MOMENTUM = {"options": {"momentum": 0.9}}
NOT_THE_STEP = r"option 'lr' of parameter group 0, which changed from step {} on \(last at step {}\), may follow"


class Scheduled(Plain):
    """With any schedulers, each stepped in the rhythm that is asked for."""

    def __init__(self, *schedule, interval="step", frequency=1, **options):
        super().__init__(**options)
        self.schedule, self.rhythm = schedule, {"interval": interval, "frequency": frequency}

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        made = [make(optimizer, self) for make in self.schedule]
        rhythm = {"monitor": "train_loss" if self.rhythm["interval"] == "step" else "val_loss", **self.rhythm}
        return [optimizer], [{"scheduler": scheduler, **rhythm} for scheduler in made]


def scheduled(name, *make, trainer=None, **options):
    return Case(name, options, trainer or {}, make=lambda **module: Scheduled(*make, **module))


def warm(steps):
    return min((steps + 1) / 4, 1.0)


class Ramp:
    """A rate with a memory of its own."""

    def __init__(self):
        self.asked = 0

    def __call__(self, step):
        self.asked += 1
        return 1 / (1 + step)


OF_THE_STEP = {
    "step": lambda o, _: schedules.StepLR(o, 2, 0.5),
    "multistep": lambda o, _: schedules.MultiStepLR(o, [1, 3], 0.5),
    "lambda": lambda o, _: schedules.LambdaLR(o, warm),
    "lambda object": lambda o, _: schedules.LambdaLR(o, Ramp()),
    "lambda of the clock": lambda o, m: schedules.LambdaLR(o, lambda _: 1 / (1 + m.global_step + m.current_epoch)),
    "multiplicative": lambda o, _: schedules.MultiplicativeLR(o, lambda step: 0.9),
    "constant": lambda o, _: schedules.ConstantLR(o, 0.5, 2),
    "linear": lambda o, _: schedules.LinearLR(o, 0.2, total_iters=6),
    "exponential": lambda o, _: schedules.ExponentialLR(o, 0.9),
    "polynomial": lambda o, _: schedules.PolynomialLR(o, 9, 2.0),
    "cosine": lambda o, _: schedules.CosineAnnealingLR(o, 6),
    "restarts": lambda o, _: schedules.CosineAnnealingWarmRestarts(o, 2, 2),
    "one cycle": lambda o, _: schedules.OneCycleLR(o, 0.2, total_steps=16),
    "cyclic": lambda o, _: schedules.CyclicLR(o, 0.01, 0.1, step_size_up=3, mode="exp_range", gamma=0.9),
    "sequential": lambda o, _: schedules.SequentialLR(
        o, [schedules.LambdaLR(o, warm), schedules.CosineAnnealingLR(o, 6)], milestones=[2]
    ),
    "chained": lambda o, _: schedules.ChainedScheduler([schedules.LinearLR(o), schedules.ExponentialLR(o, 0.9)]),
    "plateau": lambda o, _: schedules.ReduceLROnPlateau(o, patience=0, threshold=2.0, factor=0.5, min_lr=1e-3),
}
RHYTHMS = [("step", 1), ("step", 2), ("epoch", 1)]


@pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler is using 'interval'")
@pytest.mark.parametrize("name", OF_THE_STEP)
@pytest.mark.parametrize(("interval", "frequency"), RHYTHMS)
def test_every_scheduler_of_torchs_passes_in_silence(name, interval, frequency):
    trainer = {"max_epochs": 4, "limit_train_batches": 4}
    case = scheduled(name, OF_THE_STEP[name], interval=interval, frequency=frequency, trainer=trainer, **MOMENTUM)
    assert ranked(case).summary["rates"] == {"of_step_alone": True, "words": "functions of the step alone"}


@pytest.mark.parametrize(
    "case",
    [
        scheduled("two", OF_THE_STEP["linear"], OF_THE_STEP["exponential"]),
        scheduled("two, one on a plateau", OF_THE_STEP["linear"], OF_THE_STEP["plateau"], interval="epoch"),
        scheduled("groups", OF_THE_STEP["cosine"], two_groups=True, **MOMENTUM),
        scheduled("betas", OF_THE_STEP["one cycle"], make_optimizer=adam),
        scheduled("tensor", OF_THE_STEP["cosine"], options={"lr": torch.tensor(0.1)}),
        scheduled("accumulated", OF_THE_STEP["cosine"], trainer={"accumulate_grad_batches": 2}),
        scheduled("stopped", OF_THE_STEP["cosine"], trainer={"max_steps": 8}),
    ],
    ids=str,
)
def test_so_do_several_at_once_groups_tensors_and_accumulation(case):
    assert ranked(case).summary["rates"]["of_step_alone"] is True


def test_so_do_steps_that_a_scaler_skips():
    class Skipped(Scheduled):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if (self.current_epoch, batch_idx) == (1, 2) else loss

    case = scaled("skipped", MOMENTUM)
    case.make = lambda **module: Skipped(OF_THE_STEP["cosine"], **module)
    callback = ranked(case)
    assert callback.summary["window"]["num_without_update"] == 1
    assert callback.summary["rates"]["of_step_alone"] is True


class Uncounted:
    """A scheduler of one's own, as timm's are: it counts nothing, and is told the epoch or goes by its own memory."""

    def __init__(self, optimizer, by):
        self.optimizer, self.by, self.seen = optimizer, by, []

    def step(self, epoch):
        self.seen.append(epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = self.by(self.seen)

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


def uncounted(by, **options):
    class Stepping(Scheduled):
        def lr_scheduler_step(self, scheduler, metric):
            scheduler.step(self.current_epoch)

    made = [lambda optimizer, module: Uncounted(optimizer, lambda seen: by(seen, module))]
    return Case("uncounted", MOMENTUM, make=lambda **module: Stepping(*made, **module, **options))


@pytest.mark.parametrize("rhythm", RHYTHMS)
@pytest.mark.parametrize("by", [lambda seen, _: 0.1 / (1 + seen[-1]), lambda seen, _: 0.1 / len(seen)])
def test_so_do_schedulers_of_ones_own_that_count_nothing(by, rhythm):
    case = uncounted(by, interval=rhythm[0], frequency=rhythm[1])
    assert ranked(case).summary["rates"]["of_step_alone"] is True


def test_but_not_those_of_them_that_follow_the_training():
    case = uncounted(lambda seen, module: 0.1 / (1 + length(module)))
    with pytest.warns(SGDInfluenceWarning, match=NOT_THE_STEP.format(1, 14)):
        assert ranked(case).summary["rates"]["of_step_alone"] is False


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_batches_without_a_loss_are_no_matter_either():
    class Sparing(Scheduled):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    case = Case("sparing", MOMENTUM, make=lambda **module: Sparing(OF_THE_STEP["exponential"], **module))
    assert ranked(case).summary["rates"]["of_step_alone"] is True


# What follows the training ---------------------------------------------------------------------------


def length(module):
    return float(sum(param.detach().square().sum() for param in module.parameters())) ** 0.5


class ByLoss(Plain):
    """A rate in the manner of Polyak's: the larger the loss, the longer the step."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.last = loss.detach()
        return loss

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        def closure():
            loss = optimizer_closure()
            for group in optimizer.param_groups:
                group["lr"] = 0.2 * float(self.last) ** 2
            return loss

        optimizer.step(closure=closure)


BY_LENGTH = {
    "length": lambda o, m: schedules.LambdaLR(o, lambda _: 3 * length(m) - 6),
    "length in a sequence": lambda o, m: schedules.SequentialLR(
        o, [schedules.LambdaLR(o, warm), schedules.LambdaLR(o, lambda _: 3 * length(m) - 6)], milestones=[2]
    ),
}
FOLLOWING = [
    (Case("loss", make=ByLoss), "ByLoss.optimizer_step"),
    (scheduled("length", BY_LENGTH["length"]), "LambdaLR"),
    (scheduled("length in a sequence", BY_LENGTH["length in a sequence"]), "SequentialLR"),
    (scheduled("length by epoch", BY_LENGTH["length"], interval="epoch"), "LambdaLR"),
]


@pytest.mark.parametrize(("case", "by"), FOLLOWING, ids=str)
def test_a_rate_that_follows_the_training_is_named_and_its_influences_are_off(case, by):
    with pytest.warns(SGDInfluenceWarning, match=rf"may follow the training: {by} gave other values when asked again"):
        callback = ranked(case)
    assert callback.summary["rates"]["of_step_alone"] is False
    truth = -directional(lambda weights: objective(fit(case, weights=weights)), dense_direction(23))
    found = float(influences(callback) @ dense_direction(23).numpy())
    assert abs(found - truth) > 1e-4 * abs(truth)  # where rates are functions of the step, it is below 1e-7


def test_within_an_epoch_a_rate_that_follows_the_training_by_epochs_is_a_constant():
    """What its samples do cannot reach it."""
    case, callback = FOLLOWING[-1][0], SGDInfluence("val_loss", epochs=1)
    fit(case, callback)
    assert callback.summary["rates"] == {"of_step_alone": True, "words": "constant"}


def by_hand(trainer, module, *_):
    trainer.optimizers[0].param_groups[0]["lr"] = 0.1 / (1 + trainer.global_step)


def test_a_rate_that_a_callback_sets_cannot_be_told_and_steps_and_option_are_named():
    case = Case("by hand", callbacks=lambda: [LambdaCallback(on_train_batch_start=by_hand)])
    match = NOT_THE_STEP.format(1, 14) + " the training: no scheduler set it"
    with pytest.warns(SGDInfluenceWarning, match=match):
        ranked(case)


class WarmingUp(Plain):
    """As in Lightning's documentation, and it logs the rate."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        optimizer.step(closure=optimizer_closure)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = 0.1 * min((self.trainer.global_step + 1) / 4, 1.0)
        self.log("rate", optimizer.param_groups[0]["lr"])


def test_a_hook_that_sets_the_rate_by_the_step_is_asked_again_and_passes():
    assert ranked(Case("warming up", MOMENTUM, make=WarmingUp)).summary["rates"]["of_step_alone"] is True


def test_what_a_function_raises_when_it_is_asked_again_is_told():
    def rate(step):
        if module.trainer.training and len(asked) > 15:
            raise LookupError("no more")
        asked.append(step)
        return 1 / (1 + step)

    asked, module = [], Scheduled(lambda o, m: schedules.LambdaLR(o, rate))
    with pytest.warns(SGDInfluenceWarning, match=r"LambdaLR gave other values .* \(and raised LookupError: no more\)"):
        quiet_trainer([SGDInfluence(epochs="all")]).fit(module, *loaders())


# Around it -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lambda object", "chained", "plateau", "cyclic"])
def test_asking_again_leaves_no_trace(name):
    ends = []
    for callbacks in ([], [SGDInfluence(epochs="all")]):
        pl.seed_everything(1, verbose=False)
        module = Scheduled(OF_THE_STEP[name], interval="epoch" if name == "plateau" else "step", **MOMENTUM)
        trainer = quiet_trainer(callbacks)
        trainer.fit(module, *loaders())
        (scheduler,) = module.trainer.lr_scheduler_configs
        optimizer = trainer.optimizers[0]
        groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        ends.append((groups, str(scheduler.scheduler.state_dict()), sorted(vars(optimizer)), torch.get_rng_state()[:8]))
        ends[-1] += (trainer.global_step, trainer.current_epoch, module.state_dict())
    for one, other in zip(*ends, strict=True):
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, other)
        elif isinstance(one, dict):
            assert all(torch.equal(value, other[key]) for key, value in one.items())
        else:
            assert str(one).replace("0x", "") == str(other).replace("0x", "") or one == other


def resumed(folder, case, first_epochs=2):
    """Train, and go on from the checkpoint in a new fit that joins the run."""
    for epochs, checkpoint in ((first_epochs, None), (4, folder / "last.ckpt")):
        pl.seed_everything(1, verbose=False)
        callback = SGDInfluence(epochs="all", dirpath=folder / "run", overwrite=checkpoint is not None)
        saving = ModelCheckpoint(folder, save_last=True, enable_version_counter=False)
        trainer = quiet_trainer([callback, saving], max_epochs=epochs, enable_checkpointing=True)
        trainer.fit(case.make(**case.module), *loaders(), ckpt_path=checkpoint)
    assert callback.summary["window"]["first_step"] == 0
    return callback


@pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler is using 'interval'")
@pytest.mark.parametrize("name", ["cosine", "sequential", "chained", "cyclic", "one cycle", "lambda", "restarts"])
@pytest.mark.parametrize(("interval", "frequency"), [("step", 2), ("epoch", 1)])
def test_a_fit_that_goes_on_from_a_checkpoint_stays_silent(tmp_path, name, interval, frequency):
    case = scheduled(name, OF_THE_STEP[name], interval=interval, frequency=frequency, **MOMENTUM)
    assert resumed(tmp_path, case).summary["rates"] == {"of_step_alone": True, "words": "functions of the step alone"}


@pytest.mark.filterwarnings("ignore:.*may follow the training")
def test_what_the_fit_before_the_checkpoint_followed_is_named(tmp_path):
    case = scheduled("length", BY_LENGTH["length"])
    assert "which changed from step 1 on (last at step 19)" in resumed(tmp_path, case).summary["rates"]["words"]


def test_a_later_retrace_says_it_as_the_fit_did(tmp_path):
    case, _ = FOLLOWING[1]
    with pytest.warns(SGDInfluenceWarning, match="may follow the training"):
        callback = ranked(case, dirpath=tmp_path / "run")
    train, val = loaders()
    data = {"train_dataloaders": train, "val_dataloaders": val}
    with pytest.warns(SGDInfluenceWarning, match="may follow the training"):
        again = retrace(tmp_path / "run", case.make(**case.module), epochs="all", **data)
    assert again.summary["rates"] == callback.summary["rates"]


def test_of_a_run_that_was_cut_short_it_is_not_known_and_that_is_said(tmp_path):
    def fail(trainer, *_):
        if trainer.global_step == 12:
            raise ArithmeticError("not ours")

    case = scheduled("cosine", OF_THE_STEP["cosine"])
    case.callbacks = lambda: [LambdaCallback(on_train_batch_start=fail)]
    with pytest.raises(ArithmeticError):
        ranked(case, dirpath=tmp_path / "run")
    train, val = loaders()
    data = {"train_dataloaders": train, "val_dataloaders": val}
    with (
        pytest.warns(SGDInfluenceWarning, match="did not come to its end"),
        pytest.warns(SGDInfluenceWarning, match="Whether the learning rates of this run follow its training"),
    ):
        ranking = retrace(tmp_path / "run", case.make(**case.module), epochs="all", **data)
    assert ranking.summary["rates"]["of_step_alone"] is None
