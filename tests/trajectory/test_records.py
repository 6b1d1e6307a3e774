# SPDX-License-Identifier: Apache-2.0
"""Windows, counted in epochs and told in words."""

from lightning_sgdclean.trajectory.records import first_epoch_kept, window_in_words
from small_steps import step


def test_window_counts_completed_epochs_besides_a_started_one():
    assert first_epoch_kept(9, True, 1) == 9
    assert first_epoch_kept(10, False, 1) == 9
    assert first_epoch_kept(10, True, "all") == 0
    assert first_epoch_kept(0, False, 3) == 0
    first, last = step(812, 9, False), step(1010, 10, False)
    assert window_in_words(first, last, 40) == "steps 812 to 1010: epoch 9 and 40 steps of epoch 10"
    assert window_in_words(step(0, 0, False), step(9, 1, True), 5) == "steps 0 to 9: epochs 0 to 1"
    assert window_in_words(step(0, 0, False), step(3, 0, False), 4) == "steps 0 to 3: 4 steps of epoch 0"
