# SPDX-License-Identifier: Apache-2.0
"""The page ``report.html``: what it shows of a run, and how it is written."""
