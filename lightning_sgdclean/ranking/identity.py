# SPDX-License-Identifier: Apache-2.0
"""What tells one ranking from others, so that decisions on its samples are not applied to another run's."""

import hashlib
import json

from lightning_sgdclean.ranking.ranking import Ranking

_DIGITS = 16


def run_id(ranking: Ranking) -> str:
    """``run-`` and sixteen hexadecimal digits of a SHA-256 over ids, influences (bit for bit) and visits.

    The same for a ranking and for what :meth:`~lightning_sgdclean.Ranking.load` reads of it; further columns do
    not count.
    """
    digest = hashlib.sha256(json.dumps(ranking.sample_id.tolist()).encode())
    digest.update(ranking.influence.astype("<f8").tobytes())
    digest.update(ranking.visits.astype("<i8").tobytes())
    return f"run-{digest.hexdigest()[:_DIGITS]}"  # with letters in front no spreadsheet takes it for a number
