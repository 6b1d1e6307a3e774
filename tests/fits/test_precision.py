# SPDX-License-Identifier: Apache-2.0
"""Runs in 16 bits: replayed bit for bit, compared with float32, warned about when they are noise."""

import numpy as np
import pytest
import torch
from pytorch_lightning.plugins import MixedPrecision
from torch import nn

from cases import NUM_TRAIN, TRAIN, Case, Plain, adam, fit
from lightning_sgdclean import SGDInfluence
from reference import influences, ranked

NET = {"norm": True, "dropout": 0.2}
MODULE = {**NET, "options": {"momentum": 0.9}}


def cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def half():
    """float16 with a GradScaler, on the CPU."""
    return {
        "precision": None,
        "plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))],
    }


OPTIMIZERS = {"sgd": {"options": {"momentum": 0.9}}, "adam": {"make_optimizer": adam}}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The influences in float64, by the optimizer's name."""
    folder = tmp_path_factory.mktemp("float64")
    cases = {name: Case("float64", {**NET, **options}) for name, options in OPTIMIZERS.items()}
    return {name: influences(ranked(case, dirpath=folder / name)) for name, case in cases.items()}


@pytest.mark.parametrize(
    ("precision", "optimizer"),
    [
        ("32-true", "sgd"),
        ("32-true", "adam"),
        ("bf16-mixed", "sgd"),
        ("bf16-true", "adam"),
        ("float16", "sgd"),
        ("float16", "adam"),
    ],
)
def test_losses_replay_bit_for_bit_and_influences_are_those_of_float64(reference, precision, optimizer):
    trainer = half() if precision == "float16" else {"precision": precision}
    callback = ranked(Case(precision, {**NET, **OPTIMIZERS[optimizer]}, trainer))
    replay = callback.summary["replay"]
    assert replay["batches_bit_for_bit"] == replay["batches"] > 0
    assert replay["complaints"] == []
    # The trained weights differ, too: 16 bits took another path.
    assert cosine(influences(callback), reference[optimizer]) > {"32-true": 0.99999}.get(precision, 0.97)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_agreement_with_float32_stands_in_the_summary(precision):
    case = Case(precision, MODULE, {"precision": precision})
    callback = ranked(case)
    agreement = callback.summary["float32_agreement"]
    assert agreement["num_steps"] == 15
    wide = ranked(case, retrace_precision="float32")
    assert wide.summary["float32_agreement"] is None
    # All steps of the window were compared, so the agreement is that of the whole rankings.
    assert agreement["cosine"] == pytest.approx(cosine(influences(callback), influences(wide)), abs=1e-6)
    assert wide.summary["replay"]["batches_bit_for_bit"] == 15
    assert callback.ranking.visits.sum() == 3 * NUM_TRAIN  # counted in whole numbers, not in 16 bits


def test_a_full_precision_run_is_not_compared():
    assert ranked(Case("32", MODULE, {"precision": "32-true"})).summary["float32_agreement"] is None


class Converged(Plain):
    """Softmax regression, judged by what it was trained on: the objective's gradient is what rounding leaves of it."""

    def __init__(self, **options):
        super().__init__(**options)
        self.net = nn.Linear(5, 3)


def test_influences_that_are_noise_are_loudly_warned_about():
    trainer = {"precision": "bf16-mixed", "max_epochs": 300}
    case = Case("converged", {"options": {"lr": 0.5}}, trainer, {"batch_size": 23}, make=Converged, val=TRAIN)
    callback = SGDInfluence("val_loss", epochs=20)
    with pytest.warns(UserWarning, match=r'rounding noise.*Do not trust.*retrace_precision="float32"'):
        fit(case, callback)
    assert callback.summary["float32_agreement"]["cosine"] < 0.9


def test_parameters_are_left_in_their_own_type():
    module = fit(
        Case("bf16", MODULE, {"precision": "bf16-true"}), SGDInfluence("val_loss", retrace_precision="float32")
    )
    plain = fit(Case("bf16", MODULE, {"precision": "bf16-true"}))
    for name, tensor in plain.state_dict().items():
        assert module.state_dict()[name].dtype is tensor.dtype
        assert torch.equal(module.state_dict()[name], tensor), name


class InFloat32(Plain):
    """Its validation computes in 32 bits whatever the run does, as MONAI's focal loss does."""

    def validation_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0]).float(), batch[1])
        self.log("val_loss", loss * 1.1)


def test_values_of_32_bits_are_summed_in_64_where_the_run_is_of_64():
    found = influences(ranked(Case("32 bits", MODULE, make=InFloat32)))
    assert found == pytest.approx(1.1 * influences(ranked(Case("64 bits", MODULE))), rel=1e-4, abs=1e-7)
