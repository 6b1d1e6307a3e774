# SPDX-License-Identifier: Apache-2.0
"""Pages of measurements: whether their figures are those that were measured, however the words around them read."""

import re
from collections import Counter

RULE = re.compile(r"^\|[-:| ]+\|$")


def tables(text):
    """The cells of each row of its tables."""
    rows = [line for line in text.splitlines() if line.startswith("|") and not RULE.match(line)]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def numbers(text):
    """How often each number stands outside of its tables."""
    words = "\n".join(line for line in text.splitlines() if not line.startswith("|"))
    return Counter(re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?!\w)", words))


def assert_figures_are(page, measured):
    """Every row, and every number in words, of the page that is made of what was measured stands on this one."""
    assert tables(measured)
    assert tables(page) == tables(measured)
    assert numbers(measured) - numbers(page) == Counter()
