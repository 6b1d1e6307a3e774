# SPDX-License-Identifier: Apache-2.0
"""Rank the training samples of a Lightning run by the harm they did to the validation loss."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_sgdclean.adjoint.optimizers import register_update
    from lightning_sgdclean.adjoint.updates import Update
    from lightning_sgdclean.callback import SGDInfluence
    from lightning_sgdclean.cleansing.cleanse import cleanse
    from lightning_sgdclean.cleansing.cleansed import Cleansed
    from lightning_sgdclean.cleansing.decisions import apply_decisions
    from lightning_sgdclean.cleansing.training import Training
    from lightning_sgdclean.leave_out.counterfactual import Counterfactual, counterfactual
    from lightning_sgdclean.ranking.compare import compare
    from lightning_sgdclean.ranking.ranking import Ranking
    from lightning_sgdclean.report.page import write_report
    from lightning_sgdclean.retracing import retrace

__version__ = "0.1.0"

__all__ = [
    "Cleansed",
    "Counterfactual",
    "Ranking",
    "SGDInfluence",
    "Training",
    "Update",
    "__version__",
    "apply_decisions",
    "cleanse",
    "compare",
    "counterfactual",
    "register_update",
    "retrace",
    "write_report",
]

_HOMES = {
    "Cleansed": "cleansing.cleansed",
    "Counterfactual": "leave_out.counterfactual",
    "Ranking": "ranking.ranking",
    "SGDInfluence": "callback",
    "Training": "cleansing.training",
    "Update": "adjoint.updates",
    "apply_decisions": "cleansing.decisions",
    "cleanse": "cleansing.cleanse",
    "compare": "ranking.compare",
    "counterfactual": "leave_out.counterfactual",
    "register_update": "adjoint.optimizers",
    "retrace": "retracing",
    "write_report": "report.page",
}

# Modules that have an address in the documentation of the API, and the rooms that they moved to.
_MOVED = {
    "agreement": "ranking.agreement",
    "cleansing_plan": "cleansing.plan",
    "cleansing_result": "cleansing.result",
    "comparison": "ranking.comparison",
    "errors": "base.errors",
    "gains": "cleansing.result",
    "relabelling": "data.labels",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for: what needs no torch, as the command line, does not wait for it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Addresses(MetaPathFinder, Loader):
    """Lets modules be imported under their addresses in the documentation, as the very modules that they are now."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == __name__ and name in _MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = import_module(f"{__name__}.{_MOVED[module.__name__.partition('.')[2]]}")


sys.meta_path.append(_Addresses())
