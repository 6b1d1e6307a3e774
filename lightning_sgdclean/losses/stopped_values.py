# SPDX-License-Identifier: Apache-2.0
"""What a teacher's weights do to the loss, though no gradient goes there: ``no_grad`` and ``detach`` seen through.

A target that a teacher computes is a constant where the loss is differentiated by the trained parameters. It is none
where that gradient is differentiated once more, since training moves the teacher. So what is computed of a teacher
out of autograd's sight is computed with a graph of its own. The loss is made of leaves that hold its values.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from lightning_sgdclean.losses.kernels import gradient
from lightning_sgdclean.losses.loss_functions import passed_on
from lightning_sgdclean.trajectory.teachers import Following, followings

_COPIES = frozenset({Tensor.detach, torch.detach, Tensor.data.__get__})  # type: ignore[attr-defined]
_LEAVES_TORCH = frozenset(
    {Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__float__, Tensor.__int__}
)
_ABOUT = frozenset({Tensor.requires_grad_, Tensor.detach_, torch.detach_, Tensor.__format__, Tensor.__repr__})


@dataclass
class _Hidden:
    """A value as the user's code sees it, and the same one with the graph that leads to the teacher."""

    seen: Tensor
    source: Tensor
    leaf: Tensor | None = None  # what the loss is made of instead


@dataclass
class TeacherRead:
    """A teacher's weights as they were read, and the derivative by them.

    Attributes:
        name: The teacher's.
        how: What they were, by what the step began with.
        place: Which trained parameter is their partner.
        cotangent: The derivative by them.
    """

    name: str
    how: Following
    place: int
    cotangent: Tensor

    def add_to(self, buffers: dict[str, Tensor], adjoint: list[Tensor]) -> None:
        """Add it (in place) to the derivatives by buffers and teachers, and by trained parameters."""
        added = self.how.own * self.cotangent
        buffers[self.name] = buffers[self.name] + added if self.name in buffers else added
        if self.how.share:
            adjoint[self.place] = adjoint[self.place] + self.how.share * self.cotangent


class TeachersOutputs(TorchFunctionMode):
    """Watches what is computed of teachers.

    The values, to the last bit, and what has a gradient are what they would be without it.

    Args:
        module: The LightningModule.
        teachers: Its teachers, by name.
    """

    def __init__(self, module: nn.Module, teachers: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {id(tensor): name for name, tensor in teachers.items()}
        self._held = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
        self._hidden: dict[int, _Hidden] = {}
        self._current: dict[str, Tensor] = {}  # of each teacher, the leaf that holds its present content
        self.reads: list[tuple[str, Tensor]] = []
        self.hows: list[tuple[Following, int]] = []  # of each read
        self.stops: list[tuple[Tensor, Tensor]] = []  # leaves and what they hold, each made of earlier ones only

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Pass everything on, what is made of teachers with a graph."""
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not any(id(tensor) in self._names or id(tensor) in self._hidden for tensor in tensors):
            return passed_on(func, args, kwargs)
        if func in _LEAVES_TORCH or func in _ABOUT or func.__name__ == "__set__":
            return passed_on(func, args, kwargs)
        if func in _COPIES or func.__name__ == "__get__":
            output, hidden = passed_on(func, args, kwargs), self._hidden.get(id(args[0]))
            if hidden is None or not isinstance(
                output, Tensor
            ):  # of a teacher's weights only their update makes copies
                return output
            if func in _COPIES:
                self._hidden[id(output)] = _Hidden(output, hidden.source)
                return output
        is_graph = torch.is_grad_enabled() and any(t.requires_grad for t in tensors if id(t) not in self._names)
        if is_graph:
            return passed_on(func, *self._mapped(self._leaf, args, kwargs))
        targets = _written(func, args, kwargs)
        if any(id(target) in self._held for target in targets):
            return passed_on(func, args, kwargs)  # the teacher's own update, or a buffer's
        for target in targets:
            self._hidden.setdefault(id(target), _Hidden(target, target.detach().clone()))
        with torch.inference_mode(False), torch.enable_grad():
            output = passed_on(func, *self._mapped(self._source, args, kwargs))
        by_source = {id(self._hidden[id(target)].source): target for target in targets}
        for source, target in zip(map(self._source, targets), targets, strict=True):
            if source.data_ptr() != target.data_ptr():
                with torch.no_grad():
                    target.copy_(source)
        return tree_map(lambda value: by_source.get(id(value)) if id(value) in by_source else self._seen(value), output)

    def _mapped(
        self, change: Callable[[Tensor], Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def changed(value: Any) -> Any:
            return change(value) if isinstance(value, Tensor) else value

        return tree_map(changed, args), tree_map(changed, kwargs)

    def _seen(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.requires_grad:
            return value
        seen = value.detach()
        self._hidden[id(seen)] = _Hidden(seen, value)
        return seen

    def _source(self, tensor: Tensor) -> Tensor:
        if id(tensor) in self._names:
            return self._read(tensor)
        if id(tensor) in self._hidden:
            return self._hidden[id(tensor)].source
        return tensor.clone() if tensor.is_inference() else tensor

    def _leaf(self, tensor: Tensor) -> Tensor:
        if id(tensor) in self._names:
            return self._read(tensor)
        hidden = self._hidden.get(id(tensor))
        if hidden is None:
            return tensor
        if hidden.leaf is None:
            hidden.leaf = hidden.seen.detach().requires_grad_()
            self.stops.append((hidden.leaf, hidden.source))
        return hidden.leaf

    def _read(self, teacher: Tensor) -> Tensor:
        """A leaf with what the teacher holds now: its update may be part of the step, before or after it is read."""
        name = self._names[id(teacher)]
        leaf = self._current.get(name)
        if leaf is None or not torch.equal(leaf, teacher):
            leaf = self._current[name] = teacher.detach().clone().requires_grad_()
            self.reads.append((name, leaf))
        return leaf

    def relate(self, contents: dict[str, Tensor], params: dict[str, Tensor]) -> None:
        """Find out what was read, by what the step began with.

        Args:
            contents: What the teachers held then, by name.
            params: The trained parameters, in the order in which derivatives by them are taken.

        Raises:
            UnsupportedTrainingError: If it is neither, nor a sum of multiples of both.
        """
        places = {name: place for place, name in enumerate(params)}
        for name, leaf in self.reads:
            how = followings({name: leaf}, contents, params)[name]
            self.hows.append((how, places.get(how.partner, 0)))

    def track(self, leaf: Tensor) -> None:
        """What is made of this leaf gets a graph of its own, too."""
        self._hidden.setdefault(id(leaf), _Hidden(leaf, leaf, leaf))

    def stand_for(self, output: Tensor, written: Tensor) -> Tensor:
        """The value of one tensor, with the derivative of another."""
        with torch._C.DisableTorchFunction(), torch.enable_grad():
            hidden = self._hidden.get(id(written))
            source = written if hidden is None else hidden.source
            found = output.detach() + (source - source.detach())
            if hidden is None:
                return found
            seen = found.detach()
        self._hidden[id(seen)] = _Hidden(seen, found)
        return seen

    def with_graph(self, tensor: Tensor) -> Tensor:
        """A value with the graph that leads to teachers, if it has one."""
        hidden = self._hidden.get(id(tensor))
        return tensor if hidden is None else hidden.source


_IN_PLACE = {"__setitem__", *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "div", "pow", "mod"))}


def _written(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that a function writes to."""
    name = func.__name__
    is_in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    written = [*(args[:1] if is_in_place else ()), kwargs.get("out")]
    return [leaf for leaf in tree_leaves(written) if isinstance(leaf, Tensor)]


def pull_back_through(
    outputs: list[Tensor],
    cotangents: list[Tensor],
    inputs: list[Tensor],
    stopped: TeachersOutputs | None,
    *,
    retain_graph: bool = False,
) -> tuple[list[Tensor], list[TeacherRead]]:
    """The derivative by ``inputs``, and by teachers also behind what stops gradients.

    Args:
        outputs: Of a loss that was evaluated under ``stopped``.
        cotangents: Of each.
        inputs: By which to differentiate.
        stopped: What was seen of teachers; None where there are none.
        retain_graph: Whether the graph is used again.
    """
    if stopped is None or not stopped.reads:
        return gradient(outputs, inputs, cotangents, retain_graph=retain_graph), []
    wanted = [*inputs, *(leaf for _, leaf in stopped.reads)]
    leaves = [leaf for leaf, _ in stopped.stops]
    found = gradient(outputs, [*wanted, *leaves], cotangents, retain_graph=True)
    for number in reversed(range(len(leaves))):
        place = len(wanted) + number
        more = gradient([stopped.stops[number][1]], [*wanted, *leaves[:number]], [found[place]], retain_graph=True)
        found[:place] = [one + other for one, other in zip(found, more, strict=False)]
    cotangents = found[len(inputs) : len(wanted)]
    reads = [
        TeacherRead(name, *how, cotangent)
        for (name, _), how, cotangent in zip(stopped.reads, stopped.hows, cotangents, strict=True)
    ]
    return found[: len(inputs)], reads
