# SPDX-License-Identifier: Apache-2.0
"""What rankings and the summaries beside them may hold."""

from lightning_sgdclean import Ranking

STRANGE_IDS = [
    "plain",
    "a,b",
    'say "no"',
    "two\nlines",
    "carriage\rreturn",
    "dos\r\nlines",
    "\rfirst",
    "\tfirst",
    "=1+1",
    "\uff1d1+1",
    "\n=1",
    "+1",
    "-1",
    "@SUM(A1)",
    "'quoted'",
    "''twice",
    "'",
    "'=x",
    "=x",
    "007",
    "7",
    "",
    " ",
    " padded ",
    "\ufeffmark",
    "naïve/Ünï/画像.png",
    "line\u2028separator\x85",
    "nul\x00byte",
]

SUMMARY = {
    "versions": {"python": "3.11", "torch": "2.13"},
    "objective": {"name": "val_loss", "mode": "min", "recomputed": 0.25, "logged": 0.25},
    "window": {"words": "steps 0 to 9: epoch 0", "first_step": 0},
    "end_point": "after step 9, the last",
    "engine": "exact",
    "precision": "32-true",
    "replay": {"words": "losses bit for bit in all 10 batches", "complaints": []},
}


def ranking_of(influence, ids=None, **columns):
    ids = range(len(influence)) if ids is None else ids
    return Ranking.from_influence(ids, influence, [1] * len(influence), columns)
