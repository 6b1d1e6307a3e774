# SPDX-License-Identifier: Apache-2.0
"""``sgdclean check``, and a LightningCLI with everything in its configuration."""

import json
import re
import textwrap
from pathlib import Path

import pytest
import yaml

from commands import main_py, sgdclean
from lightning_sgdclean import Ranking, cli
from processes import ROOT

MODULES = """
import torch
import PACKAGE as pl
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Data(pl.LightningDataModule):
    def __init__(self, num: int = 12):
        super().__init__()
        source = torch.Generator().manual_seed(0)
        self.data = TensorDataset(torch.randn(num, 3, generator=source), torch.arange(num) % 2)

    def train_dataloader(self):
        return DataLoader(self.data, batch_size=4)

    val_dataloader = train_dataloader


class Good(pl.LightningModule):
    def __init__(self, width: int = 2):
        super().__init__()
        self.net = torch.nn.Linear(3, width)

    def training_step(self, batch, batch_idx):
        print("training")
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Adversarial(Good):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD([param], lr=0.1) for param in self.parameters()]


class Mixing(Good):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0] - batch[0].mean(0)), batch[1])


class Broken(Good):
    def training_step(self, batch, batch_idx):
        raise KeyError("no such thing")


class Collating(Data):
    def train_dataloader(self):
        from torch.utils.data import default_collate
        return DataLoader(self.data, batch_size=4, collate_fn=lambda items: default_collate(items[::-1]))


def make_data():
    return Data().data


def losses(module, batch):
    return F.cross_entropy(module.net(batch[0]), batch[1], reduction="none")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a module file for each package, of a name that no other test has imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("pytorch_lightning", "lightning.pytorch"):
        file = tmp_path / f"{name.partition('.')[0]}_{abs(hash(tmp_path))}.py"
        file.write_text(MODULES.replace("PACKAGE", name), encoding="utf-8")
    return tmp_path


def config(folder, model="Good", data="Data", package="lightning", callback=None, options=None, **trainer):
    module = f"{package}_{abs(hash(folder))}"
    callbacks = [] if callback is None else [{"class_path": "lightning_sgdclean.SGDInfluence", "init_args": callback}]
    content = {
        "seed_everything": 1,
        "model": {"class_path": f"{module}.{model}"},
        "data": {"class_path": f"{module}.{data}"},
        "trainer": {"max_epochs": 4, "accelerator": "cpu", "logger": False, "callbacks": callbacks, **trainer},
        **(options or {}),
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(path)


def check(capsys, *words):
    """Exit code, and the two streams, what was wrapped put together again."""
    code = cli.main(["check", *words])
    out, err = capsys.readouterr()
    return code, re.sub(r"\n {9,}", " ", out), err


def untouched(folder):
    return {path.name for path in folder.iterdir()} - {"__pycache__"}


# --- what it says


@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning"])
def test_it_says_what_would_be_split_and_which_ids_bytes_and_minutes(package, folder, capsys):
    path = config(folder, package=package, callback={"epochs": "all"})
    before = untouched(folder)
    code, out, err = check(capsys, path)
    assert code == 0
    assert "training\n" in err  # what the module prints is not part of the result
    assert "split        cross_entropy (mean): one part a sample\n" in out
    assert "first batch  0, 1, 2, 3 (4 samples, of 12 in the data set)\n" in out
    assert re.search(r"plan +Trajectory: about .* \(13 snapshots of 32 B .*at most 12 steps\.\n", out)
    assert re.search(
        r"time +training about .*, retrace of 12 steps about .* \(a training step takes [\d.]+ m?s\)\n", out
    )
    assert out.endswith("result       can be followed\n")
    assert untouched(folder) == before


def test_as_json(folder, capsys):
    code, out, _ = check(capsys, config(folder, callback={}, accumulate_grad_batches=3), "--json")
    found = json.loads(out)
    assert (code, found["refused"], found["refusal"], found["notes"]) == (0, False, None, [])
    assert found["split"] == [["cross_entropy", "mean", True]]
    assert (found["first_ids"], found["dataset_size"]) == ([0, 1, 2, 3], 12)
    assert (found["num_steps"], found["window_steps"]) == (4, 2)
    assert found["trajectory_bytes"] > 32
    assert found["seconds_a_retraced_step"] > 2 * found["seconds_a_step"] > 0


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"model": "Adversarial"}, "UnsupportedTrainingError", "gave 2 optimizers"),
        ({"model": "Mixing"}, "LossSplitError", "depends on several samples"),
        ({"data": "Collating"}, "LossSplitError", "collating swapped samples"),
        ({"callback": {"monitor": "val_los"}}, "ObjectiveError", "names seen: val_loss"),
        ({"callback": {"max_bytes": 10}}, "BudgetError", "more bytes"),
    ],
)
def test_a_refusal_is_the_result_and_the_exit_code_is_one(options, kind, message, folder, capsys):
    path = config(folder, **{"callback": {}, **options})
    code, out, _ = check(capsys, path)
    assert code == 1
    assert re.search(rf"^refused +{kind}: .*{message}", out, re.MULTILINE)
    code, out, _ = check(capsys, path, "--json")
    assert json.loads(out)["error"] == kind


def test_without_a_callback_its_defaults_are_tried(folder, capsys):
    assert check(capsys, config(folder))[0] == 0


def test_two_callbacks_are_refused_as_a_fit_refuses_them(folder, capsys):
    ours = "lightning_sgdclean.SGDInfluence"
    both = [{"class_path": ours, "init_args": {"dirpath": name}} for name in ("a", "b")]
    before = {*untouched(folder), "config.yaml"}
    code, out, _ = check(capsys, config(folder, callbacks=both))
    assert code == 1
    assert re.search(r"^refused +UnsupportedTrainingError: .*2 SGDInfluence callbacks", out, re.MULTILINE)
    assert untouched(folder) == before


def test_callbacks_loggers_and_checkpoints_of_the_configuration_write_nowhere(folder, capsys):
    path = config(
        folder,
        logger={"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "logs"}},
        callbacks=[
            {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"},
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"dirpath": "kept", "every_n_train_steps": 1, "save_top_k": -1},
            },
            {"class_path": "lightning_sgdclean.SGDInfluence", "init_args": {"dirpath": "runs", "at": "best"}},
        ],
    )
    before = untouched(folder)
    code, out, _ = check(capsys, path)
    assert (code, "can be followed" in out) == (0, True)
    assert untouched(folder) == before


# --- what it cannot do


def test_errors_of_the_users_code_are_one_line(folder, capsys):
    code, out, err = check(capsys, config(folder, "Broken"))
    assert (code, out) == (1, "")
    assert err.splitlines()[-1] == "sgdclean check: KeyError: 'no such thing'"
    assert "Traceback" not in err


def test_what_is_wrong_with_a_configuration_is_one_line(folder, capsys):
    path = config(folder)
    for text, message in (
        ("model: [", r"config\.yaml is no YAML: "),
        ("- 1", r"config\.yaml is no configuration of a LightningCLI: list\."),
        ("trainer: {}", r"names no class of the model: no class_path\. Give --model"),
        ("model: {class_path: nowhere.Model}", "No module named 'nowhere'"),
        ("model: {class_path: json.Model}", r"There is no 'json\.Model' to import\."),
        ("model: {class_path: json.JSONDecoder}", r"TypeError: json\.decoder\.JSONDecoder is no LightningModule\."),
        (Path(path).read_text().replace("max_epochs: 4", "max_epoch: 4"), r"config\.yaml: .*max_epoch"),
        (Path(path).read_text().replace("max_epochs: 4", "fast_dev_run: true"), "With fast_dev_run the callback"),
    ):
        Path(path).write_text(text)
        code, out, err = check(capsys, path)
        assert (code, out) == (1, "")
        assert len(err.splitlines()) == 1
        assert re.search(rf"^sgdclean check: .*{message}", err)
    code, _, err = check(capsys, "none.yaml")
    assert (code, err) == (1, "sgdclean check: There is no configuration at none.yaml.\n")


def test_a_file_of_arguments_alone_needs_the_classes(folder, capsys):
    path = config(folder, options={"model": {"width": 3}, "data": {"num": 8}, "ckpt_path": None})
    module = f"lightning_{abs(hash(folder))}"
    code, out, _ = check(capsys, path, "--model", f"{module}.Good", "--data", f"{module}.Data")
    assert code == 0
    assert "of 8 in the data set" in out


# --- the page with the samples of a configuration


def test_a_page_shows_the_samples_of_a_configuration_or_of_a_dataset(folder, capsys):
    path, module = config(folder), f"lightning_{abs(hash(folder))}"
    Ranking.from_influence(range(12), [i - 5.5 for i in range(12)], [1] * 12).save(folder / "run" / "influence.csv")
    sizes = []
    for words in ([], ["--config", path], ["--dataset", f"{module}.make_data"]):
        assert cli.main(["report", "run", *words]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == "run/report.html"
        sizes.append(len((folder / "run" / "report.html").read_bytes()))
    assert sizes[0] + 500 < sizes[1] == sizes[2]


# --- the example of a LightningCLI


def main(example, *words):
    return succeeded(main_py(example, *words))


def succeeded(done):
    assert done.returncode == 0, done.stderr
    return done


def test_the_example_is_tried_trained_and_shown(example):
    tried = succeeded(sgdclean("check", "config.yaml", cwd=example))
    assert tried.stdout.endswith("can be followed\n")
    ranking = Ranking.load(example / "cleaning")
    assert sum(sample < 20 for sample in ranking.harmful(20)) > 10
    assert list(ranking.columns) == ["label", "prediction", "loss"]
    assert Ranking.load(example / "cleaning" / "influence.parquet") == ranking
    summary = json.loads((example / "cleaning" / "summary.json").read_text())
    assert summary["objective"]["name"] == "error_rate"
    assert "prediction" in succeeded(sgdclean("show", "cleaning", cwd=example)).stdout


def test_the_command_line_sets_what_the_file_does_not(example):
    main(
        example,
        "fit",
        "--config=config.yaml",
        "--trainer.max_epochs=1",
        "--trainer.callbacks.dirpath=other",
        "--trainer.callbacks.curvature=finite",
        "--trainer.callbacks.finite_radius=0.02",
        "--trainer.callbacks.objective=two_clusters.error_rate",
        "--trainer.callbacks.columns=[source]",
        "--trainer.callbacks.snapshots=3",
    )
    summary = json.loads((example / "other" / "summary.json").read_text())
    assert (summary["engine"], summary["options"]["finite_radius"]) == ("finite", 0.02)
    assert summary["objective"]["name"] == "error_rate"
    assert list(Ranking.load(example / "other").columns) == ["source"]


def words_of_the_documentation(start):
    """The words of the command of docs/cli.md that begins so."""
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8").replace("\\\n", "")
    return re.search(rf"^    {re.escape(start)} (.*)$", page, re.MULTILINE)[1].split()


def test_the_yaml_of_the_documentation_sets_what_it_shows(example):
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    shown = yaml.safe_load(re.search(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[1])
    content = yaml.safe_load((example / "config.yaml").read_text(encoding="utf-8"))
    content["trainer"] |= shown["trainer"]
    (example / "shown.yaml").write_text(yaml.safe_dump(content))
    printed = main(example, "fit", "--config=shown.yaml", "--print_config").stdout
    (callback,) = yaml.safe_load(printed)["trainer"]["callbacks"]
    assert callback["init_args"].items() >= shown["trainer"]["callbacks"][0]["init_args"].items()


def test_the_command_of_the_documentation_sets_what_it_shows(example):
    words = words_of_the_documentation("python main.py")
    main(example, *words, "--trainer.max_epochs=1", "--trainer.callbacks.dirpath=told")
    summary = json.loads((example / "told" / "summary.json").read_text())
    assert (summary["engine"], summary["objective"]["name"]) == ("finite", "error_rate")


def test_what_a_cli_saves_of_the_options_can_be_read_again(example):
    """Callables are saved by their import path, alone and in a dict."""
    printed = main(example, "fit", "--config=config.yaml", "--print_config")
    assert "Unable to serialize" not in printed.stdout + printed.stderr
    saved = yaml.safe_load(printed.stdout)["trainer"]["callbacks"][0]["init_args"]
    assert saved["objective"] == {"error_rate": "two_clusters.error_rate"}
    (example / "saved.yaml").write_text(printed.stdout)
    again = main(example, "fit", "--config=saved.yaml", "--print_config")
    assert again.stdout == printed.stdout


def test_the_help_of_a_cli_tells_every_option(example):
    told = main(example, "fit", "--trainer.callbacks.help=lightning_sgdclean.SGDInfluence").stdout
    text = " ".join(textwrap.dedent(told).split())
    for option in ("monitor", "objective", "columns", "formats", "sample_losses", "val_dataloaders"):
        assert f"--trainer.callbacks.{option} " in text
    assert "which leads to the innermost dataset" in text


def test_whether_the_example_gains_is_judged_by_test_data_and_a_second_call_trains_nothing(example):
    words = ["cleanse", *words_of_the_documentation("sgdclean cleanse")]
    first = succeeded(sgdclean(*words, cwd=example))
    assert first.stdout.startswith("test_loss (low is better), mean of 2 seeds")
    assert "Verdict: " in first.stdout
    assert first.stderr.count("training ") == 6
    assert not list(example.rglob("*.ckpt"))
    again = succeeded(sgdclean(*words, "--json", cwd=example))
    report = json.loads(again.stdout)
    assert "training " not in again.stderr
    assert report["counts"] == [20]
    assert report["metric"]["worst"][0] != report["metric"]["none"]
    assert not (example / "cleaning-2").exists()


def test_the_example_is_relabelled_in_processes(example):
    words = ["cleanse", "config.yaml", "--metric=test_loss", "--seeds=2", "--drop", "3", "--random-draws=1"]
    words += ["--select=val_loss", "--select-mode=min", "--action=relabel", "--processes=2", "--json"]
    words += ["-o", "relabelling"]
    done = succeeded(sgdclean(*words, cwd=example))
    report = json.loads(done.stdout)
    assert report["question"]["action"] == "relabel"
    changed = {
        path.stem: json.loads(path.read_text())["changed"]
        for path in (example / "relabelling" / "trials").glob("*.json")
    }
    assert len(changed) == 6
    for seed in range(2):
        ranking = Ranking.load(example / "relabelling" / "rankings" / f"seed{seed}")
        mistaken = ranking.sample_id[ranking.columns["prediction"] != ranking.columns["label"]].tolist()
        assert changed[f"seed{seed}-worst-3"] == mistaken[:3]
        assert {*changed[f"seed{seed}-random-3-0"]} <= {*mistaken}


def test_a_cleansing_of_another_configuration_is_not_mixed_in(folder, capsys):
    path = config(folder)
    (folder / "cleansing").mkdir()
    (folder / "cleansing" / "mine.txt").touch()
    assert cli.main(["cleanse", path, "--metric", "val_loss", "--on", "val", "--seeds", "2"]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "is not empty and holds no cleansing" in err
