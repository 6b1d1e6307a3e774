# SPDX-License-Identifier: Apache-2.0
"""The figures of docs/scale.md are what its formulas make of its measured constants."""

import importlib.util
import json
from pathlib import Path

import pytest

from lightning_sgdclean.trajectory.schedule import reversal, revolve
from machine import Machine
from pages import assert_figures_are

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def scale():
    spec = importlib.util.spec_from_file_location("scale", ROOT / "benchmarks" / "scale.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_figures_of_the_page_are_those_of_the_measured_constants(scale):
    constants = json.loads(scale.RESULT.read_text(encoding="utf-8"))
    assert_figures_are((ROOT / "docs" / "scale.md").read_text(encoding="utf-8"), scale.markdown(constants))


@pytest.mark.parametrize(("num_steps", "interval", "slots"), [(10**4, 100, 99), (10**5, 317, 80), (10**5, 317, 2)])
def test_rows_of_the_page_count_what_a_simulation_makes(scale, num_steps, interval, slots):
    kept = [*range(0, num_steps, interval), num_steps]
    machine = Machine(kept).run(reversal(kept, 0, num_steps, revolve(slots)))
    cells = scale.policy_row("", num_steps, interval, 1.0, slots, 8.0).split("|")[2:]
    assert cells[0].strip() == f"{len(kept):,}"
    assert int(cells[2]) == machine.most_held
    assert cells[3].split() == scale.in_units(machine.most_held + 8.0).split()
    cost = scale.WALK + (machine.steps + machine.checks) / num_steps
    assert float(cells[4]) == pytest.approx(cost, abs=0.06)  # the last segment may be shorter


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_states_in_memory_are_those_of_a_retrace(scale, optimizer):
    constants = json.loads(scale.RESULT.read_text(encoding="utf-8"))
    # One more than was measured: whether teachers or buffers move is seen in a few states first.
    assert scale.states_around(optimizer, 4) <= constants["states_around"][optimizer] + 1.5


def test_constants_are_those_of_a_recording(scale, tmp_path):
    constants = json.loads(scale.RESULT.read_text(encoding="utf-8"))
    disk, _ = scale.recorded(32, tmp_path, num_steps=32)
    assert disk == pytest.approx(constants["disk_step"] + 32 * constants["disk_sample"], rel=0.1)
