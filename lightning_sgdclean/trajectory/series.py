# SPDX-License-Identifier: Apache-2.0
"""Which states a segment holds, in short: the manifest is written anew with every segment, and names all of them."""

Kept = tuple[int, int]  # number of the step that a state lies before, and that of its layout


def in_short(states: list[Kept]) -> list[list[int]]:
    """States at equal distances and of one layout as rows of: first number, how many, distance, layout."""
    rows: list[list[int]] = []
    for index, layout in states:
        if rows and rows[-1][3] == layout:
            first, num, distance, _ = rows[-1]
            if num == 1 or index == first + num * distance:
                rows[-1][1:3] = num + 1, (index - first if num == 1 else distance)
                continue
        rows.append([index, 1, 1, layout])
    return rows


def in_full(rows: list[list[int]]) -> list[Kept]:
    """Undo :func:`in_short`."""
    return [(first + n * distance, layout) for first, num, distance, layout in rows for n in range(num)]
