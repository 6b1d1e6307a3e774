# SPDX-License-Identifier: Apache-2.0
"""A ``summary.json`` that says anything: what reads it goes on, or says which file is wrong."""

import json
import os
import shutil

import pytest

from cases import Case, fit
from lightning_sgdclean import Ranking, SGDInfluence, compare
from lightning_sgdclean.base.errors import DamagedFileError
from lightning_sgdclean.cli import main
from lightning_sgdclean.report.page import write_report
from strangers import each_with_nonsense


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    fit(Case("small", {}), SGDInfluence("val_loss", epochs="all", dirpath=folder, verify=2))
    shutil.rmtree(folder / "trajectory")
    return folder


READERS = {
    "load": Ranking.load,
    "page": write_report,
    "compare": lambda folder: compare([folder, Ranking.load(folder)]),
    "show": lambda folder: main(["show", str(folder)]),
}


def test_whatever_a_summary_says_is_read_or_refused_by_name(finished, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "run")
    whole, tried = json.loads((folder / "summary.json").read_text(encoding="utf-8")), 0
    for at, content in each_with_nonsense(whole, num_kinds=3):
        if len(at) > 2:  # nobody reads further down than the rows of a part
            continue
        tried += 1
        (folder / "summary.json").write_text(json.dumps(content), encoding="utf-8")
        for name, read in READERS.items():
            try:
                read(folder)
            except DamagedFileError as error:
                said = str(error)
            else:
                said = capsys.readouterr().err if name == "show" else ""
            assert not said or "summary.json" in said or "sample ids" in said or "id_type" in said, (at, name, said)
    assert tried > 150


@pytest.mark.parametrize("name", ["influence.csv", "influence.parquet"])
def test_a_table_is_a_file(name, tmp_path):
    os.mkfifo(tmp_path / name)
    with pytest.raises(DamagedFileError, match=f"{name} is a pipe, a device or a folder; expected a file"):
        Ranking.load(tmp_path / name)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(DamagedFileError, match=f"{name} is a pipe, a device or a folder; expected a file"):
        Ranking.load(tmp_path / name)
