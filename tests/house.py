# SPDX-License-Identifier: Apache-2.0
"""The house in figures: which file imports which, how many floors that makes, how long the files are.

python tests/house.py
"""

import ast
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

PACKAGE = "lightning_sgdclean"
FACE = "__init__"


@dataclass
class House:
    """The files of a package by their dotted names, and what each takes from which others.

    Attributes:
        folder: The package's folder.
    """

    folder: Path
    trees: dict[str, ast.Module] = field(init=False)
    lines: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        texts = {self._name_of(path): path.read_text(encoding="utf-8") for path in sorted(self.folder.rglob("*.py"))}
        self.trees = {name: ast.parse(text) for name, text in texts.items()}
        self.lines = {name: text.count("\n") for name, text in texts.items()}

    def _name_of(self, path: Path) -> str:
        return ".".join(path.relative_to(self.folder).with_suffix("").parts)

    @cached_property
    def taken(self) -> dict[str, dict[str, set[str]]]:
        """For each file, the names that it takes from each other file, wherever in it the import stands."""
        return {name: self._taken_by(name) for name in self.trees}

    def _taken_by(self, name: str) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for node in self._running(self.trees[name]):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == PACKAGE:
                source = (node.module or "").partition(".")[2]
                for alias in node.names:
                    self._note(found, source, alias.name)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    package, _, source = alias.name.partition(".")
                    if package == PACKAGE:
                        self._note(found, source, "")
        found.pop(name, None)
        return found

    def _running(self, tree: ast.AST) -> Iterator[ast.AST]:
        """All nodes but those for type checkers alone."""
        for node in ast.iter_child_nodes(tree):
            if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
                yield node
                yield from self._running(node)

    def _note(self, found: dict[str, set[str]], source: str, taken: str) -> None:
        """A name taken from a file; where the name is a file itself, that file as a whole."""
        as_file = f"{source}.{taken}".strip(".")
        if as_file in self.trees:
            found.setdefault(as_file, set())
            return
        home = source if source in self.trees else f"{source}.{FACE}".strip(".")
        found.setdefault(home, set()).add(taken)

    @cached_property
    def floors(self) -> dict[str, int]:
        """The floor of each file: one above the highest of those that it imports.

        Raises:
            ValueError: If files import each other in a circle.
        """
        floors: dict[str, int] = {}
        while len(floors) < len(self.taken):
            ready = [name for name, needs in self.taken.items() if name not in floors and needs.keys() <= floors.keys()]
            if not ready:
                raise ValueError(f"a circle among {sorted(self._circle(floors))}")
            floors |= {name: 1 + max((floors[need] for need in self.taken[name]), default=0) for name in ready}
        return floors

    def _circle(self, done: dict[str, int]) -> set[str]:
        """Of the files that are not done, those that are imported by one of them, too."""
        rest = self.taken.keys() - done.keys()
        while True:
            imported = {need for name in rest for need in self.taken[name] if need in rest}
            if imported == rest:
                return rest
            rest = imported

    @staticmethod
    def wing_of(name: str) -> str:
        """The folder that a file lies in; the file itself where it lies in none."""
        return name.partition(".")[0]

    def definitions(self, name: str) -> set[str]:
        """What a file defines at its top level."""
        found: set[str] = set()
        for node in self.trees[name].body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found |= {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
        return found

    def face(self, wing: str) -> set[str]:
        """What a wing lists in ``__all__``."""
        for node in self.trees[f"{wing}.{FACE}"].body:
            if (
                isinstance(node, ast.Assign)
                and isinstance(node.targets[0], ast.Name)
                and node.targets[0].id == "__all__"
            ):
                return set(ast.literal_eval(node.value))
        return set()


def summary(house: House) -> str:
    """The figures, a line each."""
    lines = sorted(house.lines.values())
    longest = sorted(house.lines, key=lambda name: -house.lines[name])[:5]
    figures = {
        "files": len(lines),
        "lines": sum(lines),
        "median lines of a file": round(statistics.median(lines)),
        "files over 350 lines": sum(number > 350 for number in lines),
        "longest files": ", ".join(f"{name} {house.lines[name]}" for name in longest),
        "imports of one file by another": sum(len(needs) for needs in house.taken.values()),
        "floors": max(house.floors.values()),
        "folders": len({house.wing_of(name) for name in house.trees if "." in name}),
    }
    return "\n".join(f"{name:32} {value}" for name, value in figures.items())


if __name__ == "__main__":
    print(summary(House(Path(__file__).resolve().parent.parent / PACKAGE)))
