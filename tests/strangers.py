# SPDX-License-Identifier: Apache-2.0
"""Files as a stranger could have made them: sealed like ours, but saying anything."""

import copy
from itertools import cycle, islice

from lightning_sgdclean.base.files import checksum_of, read_json, write_sealed

NONSENSE = (None, True, -1, 3, 2**70, 0.5, "x", "../../victim", [], [[]], {}, {"x": []})


def places(value, at=()):
    """The places of all values within a JSON value, the whole one's first."""
    yield at
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, held in inner:
        yield from places(held, (*at, key))


def with_value(content, at, value):
    """A copy in which something else stands in a place."""
    if not at:
        return value
    changed = held = copy.deepcopy(content)
    for key in at[:-1]:
        held = held[key]
    held[at[-1]] = value
    return changed


def each_with_nonsense(content, num_kinds=12):
    """A JSON value with each of its parts in turn replaced by so many kinds of nonsense, in turn, too."""
    kinds = cycle(NONSENSE)
    for at in places(content):
        for value in islice(kinds, num_kinds):
            yield at, with_value(content, at, value)


def content_of(path):
    """What a sealed file says, without its seal."""
    content = read_json(path)
    content.pop("checksum")
    return content


def seal_segments(folder):
    """Have the manifest say of its segments what they are by now."""
    content = content_of(folder / "manifest.json")
    for segment in content["segments"]:
        path = folder / segment["file"]
        segment["bytes"], segment["checksum"] = path.stat().st_size, checksum_of(path)
    write_sealed(folder / "manifest.json", content)
