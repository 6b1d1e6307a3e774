# SPDX-License-Identifier: Apache-2.0
"""Teachers while steps are repeated: what ``training_step`` does not do to them itself, hooks did, and is done here."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_sgdclean.base.errors import RunDirectoryError, UnsupportedTrainingError
from lightning_sgdclean.losses.evaluate import RecordedBatch
from lightning_sgdclean.trajectory.records import State, Step, same
from lightning_sgdclean.trajectory.teachers import Following, followings, partner_at_rest, pull_back_following

Place = Literal["within", "before", "after"]


@dataclass(eq=False)
class Teachers:
    """The teachers of a live module.

    Attributes:
        live: Parameters that may be teachers, by name; once the record was looked at, those that move.
        kept: Gives a state of the record that was kept, by the number of the step that it lies before.
        place: Where the run moves them: within ``training_step``, or by a hook before or after it; None: not yet known.
        began: What they held when a state was loaded last.
    """

    live: dict[str, nn.Parameter] = field(default_factory=dict)
    kept: Callable[[int], State] | None = None
    place: Place | None = None
    began: dict[str, Tensor] = field(default_factory=dict)
    _known: dict[int, dict[str, Following]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._all = dict(self.live)

    def how(self, step: Step, before: State, after: State) -> dict[str, Following]:
        """How a step moves each of them.

        Raises:
            UnsupportedTrainingError: If that is not followed.
        """
        if step.index not in self._known:
            moved = {name: after.buffers[name] for name in self.live if name in after.buffers}
            self._known[step.index] = followings(moved, before.buffers, before.params, after.params)
        return self._known[step.index]

    def settle(
        self, step: Step, before: State, after: State, load: Callable[[State], None], batches: list[RecordedBatch]
    ) -> None:
        """Find out where they are moved, if that is not known and the step moves them.

        Args:
            step: The step.
            before: The state before it.
            after: The state after it.
            load: Has the live module take on a state.
            batches: The step's micro-batches.
        """
        if self.place is not None or not any(one.moves for one in self.how(step, before, after).values()):
            return
        load(before)
        as_before = _off(batches, step)
        if any(not torch.equal(now, before.buffers[name].to(now)) for name, now in self.live.items()):
            self.place = "within"
            return
        load(before)
        self.put(after)
        self.place = "before" if as_before and _off(batches, step) < as_before else "after"

    def begin(
        self, step: Step, before: State, after: State, load: Callable[[State], None], batches: list[RecordedBatch]
    ) -> None:
        """Have the live module be as ``training_step`` finds it; arguments as for :meth:`settle`."""
        self.settle(step, before, after, load, batches)
        load(before)
        if self.place == "before":
            self.put(after)

    @torch.no_grad()
    def put(self, state: State) -> None:
        """Have them take on what they are in a state, for steps to begin with."""
        for name, param in self._all.items():
            if name in state.buffers:
                param.copy_(state.buffers[name])
        self.began |= {name: param.detach().clone() for name, param in self.live.items()}

    def pull_back(self, how: dict[str, Following], adjoints: Sequence[Any]) -> Callable[[], None]:
        """Begin to take adjoints back over how a step moves teachers.

        Args:
            how: That.
            adjoints: With ``params`` and ``buffers`` by name, written to in place.

        Returns:
            What ends it, to be called when they were taken back over all else that the step does.
        """
        is_first = self.place == "before"  # then it comes last on the way back
        early = [[] if is_first else pull_back_following(how, adjoint.buffers) for adjoint in adjoints]
        _add(adjoints, early, is_new=True)

        def finish() -> None:
            late = [pull_back_following(how, adjoint.buffers) for adjoint in adjoints] if is_first else early
            _add(adjoints, late, is_new=False)

        return finish

    def check(self, step: Step, before: State, after: State) -> None:
        """Has ``training_step`` left them as it should have?

        Raises:
            UnsupportedTrainingError: If they are moved both by it and by a hook.
        """
        for name, now in self.live.items() if self.place is not None else ():
            wanted = (before if self.place == "after" else after).buffers[name].to(now)
            off = (now.detach() - wanted).abs()
            if bool((off > _ROUNDINGS * torch.finfo(now.dtype).eps * wanted.abs()).any()):
                raise UnsupportedTrainingError(
                    f"The parameter {name!r} moved in step {step.index} otherwise than in another step: both in "
                    "training_step and in a hook, it seems. Move it in one of them only."
                )

    def check_repeatable(self) -> None:
        """Can steps be repeated whose states were not kept?

        Raises:
            UnsupportedTrainingError: If a hook moves them.
        """
        if self.place in ("before", "after"):
            raise _between_snapshots()

    def settle_by_record(
        self, kept: Callable[[int], State], states_of: Callable[[], list[State]], steps: Sequence[Step], replay: Any
    ) -> None:
        """See which of them move, and :meth:`settle` by one of the last steps between two states that were kept.

        Args:
            kept: Gives a state that was kept, by the number of the step that it lies before.
            states_of: Gives some of these, between which teachers move if they do at all.
            steps: The window.
            replay: Its replay.
        """
        self.kept = kept
        states = states_of() if self.live else []
        still = {name for name in self.live if all(same(one, states[-1], name) for one in states)}
        some_move = still < self.live.keys()  # beside those, one that stays may be a teacher whose partner rests
        for name in still:
            rests = all(partner_at_rest(name, one.buffers[name], one.params) for one in states)
            if not (some_move and rests):
                del self.live[name]
        for step in steps[: -_LAST - 1 : -1] if self.live else ():
            with suppress(RunDirectoryError):
                pair = kept(step.index), kept(step.index + 1)
                batches = [replay.batch(step, number) for number in range(len(step.micro))]
                self.settle(step, *pair, replay.load, batches)
            if self.place is not None:
                return

    def move(self, step: Step, params: Mapping[str, Tensor], *phases: tuple[Place, bool]) -> None:
        """Do what a hook did to them, when a step is repeated forward.

        Args:
            step: The step.
            params: The trained parameters, as they are now.
            phases: Which hooks: their places, and whether they took parameters as they are after the step.

        Raises:
            UnsupportedTrainingError: If it cannot be known what a hook did, since states were not kept.
        """
        if not self.live or self.place in (None, "within"):
            return
        with torch.no_grad():
            for name, one in self._hooked(step).items():
                if one.moves and (self.place, one.is_new) in phases:
                    teacher = self.live[name]
                    teacher.copy_(one.own * teacher + one.share * params[one.partner])

    def _hooked(self, step: Step) -> dict[str, Following]:
        if step.index not in self._known:
            try:
                assert self.kept is not None
                self.how(step, self.kept(step.index), self.kept(step.index + 1))
            except RunDirectoryError as error:
                raise _between_snapshots() from error
        return self._known[step.index]


def _between_snapshots() -> UnsupportedTrainingError:
    return UnsupportedTrainingError(
        "A hook moves parameters that the optimizer does not hold (a teacher, an average of the weights), so steps "
        'between snapshots cannot be repeated. Move them in training_step, or use snapshots="every".'
    )


def _add(adjoints: Sequence[Any], added: list[list[tuple[Following, Tensor]]], is_new: bool) -> None:
    for adjoint, some in zip(adjoints, added, strict=True):
        for one, tensor in some:
            if one.is_new == is_new:
                adjoint.params[one.partner] = adjoint.params[one.partner] + tensor


_ROUNDINGS = 64
_LAST = 16  # steps to try


def _off(batches: list[RecordedBatch], step: Step) -> float:
    """How far the losses are from the recorded ones, when training_step is called again."""
    with torch.no_grad():
        losses = [
            float(batch.call()) / step.divisor * micro.scale for batch, micro in zip(batches, step.micro, strict=True)
        ]
    return sum(
        abs(loss - float(micro.loss)) for loss, micro in zip(losses, step.micro, strict=True) if micro.loss is not None
    )
