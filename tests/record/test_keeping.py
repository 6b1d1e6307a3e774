# SPDX-License-Identifier: Apache-2.0
"""What speaks for random data, and what does not; what keeping them takes."""

import random

import numpy as np
import pytest
import torch

from lightning_sgdclean.base.errors import BudgetError, SGDInfluenceWarning, UnsupportedTrainingError
from lightning_sgdclean.base.randomness import RandomStates
from lightning_sgdclean.data.fingerprints import fingerprint
from lightning_sgdclean.record.keeping import BatchKeeper, KeepPlan, RandomnessWatch

STATES = RandomStates(torch.device("cpu"))
PLENTY = KeepPlan(num_batches=10, first_epoch=0, free=1e9)


def prints(batch):
    return fingerprint(batch, len(batch))


def pass_by(watch, ids, batch, epoch=0, draw=lambda: None, interrupted=False):
    watch.batch_ends(STATES.now)
    if interrupted:
        watch.is_interrupted()
    draw()
    watch.look(ids, prints(batch), epoch, watch.batch_begins(STATES.now()))


@pytest.mark.parametrize(
    "draw", [lambda: torch.rand(1), random.random, np.random.rand], ids=["torch", "python", "numpy"]
)
def test_any_global_generator_that_moves_while_a_batch_is_loaded_is_a_sign(draw):
    watch = RandomnessWatch()
    watch.look([0, 1], prints(torch.zeros(2)), 0, None)
    pass_by(watch, [2, 3], torch.zeros(2))
    assert watch.evidence == ""
    pass_by(watch, [4, 5], torch.zeros(2), draw=draw)
    assert watch.evidence == "random numbers were drawn while a batch was loaded"


def test_draws_of_validation_between_two_batches_are_no_sign():
    watch = RandomnessWatch()
    pass_by(watch, [0, 1], torch.zeros(2), draw=lambda: torch.rand(1), interrupted=True)
    assert watch.evidence == ""


def test_a_sample_is_compared_only_with_itself_in_a_like_setting():
    watch = RandomnessWatch()
    pass_by(watch, [0, 1], torch.tensor([[1, 2], [3, 4]]))
    pass_by(watch, [1, 0], torch.tensor([[3, 4, 0], [1, 2, 0]]), 1)  # padded longer
    pass_by(watch, [1, 0], torch.tensor([[3, 4, 0], [1, 2, 0]]), 2)
    assert watch.evidence == ""
    pass_by(watch, [0, 1], torch.tensor([[1, 2, 0], [3, 9, 0]]), 3)
    assert watch.evidence.startswith("sample 1 holds other data in epoch 3 than when it was last drawn")


def test_what_changes_one_sample_in_fifty_is_found_while_batches_are_still_kept_on_suspicion():
    rng, watch = np.random.default_rng(0), RandomnessWatch()
    for epoch in (0, 1):
        for first in range(0, 1000, 20):
            batch = torch.arange(first, first + 20).float() + torch.from_numpy(rng.random(20) < 0.02)
            pass_by(watch, list(range(first, first + 20)), batch, epoch)
            if epoch == 1 and not watch.evidence:
                assert watch.is_undecided
            if watch.evidence:
                return
    raise AssertionError


def test_rows_that_are_no_samples_leave_the_question_open_but_not_for_long():
    watch = RandomnessWatch()
    for epoch in range(3):
        for number in range(40):
            watch.batch_ends(STATES.now)
            drew = watch.batch_begins(STATES.now())
            watch.look(list(range(8)), fingerprint(torch.full((3, 2), 100 * epoch + number), 8), epoch, drew)
    assert watch.evidence == ""
    assert not watch.is_undecided


def keeper(mode="auto", plan=PLENTY):
    said = []
    return BatchKeeper(mode, lambda: plan, said.append), said


def test_what_is_declared_is_announced_once_before_it_is_kept():
    keep, said = keeper(True)
    for _ in range(2):
        assert keep.packed([torch.zeros(4, 5)], [0, 1, 2, 3], prints(torch.zeros(4)), 0, None) is not None
    assert said == [
        "Training batches are kept as they were trained on, since keep_batches=True: "
        "80 B a batch times 10 batches of the window, 800 B, of 1 GB that may be taken."
    ]
    assert keep.summary() == {"kept": 2, "why": "keep_batches=True", "bytes": 160}


def test_without_an_end_in_sight_one_batch_must_fit():
    endless = KeepPlan(num_batches=float("inf"), first_epoch=float("inf"), free=100)
    keep, said = keeper(True, endless)
    assert keep.packed([torch.zeros(4, 5)], [0, 1, 2, 3], prints(torch.zeros(4)), 0, None) is not None
    assert said[0].endswith("80 B a batch, for as long as training lasts, of 100 B that may be taken.")
    with pytest.raises(BudgetError, match="would have to be kept"):
        keeper(True, endless)[0].packed([torch.zeros(40, 5)], list(range(40)), prints(torch.zeros(40)), 0, None)


def test_a_stream_is_kept_whatever_it_is_made_of_or_refused():
    keep, said = keeper()
    assert keep.packed([torch.zeros(4)], None, prints(torch.zeros(4)), 0, None) is not None
    assert "since they cannot be fetched again" in said[0]
    with pytest.raises(UnsupportedTrainingError, match="without pickle"):
        keep.packed([iter("a")], None, prints(torch.zeros(4)), 0, None)


def test_epochs_of_the_window_that_are_gone_are_named_and_others_are_not():
    for first_epoch, lost in ((0, "epochs 0, 1"), (1, "epoch 1"), (2, "")):
        keep, _ = keeper(plan=KeepPlan(10, first_epoch, 1e9))
        ids, same = list(range(300)), torch.zeros(300)
        keep.watch.look([], prints(torch.zeros(1)), 0, None)  # the first batch, kept on suspicion
        for epoch in (0, 1):
            keep.watch.batch_ends(STATES.now)
            drew = keep.watch.batch_begins(STATES.now())
            assert keep.packed(same, ids, prints(same), epoch, drew) is None
        with pytest.warns(SGDInfluenceWarning, match="sample 0 holds other data in epoch 2") as warned:
            assert keep.packed(same + 1, ids, prints(same + 1), 2, None) is not None
        assert (f"batches of {lost}, which the window reaches, are gone already" in str(warned[0].message)) == bool(
            lost
        )
