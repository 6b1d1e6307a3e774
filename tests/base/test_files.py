# SPDX-License-Identifier: Apache-2.0
"""Files that appear whole, where they belong; JSON that any reader takes."""

import json
import math
import os

import numpy as np
import pytest
import pytorch_lightning as pl

from cases import Plain, loaders, quiet_trainer
from lightning_sgdclean import SGDInfluence
from lightning_sgdclean.base.errors import RunDirectoryError
from lightning_sgdclean.base.files import appearing_whole, fresh_directory, write_json


def test_what_is_not_finite_is_null(tmp_path):
    content = {"a": math.nan, "b": [1.5, -math.inf, (np.float64("nan"), "NaN")], "c": {"d": math.inf, "e": None}}
    write_json(tmp_path / "some.json", content)

    def refused(constant):
        pytest.fail(f"{constant} is no JSON")

    found = json.loads((tmp_path / "some.json").read_text(encoding="utf-8"), parse_constant=refused)
    assert found == {"a": None, "b": [1.5, None, [None, "NaN"]], "c": {"d": None, "e": None}}


def test_a_link_that_somebody_planted_leads_no_writing_elsewhere(tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "report.html"
    victim.write_text("precious", encoding="utf-8")
    path.symlink_to(victim)
    (tmp_path / f".report.html.{os.getpid()}.tmp").symlink_to(victim)
    with appearing_whole(path) as temporary:
        assert temporary.parent == tmp_path
        assert not temporary.is_symlink()
        temporary.write_text("ours", encoding="utf-8")
    assert victim.read_text(encoding="utf-8") == "precious"
    assert not path.is_symlink()
    assert path.read_text(encoding="utf-8") == "ours"


def test_where_a_name_is_taken_nothing_is_written(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("precious", encoding="utf-8")
    monkeypatch.setattr("secrets.token_hex", lambda size: "guessed")
    (tmp_path / ".x.guessed.tmp").symlink_to(victim)
    with pytest.raises(FileExistsError), appearing_whole(tmp_path / "x"):
        pytest.fail("entered")
    assert victim.read_text(encoding="utf-8") == "precious"


def test_files_have_the_mode_that_others_of_this_process_have(tmp_path):
    (tmp_path / "plain").write_text("", encoding="utf-8")
    write_json(tmp_path / "ours.json", {})
    assert (tmp_path / "ours.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_directory_that_cannot_be_had_is_refused_by_name(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "at" / "all")
    for name in ("file", "link"):
        with pytest.raises(RunDirectoryError, match=rf"{name} (cannot be written to|is no folder).* dirpath="):
            fresh_directory(tmp_path / name, tmp_path, False)


@pytest.mark.parametrize("address", ["s3://bucket/logs", "memory://logs", "gs://bucket"])
def test_an_address_is_refused_before_training(address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = quiet_trainer([SGDInfluence("val_loss", dirpath=address)])
    with pytest.raises(RunDirectoryError, match=r"is an address.*dirpath= a local folder"):
        trainer.fit(Plain(), *loaders())
    assert trainer.global_step == 0
    assert list(tmp_path.iterdir()) == []


def test_a_trainer_whose_root_is_an_address_needs_a_local_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(default_root_dir="memory://logs", callbacks=[SGDInfluence()], accelerator="cpu", **options)
    with pytest.raises(RunDirectoryError, match="'memory://logs' is an address"):
        trainer.fit(Plain(), *loaders())
    callback = SGDInfluence(dirpath=tmp_path / "run")
    trainer = pl.Trainer(default_root_dir="memory://logs", callbacks=[callback], accelerator="cpu", **options)
    trainer.fit(Plain(), *loaders())
    assert callback.ranking is not None
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
