# SPDX-License-Identifier: Apache-2.0
"""Recorded steps run forward again, and held against the record.

Opens a run, recomputes the states between its snapshots, and looks at samples with the weights of its end point.
"""

# What other wings may take, each name from the room that defines it. Nothing is imported here, so that looking at a
# run does not wait for torch.
__all__ = [
    "Borrowed",
    "Changes",
    "Fidelity",
    "OpenedRun",
    "RecordedRun",
    "Replay",
    "Seen",
    "Validation",
    "Weights",
    "accumulate",
    "borrowed",
    "compare",
    "inspect_samples",
    "live_state",
    "load_all",
    "losses_of",
    "opened",
    "predicted_labels",
    "prove_ids",
    "refusing_reads",
    "reopened",
    "repeat_step",
    "replay_of",
    "sample_columns",
    "scratch_buffers",
    "take_step",
]
