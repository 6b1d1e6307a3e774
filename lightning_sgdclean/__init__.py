# SPDX-License-Identifier: Apache-2.0
"""Rank the training samples of a Lightning run by the harm they did to the validation loss."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_sgdclean.callback import SGDInfluence
    from lightning_sgdclean.cleansed import Cleansed
    from lightning_sgdclean.cleansing import cleanse
    from lightning_sgdclean.comparing import compare
    from lightning_sgdclean.counterfactuals import Counterfactual, counterfactual
    from lightning_sgdclean.decisions import apply_decisions
    from lightning_sgdclean.later import retrace
    from lightning_sgdclean.optimizers import register_update
    from lightning_sgdclean.page.building import write_report
    from lightning_sgdclean.ranking import Ranking
    from lightning_sgdclean.training import Training
    from lightning_sgdclean.updates import Update

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
    "Cleansed": "cleansed",
    "Counterfactual": "counterfactuals",
    "Ranking": "ranking",
    "SGDInfluence": "callback",
    "Training": "training",
    "Update": "updates",
    "apply_decisions": "decisions",
    "cleanse": "cleansing",
    "compare": "comparing",
    "counterfactual": "counterfactuals",
    "register_update": "optimizers",
    "retrace": "later",
    "write_report": "page.building",
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
