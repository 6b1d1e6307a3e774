# SPDX-License-Identifier: Apache-2.0
"""A trajectory that is not, to the last bit, what was recorded is refused by name, never retraced."""

import json
import random
import shutil

import pytest

from cases import Case, fit
from lightning_sgdclean import SGDInfluence
from lightning_sgdclean.base import files
from lightning_sgdclean.base.errors import RunDirectoryError
from lightning_sgdclean.base.files import fresh_directory
from lightning_sgdclean.trajectory.store import Trajectory, read_ending

NUM_FLIPS = 1000


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Two runs of the same training, whose segments have the same names and sizes."""
    folders = []
    for name in ("one", "other"):
        folder = tmp_path_factory.mktemp(name) / "run"
        case = Case("small", {"norm": True, "options": {"lr": 0.1 if name == "one" else 0.2}})
        fit(case, SGDInfluence("val_loss", epochs="all", dirpath=folder, snapshots=4))
        folders.append(folder / "trajectory")
    return folders


@pytest.fixture
def copy(recorded, tmp_path):
    return shutil.copytree(recorded[0], tmp_path / "trajectory")


def segments(folder):
    return sorted(folder.glob("segment-*.safetensors"))


def read_all(folder):
    trajectory = Trajectory(folder)
    return trajectory, read_ending(folder, trajectory.run, trajectory.ending)


def test_whole_trajectory_is_read(copy):
    assert read_all(copy)[1].is_complete
    assert len(Trajectory(copy).steps) == 15
    assert len(segments(copy)) == 3


def test_every_flipped_bit_is_noticed(copy):
    chance = random.Random(5)
    files = [copy / "manifest.json", copy / "ending.json", *segments(copy)]
    for _ in range(NUM_FLIPS):
        path = chance.choice(files)
        whole = path.read_bytes()
        place, bit = chance.randrange(len(whole)), 1 << chance.randrange(8)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        with pytest.raises(RunDirectoryError):
            read_all(copy)
        path.write_bytes(whole)
    assert len(Trajectory(copy).steps) == 15


def swap(copy, _):
    first, second = segments(copy)[:2]
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def take_from_other_run(copy, other):
    shutil.copy(segments(other)[1], segments(copy)[1])


def truncate(copy, _):
    segments(copy)[-1].write_bytes(segments(copy)[-1].read_bytes()[:-7])


def remove(copy, _):
    segments(copy)[0].unlink()


def empty(copy, _):
    (copy / "manifest.json").write_text("")


def foreign(copy, _):
    (copy / "manifest.json").write_text('["a list"]')


def edit(copy, _):
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["segments"] = manifest["segments"][1:]
    (copy / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def newer(copy, _):
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))


def missing(copy, _):
    (copy / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (swap, r"segment-00000\d.safetensors is (damaged, or belongs to another place or run|cut short or grown)"),
        (take_from_other_run, r"segment-000001.safetensors is (damaged, or belongs to another|cut short or grown)"),
        (truncate, r"segment-000002.safetensors is cut short or grown: it has \d+ bytes instead of \d+"),
        (remove, r"segment-000000.safetensors is missing"),
        (empty, r"holds no readable trajectory"),
        (foreign, r"is a trajectory of format None"),
        (edit, r"manifest.json is damaged"),
        (newer, r"format 99; this version reads format \d+. It was recorded by a newer version"),
        (missing, r"holds no readable trajectory"),
    ],
)
def test_what_is_not_as_it_was_recorded_is_refused_by_name(copy, recorded, harm, words):
    harm(copy, recorded[1])
    with pytest.raises(RunDirectoryError, match=words):
        Trajectory(copy)


def test_two_runs_never_share_a_directory(tmp_path, monkeypatch):
    folders = {fresh_directory(None, tmp_path, False) for _ in range(3)}
    assert len(folders) == 3
    # The other run comes between the look and the taking.
    monkeypatch.setattr(files, "_holds_run", lambda folder: False)
    with pytest.raises(RunDirectoryError, match="just taken by another run"):
        fresh_directory(folders.pop(), tmp_path, True)
