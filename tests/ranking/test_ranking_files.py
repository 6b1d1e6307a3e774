# SPDX-License-Identifier: Apache-2.0
"""The files of a ranking against damage: each load gives the same ranking, or an error that says what to do."""

import json
import random
import shutil

import pytest

from cases import Case, fit
from lightning_sgdclean import Ranking, SGDInfluence

NUM_DAMAGES = 300


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "run"
    callback = SGDInfluence(epochs="all", formats=["csv", "parquet"], columns=["label", "loss"], dirpath=folder)
    fit(Case("written", trainer={"max_epochs": 1}), callback)
    return callback


@pytest.fixture
def copy(run, tmp_path):
    """Its results, without the trajectory."""
    return shutil.copytree(run.run_dir, tmp_path / "run", ignore=shutil.ignore_patterns("trajectory"))


def damaged(content, chance):
    """A byte flipped or lost, the end cut off, or two lines exchanged."""
    place, kind = chance.randrange(len(content)), chance.choice(["flip", "delete", "cut", "swap"])
    if kind == "swap":
        lines = content.splitlines(keepends=True)
        one, other = chance.randrange(len(lines)), chance.randrange(len(lines))
        lines[one], lines[other] = lines[other], lines[one]
        return b"".join(lines)
    if kind == "cut":
        return content[:place]
    changed = bytes([content[place] ^ 1 << chance.randrange(8)]) if kind == "flip" else b""
    return content[:place] + changed + content[place + 1 :]


def ranking_or_error(path):
    try:
        return Ranking.load(path)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("name", ["influence.csv", "influence.parquet"])
def test_every_damage_is_named_or_changes_nothing(run, copy, name):
    path, chance = copy / name, random.Random(name)
    whole, refused = path.read_bytes(), 0
    for _ in range(NUM_DAMAGES):
        path.write_bytes(damaged(whole, chance))
        found = ranking_or_error(path)
        refused += isinstance(found, str)
        assert found == run.ranking or found.startswith(f"{path} is damaged, or was edited")
    assert refused > 0.9 * NUM_DAMAGES  # lines may have been exchanged with themselves


def test_damage_of_a_table_without_a_summary_is_found_in_its_pages(run, copy, tmp_path):
    """Of the pages alone: Parquet has no checksum of its footer."""
    (copy / "summary.json").unlink()
    path = copy / "influence.parquet"
    whole, chance = path.read_bytes(), random.Random(3)
    footer = int.from_bytes(whole[-8:-4], "little") + 8
    for _ in range(NUM_DAMAGES):
        place = chance.randrange(4, len(whole) - footer)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << chance.randrange(8)]) + whole[place + 1 :])
        found = ranking_or_error(path)
        assert found == run.ranking or found.startswith(f"{path}: ")


def test_the_error_says_the_way_out_and_it_leads_out(run, copy, tmp_path):
    path = copy / "influence.csv"
    path.write_text(path.read_text().replace("harmful,1", "harmful,2", 1))
    for load in (path, copy):
        with pytest.raises(ValueError, match=r"copy it into a folder of its own .*, or remove .influence\.csv."):
            Ranking.load(load)
    shutil.copy(path, tmp_path / "influence.csv")
    elsewhere = Ranking.load(tmp_path / "influence.csv")
    assert elsewhere.visits[0] == 2
    assert elsewhere.summary is None
    summary = json.loads((copy / "summary.json").read_text())
    del summary["checksums"]["influence.csv"]
    (copy / "summary.json").write_text(json.dumps(summary))
    assert Ranking.load(copy) == elsewhere


def test_a_loaded_ranking_knows_what_the_summary_says(run, copy):
    written = json.loads((copy / "summary.json").read_text())
    assert written["checksums"].keys() == {"influence.csv", "influence.parquet"}
    for path in (copy, copy / "influence.csv", copy / "influence.parquet"):
        assert Ranking.load(path).summary == written
    other = run.ranking.save(copy / "other.csv")
    assert Ranking.load(other).summary is None


def test_a_ranking_saved_over_a_runs_own_is_loaded_again_with_its_own_summary(run, copy):
    ranking = Ranking.load(copy).with_columns({"note": ["seen"] * len(run.ranking)})
    ranking.save(copy / "influence.csv")
    assert Ranking.load(copy) == ranking
    assert Ranking.load(copy / "influence.parquet") == run.ranking
    named = Ranking.from_influence(["7", "8"], [-1.0, 1.0], [1, 1])
    named.save(copy / "influence.csv")
    again = Ranking.load(copy)
    assert again == named
    assert [again.summary[key] for key in ("id_type", "num_samples", "num_harmful")] == ["str", 2, 1]
