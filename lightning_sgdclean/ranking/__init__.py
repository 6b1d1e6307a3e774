# SPDX-License-Identifier: Apache-2.0
"""Rankings: their tables and files, how far they agree, what several say together, and their pictures.

Needs no recorded run.
"""

# What other wings may take, each name from the room that defines it. Nothing is imported here, so that looking at a
# run does not wait for torch.
__all__ = [
    "COLUMNS",
    "CSV_NAME",
    "SUFFIX",
    "Exhibit",
    "Ranking",
    "Table",
    "bin_edges",
    "compare",
    "data_frame",
    "effects_by_group",
    "guarded",
    "has_size",
    "kendall_tau",
    "plot_samples",
    "read_ranking",
    "read_rows",
    "run_id",
    "save_png",
    "spearman",
    "stretched_ticks",
    "top_k_jaccard",
    "unguarded",
    "worst_pictures",
    "write_rows",
    "written",
]
