# SPDX-License-Identifier: Apache-2.0
"""Rank the training samples of a Lightning run by the harm they did to the validation loss."""

from importlib import import_module
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


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for: what needs no torch, as the command line, does not wait for it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
