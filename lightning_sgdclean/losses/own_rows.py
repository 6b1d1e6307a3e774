# SPDX-License-Identifier: Apache-2.0
"""The rows of a loss that is written by hand, found in its graph.

From the loss down, its graph is followed through sums, means and constants, as far as one number stands for the whole
batch. What is found below them are the parts: tensors of which the loss is a sum. A part with an entry or a block a
sample has rows. It is the highest such tensor that is taken, since a term that is the same for all samples (the
logarithm of a learned scale) belongs to each sample's loss once it has been added to the rows.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

from lightning_sgdclean.base.errors import LossSplitError
from lightning_sgdclean.data.batches import leaves_of
from lightning_sgdclean.losses.loss_functions import SIGNATURES, OwnerRule, Picked, owners_by, owners_picked, rows_of
from lightning_sgdclean.losses.weighting import Part, RowOwners, SampleWeights, SplitPlan, name_of

KIND = "rows"  # what stands in place of a reduction where a call is none of torch's losses
_RESHAPING = {"View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Alias", "Permute", "Transpose", "T"}
_SUMMING = {"Add", "Sub", "Rsub"}
_SCALING = {"Mul", "Div"}
_LINEAR = {"Sum", "Mean", "Neg", "Clone", "ToCopy"} | _RESHAPING | _SUMMING | _SCALING
_JOINING = {"Cat", "Stack"}
_MOST = 10_000  # parts


def is_own(plan: SplitPlan | None) -> bool:
    """Whether a plan is one of rows that are found in the graph."""
    return bool(plan) and plan is not None and plan[0].opened is not None


def weights_under(
    plan: SplitPlan | None,
    weights: Tensor,
    references: dict[int, Tensor] | None = None,
    sizes: Sequence[int] = (),
) -> SampleWeights:
    """What gives the rows of a step their samples' weights under a plan."""
    if plan is not None and is_own(plan):
        return OwnRows(weights, plan, sizes)
    return SampleWeights(weights, plan, references, sizes)


@dataclass
class _Edge:
    """A value in the graph: the ``number``-th that ``node`` gives.

    Attributes:
        pull: By how much the loss grows with each of its entries: the same for all of them, as the way down is made.
        path: What the way down went through.
    """

    node: Any
    number: int
    pull: Tensor
    path: str = ""
    needs_owners: bool = False
    is_factor: bool = False

    @property
    def operation(self) -> str:
        return re.sub(r"Backward\d*$", "", self.node.name())

    @property
    def is_leaf(self) -> bool:
        return hasattr(self.node, "variable")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.node._input_metadata[self.number].shape)

    @property
    def below(self) -> list[tuple[Any, int]]:
        return [(node, number) for node, number in self.node.next_functions if node is not None]

    @property
    def name(self) -> str:
        return f"{self.path}/{self.operation}"


class OwnRows(SampleWeights):
    """Weighs the rows that are found in a loss's graph, after it was computed.

    As the loss is ``sum_k p_k sum(rows_k)`` and some rest, with ``p_k`` that do not depend on the samples' losses,
    the weighted one is ``loss + sum_k p_k sum((w - 1) rows_k)``: the loss itself, to the last bit, where all
    weights are one. Torch's own losses are computed with their rows, which are parts as well.

    Args:
        weights: ``(B,)``.
        plan: Whose the parts are; it also says below which of them to look for rows.
        sizes: As for the class that this one extends.

    Attributes:
        rows_of_torch: The rows of torch's losses, in the order of the calls, without graph.
    """

    def __init__(self, weights: Tensor, plan: SplitPlan | None, sizes: Sequence[int] = ()) -> None:
        super().__init__(weights, plan, sizes=sizes)
        self._opened = (plan[0].opened if plan else None) or frozenset()
        self._num = len(weights)
        self._made: dict[tuple[Any, int], tuple[Tensor, int]] = {}  # with how often they had been written to
        self._orders: dict[int, tuple[Tensor, Tensor]] = {}  # samples of sorted tensors, by address
        self._picks: list[dict[OwnerRule, Tensor]] = []
        self._of_samples: dict[int, Tensor] = {}  # what was made of the batch, by address
        self._is_of_samples = False  # what is being made
        self.rows_of_torch: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Remember the tensors that are made, which of them are made of the samples, and what picks rows."""
        given, name = tree_leaves((args, kwargs)), getattr(func, "__name__", "")
        self._remember(given)  # one that was written to is not what it was when it was made
        self._is_of_samples = any(id(value) in self._of_samples for value in given)
        if func in SIGNATURES:
            output = super().__torch_function__(func, types, args, kwargs)
        else:
            output = func(*args, **(kwargs or {}))
        self._remember([*tree_leaves(output), *(args[:1] if name == "__setitem__" else ())], self._is_of_samples)
        with torch._C.DisableTorchFunction():
            self._look_at_pick(name, args, kwargs or {}, output)
        return output

    def begin(self, batch: Any) -> None:
        """Look at the batch that ``training_step`` is about to get."""
        for leaf in leaves_of(batch):
            if isinstance(leaf, Tensor):
                self._of_samples[id(leaf)] = leaf
        for sequences in tree_leaves(batch, lambda part: isinstance(part, PackedSequence)):
            if isinstance(sequences, PackedSequence):
                self._note_packed(sequences.batch_sizes, sequences.sorted_indices)

    def _remember(self, values: list[Any], of_samples: bool = False) -> None:
        tensors = [value for value in values if isinstance(value, Tensor)]
        self._of_samples |= {id(tensor): tensor for tensor in tensors} if of_samples else {}
        with torch._C.DisableTorchFunction():
            for tensor in tensors:
                if tensor.grad_fn is not None:
                    self._made[tensor.grad_fn, tensor.output_nr] = tensor, tensor._version

    def _note_packed(self, batch_sizes: Tensor, order: Tensor | None) -> None:
        samples, sizes = torch.arange(self._num) if order is None else order.cpu(), batch_sizes.tolist()
        if sizes and sizes[0] == self._num:
            self._picks.append({OwnerRule(0, outer=1): torch.cat([samples[:size] for size in sizes])})

    def _weighted(self, func: Any, options: dict[str, Any]) -> Tensor:
        rows, value, divisor = rows_of(func, options)
        self._remember([rows], self._is_of_samples)
        self.rows_of_torch.append(rows.detach())
        if value is None:
            return rows
        if isinstance(divisor, Tensor) and divisor.ndim:
            rows, divisor = rows / divisor, 1
            self._remember([rows], self._is_of_samples)
        total = rows.sum() / divisor
        return total + (value - total).detach()

    def _look_at_pick(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Note whose the rows are that a mask, indices or the packing of sequences picked."""
        if name == "_pack_padded_sequence":
            self._note_packed(output[1], self._orders.get(id(args[0]), (None, None))[1])
            return
        source = args[0] if args else None
        if name == "index_select" and isinstance(output, Tensor):
            dim, index = kwargs.get("dim", args[min(1, len(args) - 1)]), kwargs.get("index", args[-1])
            if output.shape[dim] == self._num == args[0].shape[dim]:
                self._orders[id(output)] = output, index.detach().cpu()
            picks: Any = index if dim == 0 else None
        elif name in ("__getitem__", "masked_select"):
            picks = args[1] if len(args) > 1 else kwargs.get("mask")
        else:
            return
        if isinstance(source, Tensor) and source.ndim:
            found = dict(owners_picked(source.shape, picks, self._num))
            self._picks += [found] if found else []

    def weighted(self, loss: Tensor) -> Tensor:
        """The loss as a function of the weights.

        Args:
            loss: As ``training_step`` gave it within this mode.

        Raises:
            LossSplitError: If it has no graph although samples are weighted, or one that cannot be followed.
        """
        if loss.grad_fn is None:
            if torch.is_grad_enabled() or bool((self._weights != 1).any()):
                raise LossSplitError("The training loss has no graph in which its samples' rows could be found.")
            return loss  # nobody can ask for the derivative
        for part, pull in self._parts(loss):
            known = self._known(part.call)
            part.owners = None if known is None or part.is_factor else self._owners_of(known, part)
            if part.owners is not None:
                rows = part.entering
                part.entering = rows * self._weights.to(rows.dtype)[part.owners]
                loss = loss + (pull * (part.entering - rows)).sum().to(loss.dtype)
            self.calls.append(part)
        for kept in (self._made, self._orders, self._of_samples):
            kept.clear()
        return loss

    def _owners_of(self, known: RowOwners, part: Part) -> Tensor | None:
        if not known.rules:
            return None
        picks = [part.picked.get(rule) for rule in known.rules if isinstance(rule, Picked)]
        if not picks or self._num == 1:
            owners = owners_by(known.rules, part.rows.shape, self._num, self._sizes)
        else:
            owners = picks[0]
            if owners is None or any(other is None or not torch.equal(owners, other) for other in picks):
                return None
            owners = owners.view(-1, *[1] * (part.rows.ndim - 1))
        return None if owners is None else owners.to(part.rows.device)

    def _parts(self, loss: Tensor) -> Iterator[tuple[Part, Tensor]]:
        """The parts and their pulls; those that were made alike, as by a loop over the samples, together."""
        alike: dict[str, list[tuple[_Edge, Tensor]]] = {}
        edges = _Edge(loss.grad_fn, loss.output_nr, torch.ones_like(loss))
        for number, (edge, tensor) in enumerate(self._found(edges)):
            if number == _MOST:
                raise LossSplitError(f"The training loss is a sum of more than {_MOST} parts.")
            alike.setdefault(f"{edge.name}|{tensor.ndim}|{edge.is_factor}", []).append((edge, tensor))
        for group in alike.values():
            if len(group) == 1 or f"{group[0][0].name}|apart" in self._opened:
                for number, (edge, tensor) in enumerate(group):
                    name = f"{edge.name}|{number}" if number else edge.name
                    yield self._part(edge, name, tensor, self._openings(edge, tensor)), _first(edge.pull)
            else:
                yield self._joined([edge for edge, _ in group], [tensor for _, tensor in group])

    def _joined(self, edges: list[_Edge], tensors: list[Tensor]) -> tuple[Part, Tensor]:
        """Parts that are alike as rows of one: each is a row, or else they are put together."""
        first, pulls = edges[0], [_first(edge.pull) for edge in edges]
        one_by_one = tensors[0].ndim == 0 or len({tensor.shape[1:] for tensor in tensors}) > 1
        if one_by_one or f"{first.name}|joined" not in self._opened:
            rows = torch.stack([tensor.sum() for tensor in tensors])
            openings = (f"{first.name}|{'apart' if one_by_one else 'joined'}",)
            factors = torch.stack(pulls)
            name = f"{first.name}|each"
        else:
            rows, openings, name = torch.cat(tensors), (f"{first.name}|apart",), f"{first.name}|joined"
            factors = torch.cat([p.expand(len(t)) for p, t in zip(pulls, tensors, strict=True)])
        part = self._part(first, name, rows, self._openings(first, tensors[0]) if first.is_factor else openings)
        part.members = [
            (len(t) if rows.ndim == tensors[0].ndim and name.endswith("joined") else 1, id(t) in self._of_samples)
            for t in tensors
        ]
        return part, factors.view(-1, *[1] * (rows.ndim - 1))

    def _part(self, edge: _Edge, name: str, rows: Tensor, openings: tuple[str, ...]) -> Part:
        picked = {
            Picked(rule.dim, rule.inner, rule.outer, number=number): owners
            for number, found in enumerate(self._picks)
            for rule, owners in found.items()
            if rows.ndim and rows.shape[0] == len(owners)
        }
        return Part(
            (name, KIND, rows.ndim),
            *(rows.detach(), rows, None, self._num, openings, edge.needs_owners, edge.is_factor, picked),
            joins=edge.operation in _JOINING,
        )

    def _found(self, start: _Edge) -> Iterator[tuple[_Edge, Tensor]]:
        """The parts, in the order in which they were added."""
        todo = [start]
        while todo:
            edge = todo.pop()
            tensor = self._tensor(edge)
            if not edge.is_factor and self._is_passed(edge, tensor):
                todo.extend(reversed(self._children(edge)))
                continue
            if tensor is None:
                raise LossSplitError(
                    f"A part of the training loss was not split by sample: {name_of((edge.name, KIND, 0))}, of shape "
                    f"{edge.shape}. It is made within a function of torch's own, or was compiled by torch.jit, so that "
                    "it cannot be got at."
                )
            yield edge, tensor

    def _tensor(self, edge: _Edge) -> Tensor | None:
        """The value itself; None where it was not seen, or was written to since."""
        if edge.is_leaf:
            variable: Tensor = edge.node.variable
            return variable
        tensor, version = self._made.get((edge.node, edge.number), (None, 0))
        is_live = tensor is not None and tensor.grad_fn is edge.node and tensor._version == version
        return tensor if is_live else None

    def _is_passed(self, edge: _Edge, tensor: Tensor | None) -> bool:
        if edge.is_leaf or (tensor is not None and tensor._backward_hooks):
            return False  # a hook may change the pull
        if len(edge.below) == 2 and edge.operation in _SCALING:
            return any(f"{edge.name}|{side}" in self._opened for side in (0, 1))
        if edge.shape == ():
            return edge.operation in _LINEAR
        return _can_be_opened(edge) and (edge.name in self._opened or tensor is None)

    def _openings(self, edge: _Edge, tensor: Tensor) -> tuple[str, ...]:
        if edge.is_factor:  # then the other one may be
            return (f"{edge.path}|1",) if edge.path.endswith("Mul") else ()
        if edge.is_leaf or tensor._backward_hooks:
            return ()
        if len(edge.below) == 2 and edge.operation in _SCALING:
            return (f"{edge.name}|0",) if prod(edge.shape) == 1 else ()
        return (edge.name,) if edge.shape and _can_be_opened(edge) else ()

    def _children(self, edge: _Edge) -> list[_Edge]:
        node, operation = edge.node, edge.operation
        pulls = node(*[edge.pull if n == edge.number else None for n in range(len(node._input_metadata))])
        pulls = pulls if isinstance(pulls, tuple) else (pulls,)
        chosen = next((side for side in (1, 0) if f"{edge.name}|{side}" in self._opened), None)
        is_product = operation in _SCALING and len(edge.below) == 2
        path = edge.name
        if operation in _SUMMING:  # one sum, however many steps it was made in
            path = edge.path if edge.path.endswith("/+") else f"{edge.path}/+"
        needs = edge.needs_owners or (prod(edge.shape) > 1 and operation in _SUMMING)
        return [
            _Edge(below, number, pull, path, needs, is_product and side != chosen)
            for side, ((below, number), pull) in enumerate(zip(node.next_functions, pulls, strict=True))
            if below is not None
        ]


def _can_be_opened(edge: _Edge) -> bool:
    """Whether the entries of a tensor are sums of entries below, each with one factor for all of them.

    A sum must not repeat one of its terms for several samples: the term would then be taken for a penalty.
    """
    operation = edge.operation
    if operation in _SUMMING:
        shapes = {_Edge(node, number, edge.pull).shape for node, number in edge.below}
        return shapes == {edge.shape} or prod(edge.shape) == 1
    if operation in _SCALING:
        side = [node is None for node, _ in edge.node.next_functions].index(True) if len(edge.below) == 1 else None
        if side is None or _Edge(*edge.below[0], edge.pull).shape != edge.shape:
            return False
        constant = getattr(edge.node, "_saved_self" if side == 0 else "_saved_other", None)
        return constant is not None and (not isinstance(constant, Tensor) or constant.numel() == 1)
    return operation in _LINEAR | _JOINING


def _first(pull: Tensor) -> Tensor:
    """The pull of any of the entries: it is the same for all."""
    return pull.reshape(-1)[:1].sum()
