# SPDX-License-Identifier: Apache-2.0
"""Rank the training samples of a Lightning run by the harm they did to the validation loss."""

from lightning_sgdclean.callback import SGDInfluence
from lightning_sgdclean.ranking import Ranking

__version__ = "0.1.0"

__all__ = ["Ranking", "SGDInfluence", "__version__"]
