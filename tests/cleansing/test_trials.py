# SPDX-License-Identifier: Apache-2.0
"""The trainings of a cleansing on disk."""

from pathlib import Path

import pytest

from lightning_sgdclean.base.errors import RunDirectoryError
from lightning_sgdclean.cleansing.trials import TrialStore


def test_a_cleansing_that_was_killed_before_its_first_training_can_begin_anew():
    Path("cleansing", "trials").mkdir(parents=True)
    Path("cleansing", ".cleansing.json.123.tmp").write_text('{"form', encoding="utf-8")
    TrialStore(Path("cleansing"), {"build": "mine"})
    assert sorted(path.name for path in Path("cleansing").iterdir()) == ["cleansing.json", "trials"]
    with pytest.raises(RunDirectoryError, match="another build"):
        TrialStore(Path("cleansing"), {"build": "other"})
    Path("other", "trials").mkdir(parents=True)
    Path("other", "trials", "mine.txt").touch()
    with pytest.raises(RunDirectoryError, match="is not empty"):
        TrialStore(Path("other"), {"build": "mine"})
