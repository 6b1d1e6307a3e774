# SPDX-License-Identifier: Apache-2.0
"""The house: which wing may import which, how high it is, how long its files are, what each wing shows."""

import ast
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_sgdclean
from house import FACE, House

HOUSE = House(Path(lightning_sgdclean.__file__).parent)
MODULES = [name for name in HOUSE.trees if not name.endswith(FACE) and name != "__main__"]
ROOT = ["callback", "retracing"]
WINGS = {  # what each may import
    "base": [],
    "data": ["base"],
    "trajectory": ["base", "data"],
    "ranking": ["base", "data"],
    "losses": ["base", "data", "trajectory"],
    "record": ["base", "data", "trajectory", "losses"],
    "replay": ["base", "data", "trajectory", "losses"],
    "report": ["base", "data", "trajectory", "ranking", "replay"],
    "adjoint": ["base", "data", "trajectory", "losses", "replay"],
    "leave_out": ["base", "data", "trajectory", "losses", "replay", "adjoint", "ranking"],
    "cleansing": ["base", "data", "ranking", "callback"],
}
BELOW = [wing for wing in WINGS if wing != "cleansing"]
MAY = WINGS | {"retracing": BELOW, "callback": [*BELOW, "retracing"], "cli": [*WINGS, *ROOT, FACE]}
SEES_A_TRAINER = ["base.lightning", "losses.surroundings", "replay.open", "record", *ROOT, "cleansing", "cli"]
HANDS_IT_ON = ["leave_out.counterfactual"]  # an argument of a public function, for replay.open


def test_every_import_across_wings_is_in_the_table():
    for name, needs in HOUSE.taken.items():
        wing = HOUSE.wing_of(name)
        if name in (FACE, "__main__"):
            continue
        for need in needs:
            assert HOUSE.wing_of(need) in [wing, *MAY[wing]], f"{name} imports {need}"


def test_the_wings_are_the_folders():
    assert {HOUSE.wing_of(name) for name in HOUSE.trees if "." in name} == {*WINGS, "cli"}
    assert {name for name in HOUSE.trees if "." not in name} == {FACE, "__main__", *ROOT}


def test_no_file_is_imported_in_a_circle_and_the_house_has_17_floors_at_most():
    assert max(HOUSE.floors.values()) <= 17  # ValueError where there is a circle


def test_files_are_few_and_neither_long_nor_short():
    lines = HOUSE.lines
    assert len(lines) <= 132
    assert 150 <= statistics.median(lines.values()) <= 260
    manual = {"callback": 420}  # its docstring is the manual
    assert [name for name, number in lines.items() if number > manual.get(name, 350)] == []


@pytest.mark.parametrize("wing", WINGS)
def test_what_others_take_of_a_wing_is_on_its_face(wing):
    face, defined = HOUSE.face(wing), {}
    for name in MODULES:
        if HOUSE.wing_of(name) == wing:
            defined |= dict.fromkeys(HOUSE.definitions(name), name)
    assert face - defined.keys() == set()
    assert not {name for name in face if name.startswith("_")}
    for name, needs in HOUSE.taken.items():
        if HOUSE.wing_of(name) != wing:
            taken = {one: need for need, names in needs.items() if HOUSE.wing_of(need) == wing for one in names}
            assert taken.keys() - face == set(), name
            assert all(defined[one] == need for one, need in taken.items()), f"{name} takes them from another room"


@pytest.mark.parametrize("wing", WINGS)
def test_a_face_shows_nothing_that_nobody_takes(wing):
    taken = {
        one
        for name, needs in HOUSE.taken.items()
        for need, names in needs.items()
        if HOUSE.wing_of(need) == wing != HOUSE.wing_of(name)
        for one in names
    }
    public = {name for name, home in lightning_sgdclean._HOMES.items() if HOUSE.wing_of(home) == wing}
    assert HOUSE.face(wing) - taken - public == set()


def names_in(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Attribute):
            yield node.attr


def test_only_the_outermost_rooms_see_a_trainer():
    seeing = {name for name in MODULES if {"trainer", "_trainer"} & {*names_in(HOUSE.trees[name])}}
    assert {name for name in seeing if not {name, HOUSE.wing_of(name)} & {*SEES_A_TRAINER, *HANDS_IT_ON}} == set()


ADDRESSES = """
import pickle
from lightning_sgdclean.agreement import kendall_tau
from lightning_sgdclean.cleansing_plan import Question
from lightning_sgdclean.cleansing_result import Cleansing
from lightning_sgdclean.comparison import Comparison
from lightning_sgdclean.errors import SGDInfluenceError
from lightning_sgdclean.gains import Estimate, Measured, Verdict, judge
from lightning_sgdclean.relabelling import with_label
from lightning_sgdclean.base import errors
import lightning_sgdclean.errors as address
from lightning_sgdclean import retrace, cleanse, compare, counterfactual
assert address is errors and errors.__name__ == "lightning_sgdclean.base.errors"
assert isinstance(pickle.loads(pickle.dumps(SGDInfluenceError("x"))), errors.SGDInfluenceError)
assert all(map(callable, [retrace, cleanse, compare, counterfactual]))
"""


def test_addresses_in_the_documentation_of_the_api_lead_to_the_rooms_of_today():
    subprocess.run([sys.executable, "-c", ADDRESSES], cwd=HOUSE.folder.parent, check=True)
    api = (HOUSE.folder.parent / "docs" / "api.md").read_text(encoding="utf-8")
    assert [name for name in lightning_sgdclean._MOVED if f"lightning_sgdclean.{name}" not in api] == []
