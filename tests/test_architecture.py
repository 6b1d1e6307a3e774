# SPDX-License-Identifier: Apache-2.0
"""The house: imports run one way, and only a few modules see a Trainer."""

import ast
from pathlib import Path

import lightning_sgdclean

PACKAGE = Path(lightning_sgdclean.__file__).parent
SEE_A_TRAINER = {
    "callback",
    "recording",
    "train_loaders",
    "checks",
    "after_fit",
    "opened",
    "reopened",
    "surroundings",
    "_lightning",
    "artifacts",
}


def imports(module: str) -> set[str]:
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_sgdclean"):
            inner = node.module.partition(".")[2]
            found |= {inner} if inner else {alias.name for alias in node.names}
    return found


def test_no_module_is_imported_in_a_circle():
    graph = {path.stem: imports(path.stem) for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
    done: set[str] = set()
    while len(done) < len(graph):
        ready = {name for name, needs in graph.items() if name not in done and needs <= done}
        assert ready, f"a circle among {sorted(set(graph) - done)}"
        done |= ready


def test_only_the_outermost_modules_see_a_trainer():
    for path in PACKAGE.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
        assert "trainer" not in names or path.stem in SEE_A_TRAINER, path.stem
