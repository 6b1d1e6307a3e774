# SPDX-License-Identifier: Apache-2.0
"""What an optimizer's step is to the walk, transposed by autograd, and the proof of updates from outside."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_sgdclean.base.errors import UnsupportedTrainingError

Entries = dict[str, Tensor]
Group = dict[str, Any]
Clip = tuple[str, float] | None  # an algorithm and a value


class Update(ABC):
    """One optimizer's step on one parameter, ``(theta, s, g)`` to ``(theta', s')``, and its transpose.

    A subclass writes :meth:`forward`; its derivatives are then taken by autograd.

    Attributes:
        is_linear: Whether the transpose does without the value of the gradient; it may then be given any tensor.
        constants: Entries of the state that no gradient moves, such as a counter. Nothing is differentiated by them.
        caveat: What is to be said of every ranking that is made through it; a warning, empty where there is none.
    """

    is_linear: bool = False
    constants: frozenset[str] = frozenset({"step"})
    caveat: str = ""

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

    def clipping(self, groups: list[Group]) -> Clip:
        """How the step itself clips the gradient of all parameters together, before :meth:`forward` gets its part.

        Args:
            groups: The options of every parameter group, as :meth:`forward` gets them.

        Returns:
            ``("norm_exactly", value)`` where it divides by the norm over ``value`` if that is above one; else None.
        """
        return None

    def recovered(self, param: Tensor, state: Entries, after: Entries, group: Group) -> Tensor | None:
        """The gradient as far as :meth:`transpose` needs it, from the state before the step and after; None: unknown.

        Args:
            param: As :meth:`forward` gets it, and so are ``state`` and ``group``.
            state: See there.
            after: The recorded state after the step, in the precision and on the device that it was recorded on.
            group: See there.
        """
        return param if self.is_linear else None  # a linear rule reads none; any tensor of its shape will do

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


Forward = Callable[[Tensor, Tensor, Entries, Group], tuple[Tensor, Entries]]
_STEP = 1e-6  # relative; the differences' error is about its square, and that of rounding 1e-16 over it
_TOLERANCE = 1e-4  # of the derivative; a kink such as a maximum is crossed by about one in a million entries
_COARSEST = 1.0  # of the step: rounding that moves more than that decides where the parameters go


class Function(Update):
    """An update of which only the forward was given."""

    def __init__(self, function: Forward) -> None:
        self._function = function

    def forward(self, param: Tensor, grad: Tensor, state: Entries, group: Group) -> tuple[Tensor, Entries]:
        """See the base class."""
        return self._function(param, grad, state, group)


class Proved(Update):
    """An update whose transpose is proved on every new shape of parameter and state, at the first step with it."""

    def __init__(self, update: Update, optimizer: str) -> None:
        self._update, self._optimizer = update, optimizer
        self.is_linear, self.constants, self.caveat = update.is_linear, update.constants, update.caveat
        self._proved: set[tuple[torch.Size, frozenset[str]]] = set()

    def forward(self, param: Tensor, grad: Tensor, state: Entries, group: Group) -> tuple[Tensor, Entries]:
        """See the base class."""
        with self._explaining(state, group):
            return self._update.forward(param, grad, state, group)

    def clipping(self, groups: list[Group]) -> Clip:
        """See the base class."""
        return self._update.clipping(groups)

    def transpose(
        self, param: Tensor, grad: Tensor, state: Entries, group: Group, adjoint: Tensor, state_adjoint: Entries
    ) -> tuple[Tensor, Tensor, Entries]:
        """See the base class.

        Raises:
            UnsupportedTrainingError: If the transpose is not that of the forward.
        """
        with self._explaining(state, group):
            kind = param.shape, frozenset(state)
            if kind not in self._proved:
                self._prove(param, grad, state, group)
                self._proved.add(kind)
            return self._update.transpose(param, grad, state, group, adjoint, state_adjoint)

    @contextmanager
    def _explaining(self, state: Entries, group: Group) -> Iterator[None]:
        try:
            yield
        except KeyError as error:
            raise UnsupportedTrainingError(
                f"The update registered for {self._optimizer} reads {error}, which is not there. There are the options "
                f"{sorted(group)} and the state entries {sorted(state)}: before the first step there is no state, and "
                "only numbers and tensors are recorded."
            ) from error

    def _prove(self, param: Tensor, grad: Tensor, state: Entries, group: Group) -> None:
        """Compare the transpose with central differences in float64, along directions that keep zeros zero."""
        update, source = self._update, torch.Generator().manual_seed(0)
        state = {key: value.double() if update.is_followed(key, value) else value for key, value in state.items()}
        point = {"param": param.double(), "grad": grad.double()}
        point |= {f"state[{key!r}]": value for key, value in state.items() if update.is_followed(key, value)}

        def outputs(point: Entries) -> Entries:
            inner = {key: point.get(f"state[{key!r}]", value) for key, value in state.items()}
            moved, after = update.unrounded(point["param"], point["grad"], inner, group)
            return {key: value for key, value in after.items() if update.is_followed(key, value)} | {"": moved}

        self._compare_rounding(point, state, group, outputs(point)[""])
        bars = {key: _random_like(value, source) for key, value in outputs(point).items()}
        rest = state, group, bars[""], {key: bar for key, bar in bars.items() if key}
        c, lam, mu = update.transpose(point["param"], point["grad"], *rest)
        found = {"param": lam, "grad": c, **{f"state[{key!r}]": bar for key, bar in mu.items()}}
        for name, leaf in point.items():
            tangent = leaf * _random_like(leaf, source)
            ahead, behind = (outputs({**point, name: leaf + amount * tangent}) for amount in (_STEP, -_STEP))
            truth = sum(float(((ahead[key] - behind[key]) * bar).sum()) for key, bar in bars.items()) / (2 * _STEP)
            size = sum(float((ahead[key] * bar).abs().sum()) for key, bar in bars.items())
            self._compare(name, found.get(name, torch.zeros_like(leaf)) * tangent, truth, 1e-8 * size)
        if update.is_linear:
            other = update.transpose(point["param"], _random_like(grad, source), *rest)[0]
            self._compare(
                "grad at another gradient (is_linear = True)", c * bars[""], float((other * bars[""]).sum()), 0
            )

    def _compare(self, name: str, products: Tensor, truth: float, rounding: float) -> None:
        claimed = float(products.sum())
        if abs(claimed - truth) <= _TOLERANCE * float(products.abs().sum()) + rounding:
            return
        raise UnsupportedTrainingError(
            f"The update registered for {self._optimizer} gives a derivative of {claimed:.6g} by {name} in some "
            f"direction, where differences of its values give {truth:.6g}. Likely causes: a value taken out of "
            "autograd (detach, item, float, no_grad), a root or quotient of zeros (torch.where before the root), "
            "rounding to a fixed type (see Update.unrounded), or a counter that Update.constants does not name."
        )

    def _compare_rounding(self, point: Entries, state: Entries, group: Group, exact: Tensor) -> None:
        rounded = self._update.forward(point["param"], point["grad"], state, group)[0]
        off, moved = float((rounded - exact).norm()), float((exact - point["param"]).norm())
        if not off <= _COARSEST * moved:
            raise UnsupportedTrainingError(
                f"By the update registered for {self._optimizer}, forward and unrounded lead to places {off:.3g} "
                f"apart, in a step of {moved:.3g}. The two may differ by rounding only, and by less than the step is "
                "long: otherwise the derivative of one says nothing of the other. Train in a wider type."
            )


def _random_like(tensor: Tensor, source: torch.Generator) -> Tensor:
    return torch.randn(tensor.shape, generator=source, dtype=torch.float64).to(tensor.device)
