# SPDX-License-Identifier: Apache-2.0
"""What the documentation shows runs, and what it names exists."""

import ast
import inspect
import json
import re
import textwrap
from pathlib import Path

import pytest
import pytorch_lightning as pl
from safetensors import safe_open

import lightning_sgdclean
from cases import Plain, loaders, quiet_trainer
from lightning_sgdclean import Cleansed, Ranking, SGDInfluence
from lightning_sgdclean.base import errors
from lightning_sgdclean.ranking.table import COLUMNS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
START = ROOT / "docs" / "start.md"
NEEDS = {"lora": ("peft", "transformers")}  # of the extra `zoo`
CODE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text_of(*names):
    return "\n".join((ROOT / name).read_text(encoding="utf-8") for name in names)


def lines_of_code(page):
    """The page's Python blocks, each on the line where it stands, so that tracebacks lead to it."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, found.start(1)), found[1]) for found in CODE.finditer(text)]


def keys_of(tree, prefix=""):
    for key, value in tree.items():
        yield from keys_of(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    callback = SGDInfluence("val_loss", dirpath=tmp_path_factory.mktemp("docs") / "run")
    quiet_trainer([callback], max_epochs=1).fit(Plain(norm=True), *loaders())
    return callback.run_dir


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """The names that the first block of the five-minute start leaves to the pages that go on from it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("start"))
        return run_blocks(START, lines_of_code(START)[:1], {})


def run_blocks(page, blocks, names):
    namespace = {"__name__": "__main__", **names}
    for line, code in blocks:
        exec(compile("\n" * line + code, str(page), "exec"), namespace)
    return namespace


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # by transformers, of itself
@pytest.mark.parametrize("page", [page for page in PAGES if lines_of_code(page)], ids=lambda page: page.stem)
def test_python_blocks_run_in_order(page, request):
    for module in NEEDS.get(page.stem, ()):
        pytest.importorskip(module)
    goes_on = "five-minute start](" in page.read_text(encoding="utf-8").partition("```python")[0]
    run_blocks(page, lines_of_code(page), request.getfixturevalue("started") if goes_on else {})


def test_what_is_indented_on_a_page_is_a_command():
    """So that no Python stands where nobody runs it. Commands are run in tests/cli, or are scripts of ours."""
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for block in re.findall(r"(?<=\n\n)((?:    .*\n)+)", text):
            assert re.match(r"    (sgdclean|python|pip|make) ", block), f"{page}: {block}"


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return loaders()[0]

    def val_dataloader(self):
        return loaders()[1]


@pytest.mark.parametrize("kind", [SGDInfluence, Cleansed], ids=lambda kind: kind.__name__)
def test_the_example_of_a_class_runs(kind, run_dir, tmp_path):
    """As the pages of the API show it, which are made of the docstrings."""
    example = re.search(r"Example::\n\n(.*?)\n\n", inspect.getdoc(kind), re.DOTALL)[1]
    names = {
        "SGDInfluence": SGDInfluence,
        "Cleansed": Cleansed,
        "Ranking": Ranking,
        "Trainer": lambda callbacks: quiet_trainer(callbacks, max_epochs=1, default_root_dir=tmp_path),
        "model": Plain(),
        "datamodule": Data(),
        "run_dir": run_dir,
    }
    exec(textwrap.dedent(example), names)
    assert names["trainer"].callbacks


def test_the_quickstart_finds_what_it_promises(started):
    wrong = sum(sample < 20 for sample in started["influence"].ranking.harmful(20))
    assert wrong > 10


def test_figures_of_the_readme_are_those_of_the_pages_of_measurements():
    told = set(re.findall(r"\d\.\d\d", text_of("README.md").partition("\n## Measured")[2].partition("\n## ")[0]))
    assert told
    assert (
        told
        - set(
            re.findall(r"(?<!\d)\d\.\d\d(?!\d)", text_of("docs/cost.md", "docs/counterfactual.md", "docs/agreement.md"))
        )
        == set()
    )


@pytest.mark.parametrize("name", ["README.md", "docs/outputs.md"])
def test_the_header_of_the_csv_is_shown(name):
    assert f"`{','.join(COLUMNS)}`" in text_of(name)


def test_every_key_of_the_summary_is_documented(run_dir):
    outputs = text_of("docs/outputs.md")
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    assert [key for key in keys_of(summary) if f"`{key}`" not in outputs] == []


def test_every_key_of_the_trajectory_is_documented(run_dir):
    outputs = text_of("docs/outputs.md")
    manifest = json.loads((run_dir / "trajectory" / "manifest.json").read_text(encoding="utf-8"))
    segment = manifest["segments"][0]
    with safe_open(run_dir / "trajectory" / segment["file"], "pt") as file:
        words = json.loads(bytes(file.get_tensor("words").numpy()))
        kinds = {name.partition("/")[0] for name in file.keys()}  # noqa: SIM118 - no mapping
    keys = [*manifest, *segment, *words]
    assert [key for key in keys if f"`{key}`" not in outputs] == []
    assert [kind for kind in kinds if not re.search(f"^\\| `{kind}[/`]", outputs, re.MULTILINE)] == []


def test_every_file_of_a_run_is_in_the_table_of_what_goes_where(run_dir):
    table = text_of("docs/report.md").partition("## What goes where")[2].partition("\n## ")[0]
    first_cells = " ".join(re.findall(r"^\|([^|]*)\|", table, re.MULTILINE))
    assert [path.name for path in run_dir.iterdir() if not re.search(f"`{path.name}/?`", first_cells)] == []


def test_every_public_name_is_in_the_api():
    named = set(re.findall(r":: (?:\w+\.)*(\w+)$", text_of("docs/api.md"), re.MULTILINE))
    assert set(lightning_sgdclean.__all__) - {"__version__"} - named == set(), "give them a directive in docs/api.md"


def test_every_page_is_in_the_contents_of_the_site():
    lists = re.findall(r"^```{toctree}\n(.*?)^```", text_of("docs/index.md"), re.MULTILINE | re.DOTALL)
    pages = {page.relative_to(ROOT / "docs").with_suffix("").as_posix() for page in PAGES[1:]} - {"index"}
    assert pages - set("\n".join(lists).split()) == set(), "name them in a toctree of docs/index.md"


def test_every_option_stands_in_the_table_with_its_default():
    table = text_of("docs/options.md")
    options = [p for p in inspect.signature(SGDInfluence.__init__).parameters.values() if p.name != "self"]
    rows = [f"| `{p.name}` | `{json.dumps(p.default) if isinstance(p.default, str) else p.default}` |" for p in options]
    assert [row for row in rows if row not in table] == []
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == [p.name for p in options]


def test_every_error_that_fit_raises_is_in_the_limits():
    limits = text_of("docs/limits.md")
    names = [name for name, kind in vars(errors).items() if isinstance(kind, type) and name.endswith("Error")]
    assert [name for name in names if f"`{name}`" not in limits] == []


def test_every_test_that_the_limits_name_exists():
    named = re.findall(r"`tests/([\w/]+\.py)::(\w+)`", text_of("docs/limits.md"))
    assert named
    for file in {file for file, _ in named}:
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        tests = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert {name for where, name in named if where == file} - tests == set(), file


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_to_files_of_the_repository_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def defined_in(file):
    """The functions, classes and variables at the top level of a file."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))


def test_every_place_and_target_that_contributing_names_exists():
    text = text_of("CONTRIBUTING.md")
    places = set(re.findall(r"\b((?:lightning_sgdclean|tests|benchmarks)/[\w/]+\.py)(?:::(\w+))?", text))
    assert len(places) > 10
    for file, name in places:
        assert (ROOT / file).is_file(), file
        assert not name or name in defined_in(ROOT / file), f"{file}::{name}"
    targets = set(re.findall(r"(?:^|`)\s*make (\w+)", text, re.MULTILINE))
    assert [target for target in targets if not re.search(rf"^{target}:", text_of("Makefile"), re.MULTILINE)] == []


def test_the_design_has_a_row_for_every_wing():
    wings = {path.parent.name for path in Path(lightning_sgdclean.__file__).parent.glob("*/__init__.py")}
    rows = re.findall(r"^\| `(\w+)/` \|", text_of("docs/design.md"), re.MULTILINE)
    assert sorted(rows) == sorted(wings)
