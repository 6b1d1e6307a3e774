# SPDX-License-Identifier: Apache-2.0
"""Retraces one step while training is young: what could not be followed ends it now, not after hours."""

from dataclasses import replace
from typing import Any

import torch

from lightning_sgdclean.adjoint.adjoints import Adjoint
from lightning_sgdclean.adjoint.backward import retrace_step
from lightning_sgdclean.adjoint.walk import walk_of
from lightning_sgdclean.base.lightning import Hooks
from lightning_sgdclean.base.options import Options
from lightning_sgdclean.base.randomness import untouched_randomness
from lightning_sgdclean.data.batches import cloned, summable
from lightning_sgdclean.losses.module_state import untouched_module
from lightning_sgdclean.losses.surroundings import Surroundings
from lightning_sgdclean.losses.verified import VerifiedSplit
from lightning_sgdclean.replay.fidelity import compare
from lightning_sgdclean.replay.forward import borrowed, live_state, load_all, repeat_step
from lightning_sgdclean.replay.replay import replay_of
from lightning_sgdclean.replay.scratch import scratch_buffers
from lightning_sgdclean.trajectory.records import KeptStep


def rehearse(
    kept: KeptStep,
    module: Any,
    optimizer: Any,
    surroundings: Surroundings,
    options: Options,
    hooks: Hooks,
    split: VerifiedSplit | None,
    *,
    forward: bool = False,
) -> list[str]:
    """Retrace an early step from an arbitrary adjoint, and if need be repeat it forward.

    The module, its optimizer and the random state stay as they are.

    Args:
        kept: The step, with its batches and the states around it.
        module: The LightningModule.
        optimizer: Its optimizer.
        surroundings: What stands for the Trainer.
        options: The callback's.
        hooks: Hooks of the user's.
        split: What was proved of the loss on the first batch.
        forward: Whether steps will have to be repeated forward.

    Returns:
        Complaints, where mismatches are only warned about.

    Raises:
        SGDInfluenceError: What the retrace of the whole window would raise at this step.
    """
    step, before, after = kept.step, kept.before, kept.after
    with (
        torch.enable_grad(),
        untouched_randomness(surroundings.device),
        untouched_module(module, checks=True) as restore,
        surroundings.as_stage("train"),
    ):
        replay = replay_of(
            module,
            optimizer,
            surroundings,
            options,
            hooks,
            content_of=lambda step, i: cloned(kept.batches[i]),  # a training_step may write into its batch
            random_of=lambda step, i: step.micro[i].random,
            restore=restore,
            split=split,
        )
        replay = replace(replay, scratch=scratch_buffers(replay, step, lambda: [before, after]))
        ones = {name: torch.ones_like(summable(param.detach())) for name, param in replay.params.items()}
        walk = walk_of(replay, optimizer, options)
        retrace_step(step, before, after, [Adjoint(ones, {}, {})], walk, check_update=True)
        if forward:
            replay.teachers.check_repeatable()
            with borrowed(optimizer) as own:
                load_all(replay, own, before)
                repeat_step(step, replay, own)
                replay.fidelity.compare_segment(
                    [step], *compare(live_state(replay, own), after, before, replay.scratch)
                )
    return replay.fidelity.complaints
