# SPDX-License-Identifier: Apache-2.0
"""What was proved of a loss on the first batch serves the rehearsal and the retrace, too."""

import inspect

import pytest

from cases import Plain, loaders, quiet_trainer
from lightning_sgdclean import SGDInfluence, retrace
from lightning_sgdclean.losses import verified


@pytest.fixture
def proofs(monkeypatch):
    """Grows by one with every proof."""
    seen, original = [], verified.prove_split
    monkeypatch.setattr(verified, "prove_split", lambda probe: seen.append(probe.num) or original(probe))
    return seen


def test_the_split_is_proved_once_a_fit_and_once_in_a_later_retrace(proofs, tmp_path):
    callback = SGDInfluence(epochs="all", dirpath=tmp_path / "run")
    quiet_trainer([callback], max_epochs=2).fit(Plain(), *loaders())
    assert len(proofs) == 1
    train, val = loaders()
    retrace(callback.run_dir, Plain(), train_dataloaders=train, val_dataloaders=val, epochs="all")
    assert len(proofs) == 2


def test_from_the_hook_to_the_training_step_are_nine_frames(tmp_path):
    depths = set()

    class Framed(Plain):
        def training_step(self, batch, batch_idx):
            names = [frame.function for frame in inspect.stack(0)]
            if {"on_fit_end", "retrace_step"} <= {*names} and not {"_recheck", "check_derivative"} & {*names}:
                depths.add(names.index("on_fit_end"))
            return super().training_step(batch, batch_idx)

    quiet_trainer([SGDInfluence(dirpath=tmp_path / "run")], max_epochs=1).fit(Framed(), *loaders())
    assert depths == {9}
