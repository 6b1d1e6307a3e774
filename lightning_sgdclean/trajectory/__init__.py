# SPDX-License-Identifier: Apache-2.0
"""A recorded run as plain data, and on disk.

Steps, states and the schedules by which states are kept; written while a fit goes on, read back by a retrace.
"""

# What other wings may take, each name from the room that defines it. Nothing is imported here, so that looking at a
# run does not wait for torch.
__all__ = [
    "CheckpointMark",
    "FitEnd",
    "Following",
    "FrozenParameters",
    "KeptStep",
    "LiveState",
    "MicroBatch",
    "Move",
    "State",
    "States",
    "Step",
    "Trajectory",
    "TrajectoryWriter",
    "copied",
    "counted_options",
    "current_state",
    "first_epoch_kept",
    "fit_of",
    "flatten",
    "followings",
    "hyper_parameters",
    "interval_of",
    "is_fixed",
    "is_plain",
    "join",
    "nudged",
    "num_snapshots",
    "options_for",
    "partner_at_rest",
    "pull_back_following",
    "read_ending",
    "repeated_steps",
    "reversal",
    "revolve",
    "same",
    "states_around",
    "steps_written",
    "teachers_of",
    "trained_parameters",
    "unflatten",
    "window_in_words",
    "without_mark",
    "write_ending",
    "write_options",
]
