# SPDX-License-Identifier: Apache-2.0
"""A fit while it is recorded: what the callback's hooks hand over, in the order of a run.

Retraces nothing; what is to be proved or rehearsed on the way, the callback brings along.
"""

# What other wings may take, each name from the room that defines it. Nothing is imported here, so that looking at a
# run does not wait for torch.
__all__ = [
    "EarlyFindings",
    "Recording",
    "TrainLoaders",
    "has_steps_left",
]
