# SPDX-License-Identifier: Apache-2.0
"""Rank the training samples of a Lightning run by the harm they did to the validation loss."""

from lightning_sgdclean.callback import SGDInfluence
from lightning_sgdclean.comparing import compare
from lightning_sgdclean.later import retrace
from lightning_sgdclean.optimizers import register_update
from lightning_sgdclean.ranking import Ranking
from lightning_sgdclean.updates import Update

__version__ = "0.1.0"

__all__ = ["Ranking", "SGDInfluence", "Update", "__version__", "compare", "register_update", "retrace"]
