# SPDX-License-Identifier: Apache-2.0
"""Samples really left out of a recorded window, and how far a ranking can be trusted by that."""

# What other wings may take, each name from the room that defines it. Nothing is imported here, so that looking at a
# run does not wait for torch.
__all__ = [
    "Counterfactual",
    "Sizes",
    "card_of",
    "counterfactual",
    "put_to_the_test",
    "sizes_of",
]
