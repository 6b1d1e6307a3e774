# SPDX-License-Identifier: Apache-2.0
"""JSON that any reader takes: it has no NaN and no infinity."""

import json
import math

import numpy as np
import pytest

from lightning_sgdclean.base.files import write_json


def test_what_is_not_finite_is_null(tmp_path):
    content = {"a": math.nan, "b": [1.5, -math.inf, (np.float64("nan"), "NaN")], "c": {"d": math.inf, "e": None}}
    write_json(tmp_path / "some.json", content)

    def refused(constant):
        pytest.fail(f"{constant} is no JSON")

    found = json.loads((tmp_path / "some.json").read_text(encoding="utf-8"), parse_constant=refused)
    assert found == {"a": None, "b": [1.5, None, [None, "NaN"]], "c": {"d": None, "e": None}}
