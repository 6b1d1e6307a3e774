# SPDX-License-Identifier: Apache-2.0
"""What is done with a ranking: decisions applied, samples left out of a training, and whether that gains anything."""

# What other wings may take, each name from the room that defines it. Nothing is imported here, so that looking at a
# run does not wait for torch.
__all__ = [
    "Cleansed",
    "Training",
    "apply_decisions",
    "cleanse",
]
