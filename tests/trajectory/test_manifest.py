# SPDX-License-Identifier: Apache-2.0
"""Trajectories of strangers, sealed as ours are: nothing outside is touched, nothing hangs, each error has its name."""

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from cases import Case, fit
from lightning_sgdclean import Ranking, SGDInfluence
from lightning_sgdclean.base.errors import DamagedFileError, RunDirectoryError
from lightning_sgdclean.base.files import write_sealed
from lightning_sgdclean.base.options import PLAIN_OPTIONS, THE_RUNS
from lightning_sgdclean.trajectory.joining import CheckpointMark, cut_off
from lightning_sgdclean.trajectory.manifest import read_manifest
from lightning_sgdclean.trajectory.store import Trajectory, options_for, read_ending
from lightning_sgdclean.trajectory.writer import TrajectoryWriter
from strangers import content_of, each_with_nonsense, seal_segments


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded") / "run"
    fit(Case("small", {"norm": True}), SGDInfluence("val_loss", epochs="all", dirpath=folder, snapshots=4, verify=0))
    return folder


@pytest.fixture
def folder(recorded, tmp_path):
    return shutil.copytree(recorded, tmp_path / "run") / "trajectory"


def read_all(folder):
    """All that a retrace reads."""
    trajectory = Trajectory(folder)
    for step in trajectory.steps:
        for micro in range(len(step.micro)):
            trajectory.random(step, micro)
            trajectory.batch(step, micro)
    for position in trajectory.kept:
        index = [*(step.index for step in trajectory.steps), trajectory.steps[-1].index + 1][position]
        trajectory.state(index)
    return read_ending(folder, trajectory.run, trajectory.ending)


def reseal(folder, **changes):
    write_sealed(folder / "manifest.json", content_of(folder / "manifest.json") | changes)


def segments_with(folder, **changes):
    segments = content_of(folder / "manifest.json")["segments"]
    return [segments[0] | changes, *segments[1:]]


def refusal_of(read, folder):
    """What is said where it is refused to read; None where it is read."""
    try:
        read(folder)
    except (RunDirectoryError, ValueError) as error:
        return str(error)
    return None


LEADING_OUT = [
    *("../../victim", "/victim", "segment-000000.safetensors/../../victim", "x/segment-000000.safetensors"),
    *("victim", "", "\0", "segment-0.safetensors", "segment-000000.safetensors\n"),
    "segment-\N{ARABIC-INDIC DIGIT ONE}00000.safetensors",
]


@pytest.mark.parametrize("file", LEADING_OUT, ids=ascii)
def test_a_segment_has_a_name_that_leads_out_of_no_folder(folder, file):
    victim = folder.parent.parent / "victim"
    victim.write_text("precious", encoding="utf-8")
    reseal(folder, segments=segments_with(folder, file=file))
    mark = CheckpointMark(content_of(folder / "manifest.json")["run"], 5, str(folder.parent), True, "")
    for read in (read_manifest, read_all, TrajectoryWriter, lambda folder: cut_off(folder, mark)):
        with pytest.raises(DamagedFileError, match=r"manifest\.json: Expected `str` matching .*segments\[0\]\.file"):
            read(folder)
    assert victim.read_text(encoding="utf-8") == "precious"


STATES = {
    "many": [[0, 10**9, 1, 0]],
    "far apart": [[0, 2, 10**12, 0]],
    "of no layout": [[0, 1, 1, 7]],
    "of a step far away": [[10**15, 1, 1, 0]],
    "again and again": [[0, 5, 1, 0]] * 10**5,
    "no distance": [[0, 5, 0, 0]],
}


@pytest.mark.parametrize("states", STATES.values(), ids=STATES)
def test_counts_are_bounded_before_anything_is_made_of_them(folder, states):
    reseal(folder, segments=segments_with(folder, states=states))
    with pytest.raises(DamagedFileError, match=r"manifest\.json: "):
        Trajectory(folder)


def test_json_without_a_bottom_is_refused(folder):
    for path in (folder / "manifest.json", folder.parent / "summary.json"):
        path.write_text('{"format": ' + "[" * 200_000 + "]" * 200_000 + "}", encoding="utf-8")
    with pytest.raises(DamagedFileError, match=r"manifest\.json: expected JSON"):
        Trajectory(folder)
    with pytest.raises(DamagedFileError, match=r"summary\.json: expected JSON"):
        Ranking.load(folder.parent)


@pytest.mark.parametrize("name", ["manifest.json", "ending.json", "options.json", "segment-000001.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "link", "device", "folder"])
def test_only_plain_files_are_read(folder, name, kind):
    path, elsewhere = folder / name, folder.parent / "elsewhere"
    path.rename(elsewhere)
    if kind == "pipe":
        os.mkfifo(path)  # whoever opens it waits for somebody to write
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(elsewhere if kind == "link" else "/dev/zero")
    with pytest.raises(DamagedFileError, match=rf"{name}.* is a link, a pipe, a device or a folder; expected a file"):
        options_for(folder.parent, {}) if name == "options.json" else read_all(folder)


@pytest.mark.parametrize("name", ["manifest.json", "ending.json", "options.json"])
def test_whatever_a_sealed_file_says_is_read_or_refused_by_name(folder, name):
    def read(folder):
        if name == "options.json":
            return options_for(folder.parent, dict.fromkeys(PLAIN_OPTIONS, THE_RUNS))
        return read_all(folder)

    path, tried = folder / name, 0
    for at, content in each_with_nonsense(content_of(path)):
        if name == "manifest.json" and at and at[0] == "layouts" and len(at) > 3 and at != ("layouts", 0, 0, at[-1]):
            continue  # all rows are alike
        tried += 1
        write_sealed(path, content if isinstance(content, dict) else {"content": content})
        said = refusal_of(read, folder)
        assert said is None or str(folder) in said or name == "options.json", (at, said)  # of an option, by its name
    assert tried > 100


def test_whatever_a_sealed_segment_holds_is_read_or_refused_by_name(folder):
    path = sorted(folder.glob("segment-*"))[0]
    whole = {name: tensor.clone() for name, tensor in load_file(path).items()}  # which may lie in the file itself
    nonsense = [torch.zeros(0), torch.zeros(3), torch.full((2, 2), -1), torch.tensor([2**62]), torch.zeros(1).byte()]
    for name in whole:
        for tensor in nonsense:
            save_file(whole | {name: tensor}, path)
            seal_segments(folder)
            said = refusal_of(read_all, folder)
            assert said is None or path.name in said, (name, said)
    for name in whole:
        save_file({key: value for key, value in whole.items() if key != name}, path)
        seal_segments(folder)
        assert path.name in (refusal_of(read_all, folder) or ""), name


def test_what_only_looks_like_a_segment_is_no_part_of_the_run(folder):
    names = ("segment-000000 (copy).safetensors", "segment-x.safetensors", "segment-.safetensors")
    for name in names:
        (folder / name).write_bytes(b"somebody's")
    trajectory = Trajectory(folder)
    cut_off(folder, CheckpointMark(trajectory.run, 7, str(folder.parent), True, trajectory.fits[0][1]))
    assert [step.index for step in Trajectory(folder).steps] == [*range(7)]
    assert all((folder / name).exists() for name in names)
