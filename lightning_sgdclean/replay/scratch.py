# SPDX-License-Identifier: Apache-2.0
"""Buffers that training moves and nothing reads: scratch memory, such as the noise of a Bayesian layer, or logs.

What is overwritten before it is read carries nothing from one step to the next. That is proved, at no cost, at every
step: such buffers hold NaN before each evaluation, so whatever reads them is not finite.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_sgdclean.base.errors import SGDInfluenceError
from lightning_sgdclean.losses.evaluate import RecordedBatch
from lightning_sgdclean.losses.running_statistics import buffer_is_read
from lightning_sgdclean.replay.replay import Replay
from lightning_sgdclean.trajectory.records import State, Step, same


def scratch_buffers(replay: Replay, step: Step, states_of: Callable[[], list[State]]) -> frozenset[str]:
    """Names of the buffers of floats that training moves though a step does not read them.

    Running statistics of torch's norms are none: they are followed. Whether the other steps and the objective read
    them is seen there.

    Args:
        replay: The live module, which may take on the last of the states.
        step: The step to try.
        states_of: Gives some of the run's states, between which a buffer has moved if it does at all.

    Raises:
        ReplayMismatchError: If the step's batch is not the recorded one.
    """
    names = _candidates(replay.module)
    states = states_of() if names else []
    names = [name for name in names if not all(same(one, states[-1], name) for one in states)]
    if not names:
        return frozenset()
    replay.load(states[-1])
    batch = replay.batch(step, 0)
    found = names if _is_unread(batch, names) else [name for name in names if _is_unread(batch, [name])]
    return frozenset(found)


def _candidates(module: nn.Module) -> list[str]:
    norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._NormBase)]
    followed = {id(buffer) for part in norms for buffer in part.buffers(recurse=False)}
    return [name for name, one in module.named_buffers() if one.is_floating_point() and id(one) not in followed]


def _is_unread(batch: RecordedBatch, names: Sequence[str]) -> bool:
    other = batch.elsewhere()
    other.scratch = frozenset(names)
    try:
        with torch.no_grad():
            return bool(torch.isfinite(other.evaluate_under(None, other.weights()).loss))
    except SGDInfluenceError:
        raise
    except Exception:  # theirs: NaN where their code wants a number, so it reads it
        return False


@contextmanager
def refusing_reads(step: Step, before: State, batches: list[RecordedBatch], replay: Replay) -> Iterator[list[Tensor]]:
    """Within the block a step is evaluated, whose losses are finite on record: nothing of it may read scratch buffers.

    Args:
        step: The step.
        before: The state before it.
        batches: Its micro-batches.
        replay: The live module, which takes on the state ``before`` where something is read.

    Yields:
        A list that takes in what was computed.

    Raises:
        UnsupportedTrainingError: If something is read, naming the buffer.
    """
    computed: list[Tensor] = []
    try:
        yield computed
    except Exception:  # theirs, too: NaN where their code wants a number
        _name_what_is_read(step, before, batches, replay)
        raise
    if replay.scratch and not all(bool(torch.isfinite(value).all()) for value in computed):
        _name_what_is_read(step, before, batches, replay)


def _name_what_is_read(step: Step, before: State, batches: list[RecordedBatch], replay: Replay) -> None:
    for name in sorted(replay.scratch):
        replay.load(before)
        if not all(_is_unread(batch, [name]) for batch in batches):
            raise buffer_is_read(name, f"step {step.index}")
