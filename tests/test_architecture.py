# SPDX-License-Identifier: Apache-2.0
"""The house: imports run one way, and only a few modules see a Trainer."""

import ast
from pathlib import Path

import lightning_sgdclean

PACKAGE = Path(lightning_sgdclean.__file__).parent
SEE_A_TRAINER = {
    "after_fit",
    "base.lightning",
    "callback",
    "cleansing.cleansed",
    "cleansing.own_checkpoints",
    "cleansing.training",
    "cli.configured",
    "cli.dry_run",
    "leave_out.counterfactual",
    "losses.evaluate",
    "record.checks",
    "record.loaders",
    "record.budget",
    "record.recording",
    "replay.open",
    "replay.reopened",
    "retracing",
}


MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
    if path != PACKAGE / "__init__.py"
}


def imports(module: str) -> set[str]:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_sgdclean"):
            inner = node.module.partition(".")[2]
            found |= {inner, *(f"{inner}.{alias.name}".strip(".") for alias in node.names)}
    return (found & set(MODULES)) - {module}


def test_no_module_is_imported_in_a_circle():
    graph = {name: imports(name) for name in MODULES}
    done: set[str] = set()
    while len(done) < len(graph):
        ready = {name for name, needs in graph.items() if name not in done and needs <= done}
        assert ready, f"a circle among {sorted(set(graph) - done)}"
        done |= ready


def test_only_the_outermost_modules_see_a_trainer():
    for name, path in MODULES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
        assert "trainer" not in names or name in SEE_A_TRAINER, name
