# SPDX-License-Identifier: Apache-2.0
"""What people see of a ranking: the page, the loggers, bars and words."""

# What other wings may take, each name from the room that defines it. Nothing is imported here, so that looking at a
# run does not wait for torch.
__all__ = [
    "PAGE_NAME",
    "PageOfRun",
    "closing_text",
    "publish",
    "replay_in_words",
    "retrace_bar",
    "runs_bar",
    "write_report",
]
