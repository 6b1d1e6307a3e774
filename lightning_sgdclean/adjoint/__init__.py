# SPDX-License-Identifier: Apache-2.0
"""The walk back: objective, curvature, the optimizers' transposed steps, an influence for every sample."""

# What other wings may take, each name from the room that defines it. Nothing is imported here, so that looking at a
# run does not wait for torch.
__all__ = [
    "Adjoint",
    "Bookmark",
    "Finite",
    "GaussNewton",
    "Gradients",
    "Influences",
    "ObjectiveGradient",
    "SanityCheck",
    "Update",
    "Walk",
    "adjoint_of",
    "check_at_end",
    "clipped",
    "compare_where_unsure",
    "compare_with_logged",
    "float32_agreement",
    "is_elementwise",
    "key_of",
    "objective_values",
    "objectives_at",
    "register_update",
    "rehearse",
    "retrace_steps",
    "update_of",
    "walk_of",
]
