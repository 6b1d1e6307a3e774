# SPDX-License-Identifier: Apache-2.0
"""setup.cfg names what is imported, and the oldest versions are those that `make lowest` runs."""

import ast
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
BY_NAME = {"pytorch-lightning"}  # base/lightning.py asks for either of two packages

SETUP = ConfigParser()
SETUP.read(ROOT / "setup.cfg", encoding="utf-8")
REQUIRED = [Requirement(line) for line in SETUP["options"]["install_requires"].split("\n") if line]
EXTRAS = {
    name: [Requirement(line) for line in lines.split("\n") if line and not line.startswith("lightning-sgdclean[")]
    for name, lines in SETUP["options.extras_require"].items()
}
OPTIONAL = [requirement for requirements in EXTRAS.values() for requirement in requirements]


def names(requirements: list[Requirement]) -> set[str]:
    return {canonicalize_name(requirement.name) for requirement in requirements}


def imported(node: ast.AST, *, always: bool) -> Iterator[str]:
    """Modules that a file imports; ``always``: only those that it cannot be imported without."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield str(child.module)
        elif isinstance(child, ast.Call) and ast.unparse(child.func).endswith("import_module"):
            yield from (argument.value for argument in child.args if isinstance(argument, ast.Constant))
        for_types = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        if not (always and (for_types or isinstance(child, ast.FunctionDef))):
            yield from imported(child, always=always)


def distributions(*, always: bool = False) -> set[str]:
    """Whose modules the package imports."""
    known = packages_distributions()
    trees = [ast.parse(path.read_text("utf-8")) for path in (ROOT / "lightning_sgdclean").rglob("*.py")]
    modules = {name.partition(".")[0] for tree in trees for name in imported(tree, always=always)}
    others = modules - {"lightning_sgdclean"} - sys.stdlib_module_names
    return {canonicalize_name(known.get(module, [module])[0]) for module in others}


def test_what_the_package_cannot_be_imported_without_is_required():
    assert distributions(always=True) <= names(REQUIRED)


def test_what_is_imported_on_demand_is_required_or_in_an_extra():
    assert distributions() <= names(REQUIRED + OPTIONAL)


def test_nothing_is_required_that_is_not_imported():
    assert names(REQUIRED) <= distributions() | BY_NAME


def pins(file: str) -> dict[str, set[str]]:
    """Version of each package in a constraint file, without a build such as "+cpu"."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / file).read_text("utf-8").splitlines())
    found: dict[str, set[str]] = {}
    for requirement in map(Requirement, filter(None, lines)):
        version = Version(str(requirement.specifier).removeprefix("=="))
        found.setdefault(canonicalize_name(requirement.name), set()).add(version.public)
    return found


def test_the_oldest_versions_named_are_those_that_run():
    lowest = pins("constraints-lowest.txt")
    assert lowest.pop("torch") == pins("constraints.txt")["torch"]  # the file says why it is not the oldest
    named = [requirement for requirement in REQUIRED + OPTIONAL if requirement.specifier]
    oldest = {canonicalize_name(requirement.name): {str(requirement.specifier)} for requirement in named}
    assert oldest.pop("torch") == {">=2.9.1"}
    assert oldest == {name: {f">={version}" for version in versions} for name, versions in lowest.items()}


def test_whatever_is_required_has_an_oldest_version():
    assert all(requirement.specifier for requirement in REQUIRED)
