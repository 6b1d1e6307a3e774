# SPDX-License-Identifier: Apache-2.0
"""The command ``sgdclean``, as a process, in a terminal, and with hostile ids."""

import configparser
import contextlib
import csv
import importlib
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from concurrent.futures import ThreadPoolExecutor
from fcntl import ioctl

import pytest
import yaml

from cases import Plain, loaders, quiet_trainer
from commands import EXAMPLE, sgdclean
from lightning_sgdclean import Ranking, SGDInfluence, __version__, cli, compare
from lightning_sgdclean.base.errors import printable
from lightning_sgdclean.cli.terminal import table, width_of
from processes import ROOT, forked, python, search_path

COMMAND = [sys.executable, "-m", "lightning_sgdclean"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    callback = SGDInfluence("val_loss", dirpath=tmp_path_factory.mktemp("cli") / "run")
    quiet_trainer([callback], max_epochs=1).fit(Plain(), *loaders())
    return callback.run_dir


def saved(tmp_path, ids, influence=None, columns=None, name="influence.csv"):
    influence = influence or [i - 1.5 for i in range(len(ids))]
    return Ranking.from_influence(ids, influence, [1] * len(ids), columns).save(tmp_path / name)


def read_ids(path):
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["sample_id"]
    return [row[0] for row in rows]


# --- in general


def test_the_script_of_the_package_is_this_function():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    name, _, target = config["options.entry_points"]["console_scripts"].strip().partition(" = ")
    module, _, function = target.partition(":")
    assert name == "sgdclean"
    assert getattr(importlib.import_module(module), function) is cli.main


def test_the_package_is_run_as_the_script_is():
    done = python("-m", "lightning_sgdclean", "show", "nowhere", check=False)
    message = "sgdclean show: There is neither a run directory nor a ranking at nowhere.\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", message)


def test_help_and_version_say_what_there_is():
    done = sgdclean("--help")
    assert done.returncode == 0
    assert all(re.search(rf"^    {name} ", done.stdout, re.MULTILINE) for name in cli.COMMANDS)
    for name in cli.COMMANDS:
        done = sgdclean(name, "--help", columns=60)
        assert done.returncode == 0
        assert max(map(len, done.stdout.splitlines())) <= 60
    assert sgdclean("--version").stdout == f"lightning-sgdclean {__version__}\n"


@pytest.mark.parametrize("words", ["", "dance", "show", "show x --top -1", "show x --top a"])
def test_a_wrong_call_is_answered_with_two_and_the_usage(words):
    done = sgdclean(*words.split())
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("usage: sgdclean")


def test_an_error_is_one_line_without_a_traceback(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.csv").write_text("rank,sample_id\n1,2\n")
    for path, message in (
        ("nowhere", "There is neither a run directory nor a ranking at nowhere."),
        ("empty", "empty holds no influence.csv: no run that came to its end."),
        ("bad.csv", "bad.csv, line 1: expected rank,sample_id,influence,effect,visits, found rank,sample_id."),
    ):
        done = sgdclean("show", path, cwd=tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (1, "", f"sgdclean show: {message}\n")
    assert "Traceback" in sgdclean("--debug", "show", "nowhere").stderr


def test_looking_at_a_run_does_not_wait_for_torch(run_dir, tmp_path):
    code = (
        "import sys; from lightning_sgdclean.cli import main; "
        f"code = main(['show', {str(run_dir)!r}]) + main(['clean', {str(run_dir)!r}, '--drop=1', '-o', 'kept.csv']); "
        "sys.exit(code or sorted({'torch', 'pytorch_lightning', 'lightning', 'pandas'} & {*sys.modules}) or 0)"
    )
    done = python("-c", code, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    path = saved(tmp_path, list(range(20_000)))
    command = f"{' '.join(COMMAND)} show {path} --top 20000 | head -n 1; echo ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": search_path()}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.splitlines()[1] == "0"
    assert done.stderr == ""


# --- in a terminal


def in_terminal(columns, *words):
    """What the command writes to a terminal of that many columns, stdout and stderr together."""
    controller, terminal = pty.openpty()
    ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    sizes = {"COLUMNS": None, "LINES": None}
    with ThreadPoolExecutor(1) as reading:
        written = reading.submit(read_all, controller)
        done = forked(lambda: cli.main([*map(str, words)]), environment=sizes, terminal=terminal)
        os.close(terminal)
        return done.returncode, written.result().decode().replace("\r\n", "\n")


def read_all(controller):
    written = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while chunk := os.read(controller, 65536):
            written += chunk
    os.close(controller)
    return written


@pytest.mark.parametrize("columns", [30, 48, 80, 200])
def test_a_terminal_is_filled_and_not_overflown(columns, tmp_path):
    columns_of = {"label": [7, 3, 1], "prediction": [1, 1, 1], "source": ["a/very/long/path/of/画像/" * 3] * 3}
    path = saved(tmp_path, [4, 5, 6], columns=columns_of)
    code, text = in_terminal(columns, "show", path)
    assert code == 0
    assert max(map(width_of, text.splitlines())) <= columns
    assert ("prediction" in text.partition("not shown:")[2]) == (columns < 60)
    assert re.search(r"^ +1 +4 +-1\.5", text, re.MULTILINE)


def test_an_error_in_a_terminal_is_one_line():
    code, text = in_terminal(60, "show", "nowhere")
    assert (code, text.count("\n")) == (1, 1)


def test_hostile_ids_cannot_command_the_terminal(tmp_path):
    hostile = ["\x1b[2J\x1b]0;title\x07", "two\nlines", "\u202eright to left", "=1+1"]
    path = saved(tmp_path, hostile)
    _, text = in_terminal(80, "show", path)
    assert not set(text) & {"\x1b", "\x07", "\u202e"}
    assert r"two\nlines" in text
    assert printable("\x1b[2J") == r"\x1b[2J"
    assert printable("naïve 画像") == "naïve 画像"


def test_an_ascii_terminal_is_no_error(tmp_path):
    path = saved(tmp_path, ["画像"])
    done = sgdclean("show", path, encoding="ascii")
    assert done.returncode == 0
    assert r"\u753b\u50cf" in done.stdout


@pytest.mark.parametrize("command", ["show", "compare"])
def test_json_is_json_on_an_ascii_terminal_too(command, tmp_path):
    path = saved(tmp_path, ["\N{BROOM}", "画像", "a"])
    words = [path, saved(tmp_path, ["\N{BROOM}", "画像", "a"], name="b.csv")] if command == "compare" else [path]
    samples = json.loads(sgdclean(command, *words, "--json", encoding="ascii").stdout)["samples"]
    assert {sample["sample_id"] for sample in samples} == {"\N{BROOM}", "画像", "a"}


@pytest.mark.parametrize("command", ["show", "compare"])
@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_damaged_summary_is_named(command, text, tmp_path):
    path = saved(tmp_path, [1, 2], name="x.parquet")
    other = saved(tmp_path, [1, 2], name="other/x.parquet")
    (tmp_path / "summary.json").write_text(text)
    done = sgdclean(command, path, *([other] if command == "compare" else []))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"sgdclean {command}: {tmp_path / 'summary.json'}: expected ")
    assert done.stderr.endswith("Mend or remove it.\n")


def test_a_table_leaves_out_columns_from_the_right_and_says_so():
    text = table(["rank", "sample_id", "influence", *"abcd"], [[1, "x", 0.123456, "z" * 20, "y" * 20, 2.5, "w" * 40]])
    assert text.splitlines() == [
        "rank  sample_id  influence  a                     b                       c",
        f"   1  x             0.1235  {'z' * 20}  {'y' * 20}  2.5",
        "not shown:  d",
    ]


# --- the page of the documentation


MY_MODULE = """
from two_clusters import Classifier as Model
from two_clusters import TwoClusters as Data


def make_data():
    data = Data()
    data.setup("fit")
    return data.train
"""


def write_config(folder, with_classes):
    """The example's, with or without the classes of model and data."""
    content = yaml.safe_load((EXAMPLE / "config.yaml").read_text(encoding="utf-8"))
    if not with_classes:
        content |= {key: content[key].get("init_args", {}) for key in ("model", "data")}
    (folder / "config.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")


def test_the_commands_of_the_documentation_do_what_it_says(example):
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    commands = [line.partition("#")[0].split() for line in re.findall(r"^    sgdclean (.*)", page, re.MULTILINE)]
    assert {words[0] for words in commands} == {*cli.COMMANDS}
    other = shutil.copytree(example / "cleaning", example / "other")
    (example / "my_module.py").write_text(MY_MODULE)
    for words in [words for words in commands if "cleanse" not in words]:  # tests/cli/test_check.py runs that one
        write_config(example, with_classes="--model" not in words)
        runs = iter([example / "cleaning", other])
        done = sgdclean(*[next(runs) if word == "RUN" else word for word in words], cwd=example)
        notes = [line for line in done.stderr.splitlines() if not line.startswith("note: the page that was here ")]
        assert (done.returncode, notes) == (0, [])
    namespace = {}
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], namespace)
    kept = namespace["kept_samples"](range(400), example / "kept.csv")
    assert list(kept.indices) == list(Ranking.load(other).keep(range(400), drop=20).indices)


# --- show


def test_show_says_what_was_run_and_which_samples_are_worst(run_dir):
    ranking = Ranking.load(run_dir)
    summary = json.loads((run_dir / "summary.json").read_text())
    done = sgdclean("show", run_dir, "--top", 3)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"val_loss = {summary['objective']['recomputed']:.6g}, should be low" in done.stdout
    assert "window     steps 0 to 4: epoch 0\n" in done.stdout
    assert f"23: {(ranking.influence < 0).sum()} harmful" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines()[-3:]]
    assert [row[:2] for row in rows] == [[str(i + 1), str(ranking.sample_id[i])] for i in range(3)]
    assert [float(row[2]) for row in rows] == pytest.approx(ranking.influence[:3], rel=1e-3)


def test_show_as_json_has_every_digit_and_null_for_what_is_unknown(run_dir, tmp_path):
    content = json.loads(sgdclean("show", run_dir, "--json", "--top", 2).stdout)
    ranking = Ranking.load(run_dir)
    assert content["summary"] == json.loads((run_dir / "summary.json").read_text())
    assert [sample["influence"] for sample in content["samples"]] == ranking.influence[:2].tolist()
    path = saved(tmp_path, [1, 2], columns={"loss": [0.5, None]}, name="x.parquet")
    samples = json.loads(sgdclean("show", path, "--json").stdout)["samples"]
    assert [sample["loss"] for sample in samples] == [0.5, None]
    assert [sample["effect"] for sample in samples] == ["harmful", "harmful"]


def test_show_of_nothing_and_of_an_empty_ranking(run_dir, tmp_path):
    assert "rank" not in sgdclean("show", run_dir, "--top", 0).stdout
    assert "samples  0: 0 harmful, 0 helpful" in sgdclean("show", saved(tmp_path, [], [])).stdout


# --- report


def test_the_page_is_written_into_the_run_directory(run_dir):
    (run_dir / "report.html").unlink(missing_ok=True)
    done = sgdclean("report", run_dir)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{run_dir / 'report.html'}\n", "")
    assert "<script" in (run_dir / "report.html").read_text(encoding="utf-8")
    done = sgdclean("report", run_dir / "influence.csv")
    assert (done.returncode, "There is no run directory at" in done.stderr) == (1, True)
    done = sgdclean("report", run_dir, "--dataset", "nowhere.data")
    assert done.stderr == "sgdclean report: No module named 'nowhere'\n"


def test_a_page_that_says_less_than_the_one_before_is_noted(tmp_path):
    callback = SGDInfluence("val_loss", dirpath=tmp_path / "run", columns=("label",))
    quiet_trainer([callback], max_epochs=1).fit(Plain(), *loaders())
    done = sgdclean("report", tmp_path / "run")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'run' / 'report.html'}\n")
    assert re.fullmatch(
        r"note: the page that was here also showed values, labels, predictions and losses of samples\. --config or "
        r"--dataset brings samples back; predictions and losses are those of columns= of the run\.\n",
        done.stderr,
    )
    assert sgdclean("report", tmp_path / "run").stderr == ""


def test_ids_that_are_names_are_refused_with_what_can_be_done(tmp_path, monkeypatch, capsys):
    (tmp_path / "named.py").write_text("data = [(0.5, 1), (0.1, 0)]\n")
    monkeypatch.syspath_prepend(tmp_path)
    saved(tmp_path, ["a", "b"])
    (tmp_path / "summary.json").write_text('{"id_type": "str", "dataset_size": null}')
    assert cli.main(["report", str(tmp_path), "--dataset", "named.data"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(r"ids are names.*write_report\(.*positions=\{id: position, \.\.\.\}\).*without --dataset", error)


# --- compare


def test_compare_says_what_the_runs_have_in_common(tmp_path):
    ids = list(range(40))
    paths = [saved(tmp_path, ids, [(i * k) % 41 - 20.5 for i in ids], name=f"{k}/influence.csv") for k in (1, 2, 3)]
    done = sgdclean("compare", *paths, "--worst", 4, "--top", 2, "-o", "found.csv", cwd=tmp_path)
    found = compare(paths, worst=4)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("3 runs, 40 samples in all of them\n")
    rows = [line.split() for line in done.stdout.splitlines()[-2:]]
    assert [row[0] for row in rows] == [str(i) for i in found.sample_id[:2]]
    assert (tmp_path / "found.csv").read_bytes() == found.save(tmp_path / "again.csv").read_bytes()
    content = json.loads(sgdclean("compare", *paths, "--json", "--worst", 4).stdout)
    assert content["agreement"]["kendall_tau"] == found.agreement["kendall_tau"].tolist()
    assert [sample["sample_id"] for sample in content["samples"]] == found.sample_id[:10].tolist()


def test_what_cannot_be_compared_is_refused(tmp_path):
    one, other = saved(tmp_path, [1, 2]), saved(tmp_path, ["a", "b"], name="other.csv")
    done = sgdclean("compare", one, other)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert sgdclean("compare", one).returncode == 2
    assert sgdclean("compare", one, one, "-o", "x.txt").returncode == 2


# --- clean


def test_clean_writes_what_keep_keeps(run_dir, tmp_path):
    ranking = Ranking.load(run_dir)
    done = sgdclean("clean", run_dir, "--drop", 5, "-o", "new/kept.csv", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "new/kept.csv: 18 samples kept, the 5 most harmful dropped\n"
    assert read_ids(tmp_path / "new" / "kept.csv") == [str(i) for i in ranking.keep(range(23), drop=5).indices]


def test_clean_as_parquet(run_dir, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    assert sgdclean("clean", run_dir, "--drop", 5, "-o", tmp_path / "kept.parquet").returncode == 0
    kept = parquet.read_table(tmp_path / "kept.parquet").column("sample_id")
    assert kept.to_pylist() == list(Ranking.load(run_dir).keep(range(23), drop=5).indices)


def test_what_was_not_drawn_is_kept_where_the_size_is_known(tmp_path):
    path = saved(tmp_path, [4, 0, 2])
    done = sgdclean("clean", path, "--drop", 1, "-o", tmp_path / "kept.csv", "--of", 6)
    assert (done.returncode, done.stderr) == (0, "")
    assert read_ids(tmp_path / "kept.csv") == ["0", "1", "2", "3", "5"]
    done = sgdclean("clean", path, "--drop", 1, "-o", tmp_path / "kept.csv")
    assert "not drawn in the run's window are not in the file (see --of)" in done.stderr
    assert read_ids(tmp_path / "kept.csv") == ["0", "2"]
    done = sgdclean("clean", path, "--drop", 1, "-o", tmp_path / "other.csv", "--of", 4)
    assert (done.returncode, "Sample id 4 is no position in a data set of 4 samples." in done.stderr) == (1, True)
    assert not (tmp_path / "other.csv").exists()


def test_text_ids_are_guarded_against_spreadsheets(tmp_path):
    path = saved(tmp_path, ["=1+1", "a", "b"])
    sgdclean("clean", path, "--drop", 0, "-o", tmp_path / "kept.csv")
    assert read_ids(tmp_path / "kept.csv") == ["'=1+1", "a", "b"]


def test_clean_says_when_more_is_dropped_than_harms(tmp_path):
    path = saved(tmp_path, [4, 0, 2])  # two of them harmful
    done = sgdclean("clean", path, "--drop", 3, "-o", tmp_path / "kept.csv", "--of", 5)
    assert done.returncode == 0
    assert done.stderr == "note: only 2 of the 3 dropped samples are ranked as harmful\n"


def test_clean_refuses(tmp_path):
    path = saved(tmp_path, [4, 0, 2])
    before = path.read_bytes()
    done = sgdclean("clean", path, "--drop", 4, "-o", tmp_path / "kept.csv")
    assert (done.returncode, done.stderr) == (
        1,
        "sgdclean clean: Cannot drop 4 samples: the ranking holds 3.\n",
    )
    assert sgdclean("clean", path, "--drop", 1, "-o", path).returncode == 1
    assert path.read_bytes() == before
    assert sgdclean("clean", path, "--drop", 1, "-o", tmp_path / "kept.txt").returncode == 2
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["influence.csv"]
