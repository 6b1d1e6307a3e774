# SPDX-License-Identifier: Apache-2.0
"""The states of many runs side by side, a row each, and the user's own optimizer stepping all of them as one."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_sgdclean.adjoint.clipping import Clip
from lightning_sgdclean.leave_out.one_by_one import copied, nudged
from lightning_sgdclean.replay.forward import Borrowed
from lightning_sgdclean.replay.walk import Walk
from lightning_sgdclean.trajectory.records import State, Step

Gradients = Mapping[str, Tensor | None]


class Rows:
    """The states of ``K`` runs. The first is that of the live module and optimizer when this is made.

    Attributes:
        params: By name, each ``(K, ...)``.
        buffers: Likewise.
    """

    def __init__(self, walk: Walk, optimizer: Borrowed) -> None:
        self._walk, self._optimizer = walk, optimizer
        self.params = {name: param.detach()[None].clone().requires_grad_() for name, param in walk.params.items()}
        self.buffers = {name: buffer.detach()[None].clone() for name, buffer in walk.module.named_buffers()}
        self._entries = {name: self._entries_of(param) for name, param in walk.params.items()}

    def __len__(self) -> int:
        return len(next(iter(self.params.values())))

    def _entries_of(self, param: Tensor) -> dict[str, Any]:
        entries = self._optimizer.optimizer.state.get(param, {})
        return {
            key: value[None].clone() if self._has_rows(key, value) else copy.copy(value)
            for key, value in entries.items()
        }

    def _has_rows(self, key: str, value: Any) -> bool:
        """Whether an entry of the optimizer's state has a part for each run; counters are the same for all."""
        return isinstance(value, Tensor) and self._walk.update.is_followed(key, value)

    def append(self, seeds: list[int | None]) -> None:
        """Copies of the first row, one for each seed; with a seed, off by rounding errors."""
        first_new, num = len(self), len(seeds)
        self.params = {name: _more(tensor, num) for name, tensor in self.params.items()}
        self.buffers = {name: _more(tensor, num) for name, tensor in self.buffers.items()}
        for entries in self._entries.values():
            entries |= {key: _more(value, num) for key, value in entries.items() if self._has_rows(key, value)}
        for number, seed in enumerate(seeds, first_new):
            if seed is not None:
                for name, param in nudged({name: t[number] for name, t in self.params.items()}, seed).items():
                    self.params[name][number] = param
        for tensor in self.params.values():
            tensor.requires_grad_()

    def state(self, number: int) -> State:
        """The state of one run, in tensors of its own."""
        optimizer = {
            name: {
                key: value[number] if self._has_rows(key, value) else value
                for key, value in entries.items()
                if isinstance(value, Tensor)
            }
            for name, entries in self._entries.items()
        }
        params = {name: tensor[number] for name, tensor in self.params.items()}
        return copied(State(params, {name: tensor[number] for name, tensor in self.buffers.items()}, optimizer))

    @torch.no_grad()
    def step(self, step: Step, gradients: Gradients) -> None:
        """Clip each run's gradients by themselves, then let the user's optimizer step them all as one tensor."""
        optimizer = self._optimizer.optimizer
        for name, gradient in clipped(gradients, step.clip).items():
            self.params[name].grad = gradient
        held = [group["params"] for group in optimizer.param_groups]
        rows = {id(param): self.params[name] for name, param in self._walk.params.items()}
        self._optimizer.set_options(step.groups)
        for group, params in zip(optimizer.param_groups, held, strict=True):
            group["params"] = [rows.get(id(param), param) for param in params]
        optimizer.state.update({self.params[name]: entries for name, entries in self._entries.items() if entries})
        try:
            self._optimizer.step(None)
        finally:
            for name, tensor in self.params.items():
                self._entries[name] = optimizer.state.pop(tensor, {})
                tensor.grad = None
            for group, params in zip(optimizer.param_groups, held, strict=True):
                group["params"] = params


def _more(tensor: Tensor, num: int) -> Tensor:
    """The rows, and copies of the first."""
    return torch.cat([tensor.detach(), tensor.detach()[:1].expand(num, *tensor.shape[1:])])


def clipped(gradients: Gradients, how: Clip) -> Gradients:
    """Each run's gradients as ``clip_grad_norm_`` or ``clip_grad_value_`` leaves them.

    Args:
        gradients: By parameter, each ``(K, ...)``, or None.
        how: As recorded.
    """
    given = {name: gradient for name, gradient in gradients.items() if gradient is not None}
    if how is None or not given:
        return gradients
    algorithm, value = how
    if algorithm == "value":
        return dict(gradients) | {name: gradient.clamp(-value, value) for name, gradient in given.items()}
    norms = torch.stack([torch.linalg.vector_norm(g.reshape(len(g), -1), dim=1) for g in given.values()])
    factor = (value / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)
    return dict(gradients) | {name: g * factor.view(-1, *[1] * (g.ndim - 1)) for name, g in given.items()}
