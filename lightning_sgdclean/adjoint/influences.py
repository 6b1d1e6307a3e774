# SPDX-License-Identifier: Apache-2.0
"""What a walk finds: an influence for every sample drawn, on every objective, and by epoch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_sgdclean.base.options import SampleId
from lightning_sgdclean.trajectory.records import MicroBatch, Step


@dataclass
class Influences:
    """Influence of every sample drawn in a window on each objective.

    Attributes:
        ids: The ``N`` samples drawn.
        visits: How often each was drawn, ``(N,)``.
        values: Influences in the objective's unit, ``(K, N)``, one row an objective; negative: harmful.
        by_epoch: What each epoch adds to the first row, ``(N,)`` by epoch.
        relabelled: What the first objective would change by if the samples had other labels, ``(N,)``; NaN: not known.
    """

    ids: list[SampleId]
    visits: Tensor
    values: Tensor
    by_epoch: dict[int, Tensor]
    relabelled: Tensor

    @classmethod
    def none_yet(cls, steps: list[Step], num_objectives: int) -> "Influences":
        """Zeros for all that is drawn in ``steps``."""
        drawn = [micro for step in steps if step.is_update for micro in step.micro]
        ids = list(dict.fromkeys(name for micro in drawn for name in micro.ids))
        by_epoch = {epoch: torch.zeros(len(ids), dtype=torch.float64) for epoch in sorted({m.epoch for m in drawn})}
        values = torch.zeros(num_objectives, len(ids), dtype=torch.float64)
        none = torch.zeros(len(ids), dtype=torch.float64)
        return cls(ids, none.long(), values, by_epoch, none)

    def __post_init__(self) -> None:
        self._rows = {name: row for row, name in enumerate(self.ids)}

    def add(self, micro: MicroBatch, scores: Tensor) -> None:
        """Take in a micro-batch's ``scores``, ``(K, B)`` or with other labels ``(K, 2 B)``: what more of each does."""
        rows = torch.tensor([self._rows[name] for name in micro.ids])
        scores = scores.double().cpu()
        if scores.shape[1] > len(rows):
            self.relabelled.index_add_(0, rows, scores[0, len(rows) :])
        moved = -scores[:, : len(rows)]
        self.values.index_add_(1, rows, moved)
        self.by_epoch[micro.epoch].index_add_(0, rows, moved[0])
        self.visits.index_add_(0, rows, torch.ones_like(rows))
