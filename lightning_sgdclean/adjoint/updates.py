# SPDX-License-Identifier: Apache-2.0
"""What an optimizer's step is to the walk backwards: a map of one parameter, and that map's transpose."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from lightning_sgdclean.base.errors import UnsupportedTrainingError

Entries = dict[str, Tensor]
Group = dict[str, Any]


class Update(ABC):
    """One optimizer's step on one parameter, ``(theta, s, g)`` to ``(theta', s')``, and its transpose.

    A subclass writes :meth:`forward`; its derivatives are then taken by autograd.

    Attributes:
        is_linear: Whether the transpose does without the value of the gradient; it may then be given any tensor.
        constants: Entries of the state that no gradient moves, such as a counter. Nothing is differentiated by them.
    """

    is_linear: bool = False
    constants: frozenset[str] = frozenset({"step"})

    @abstractmethod
    def forward(self, param: Tensor, grad: Tensor, state: Entries, group: Group) -> tuple[Tensor, Entries]:
        """The parameter and its state after the step, as new tensors; compared with what was recorded.

        Args:
            param: Before the step.
            grad: Its gradient, clipped, with the shape of ``param``.
            state: ``optimizer.state[param]`` before the step, numbers made float64 tensors, what is neither left out;
                empty where the optimizer had none yet.
            group: The options of its parameter group as they stand when the step is over, those that are numbers,
                strings, tensors of one element, or sequences of such (given as lists).

        Returns:
            The parameter, and every entry of the state that the optimizer keeps, under the same names.
        """

    def unrounded(self, param: Tensor, grad: Tensor, state: Entries, group: Group) -> tuple[Tensor, Entries]:
        """What is differentiated: :meth:`forward`, unless that rounds to fewer bits than it is given."""
        return self.forward(param, grad, state, group)

    def transpose(
        self, param: Tensor, grad: Tensor, state: Entries, group: Group, adjoint: Tensor, state_adjoint: Entries
    ) -> tuple[Tensor, Tensor, Entries]:
        """Take the adjoints of what :meth:`unrounded` returns to those of what it is given.

        Args:
            param: As :meth:`forward` gets it, and so the next three.
            grad: See there.
            state: See there.
            group: See there.
            adjoint: Derivative of the objective by the parameter after the step.
            state_adjoint: That by the state after it; entries may be missing, which means zero.

        Returns:
            The derivatives by ``grad``, by ``param`` and by the entries of ``state``.

        Raises:
            UnsupportedTrainingError: If an entry that a later step read is not returned.
        """
        followed = [key for key, value in state.items() if self.is_followed(key, value)]
        leaves = [tensor.detach().requires_grad_() for tensor in (grad, param, *(state[key] for key in followed))]
        inner = {**state, **dict(zip(followed, leaves[2:], strict=True))}
        with torch.enable_grad():
            moved, after = self.unrounded(leaves[1], leaves[0], inner, group)
        forgotten = sorted(state_adjoint.keys() - after.keys())
        if forgotten:
            raise UnsupportedTrainingError(
                f"{type(self).__name__} returns the state entries {sorted(after)}, and not {forgotten[0]!r}, which the "
                "next step read. Return every entry, also one that the step leaves as it is."
            )
        pairs = [(moved, adjoint), *((after[key], bar) for key, bar in state_adjoint.items())]
        pairs = [(value, bar.to(value.dtype)) for value, bar in pairs if value.requires_grad]
        if not pairs:
            return (
                torch.zeros_like(grad),
                torch.zeros_like(param),
                {key: torch.zeros_like(state[key]) for key in followed},
            )
        values, bars = zip(*pairs, strict=True)
        pulled = torch.autograd.grad(values, leaves, bars, allow_unused=True, materialize_grads=True)
        return pulled[0], pulled[1], dict(zip(followed, pulled[2:], strict=True))

    def is_followed(self, key: str, value: Tensor) -> bool:
        """Whether a state entry has derivatives."""
        return isinstance(value, Tensor) and value.is_floating_point() and key not in self.constants


def uphill(grad: Tensor, group: Group) -> Tensor:
    """The gradient, or its negative where the optimizer maximizes."""
    return -grad if group.get("maximize") else grad


def next_step(state: Entries) -> Tensor:
    """The counter after this step: 1 for the first one."""
    return state.get("step", torch.tensor(0.0)) + 1
