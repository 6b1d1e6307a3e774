# SPDX-License-Identifier: Apache-2.0
"""The demo, made small: it runs, and the flipped digits come first."""

import importlib.util
from pathlib import Path

import pytest


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_demo_finds_flipped_digits_far_above_chance():
    path = Path(__file__).parent.parent / "examples" / "mnist_flipped_labels.py"
    spec = importlib.util.spec_from_file_location("demo", path)
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    result = demo.main(["--samples", "1000", "--epochs", "2", "--drop", "100"])
    count, hits = result["found"][0.05]
    assert count == 50
    assert hits > 15  # by chance: 5
    assert result["csv"].exists()
    assert len(result["errors"]) == 3
