# SPDX-License-Identifier: Apache-2.0
"""Files put into a logger's own folder, which may lie on a bucket."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def copy_files(logger: Any, files: Iterable[Path]) -> None:
    """Copy files to where the logger keeps its own; what is there already is left as it is.

    Args:
        logger: One with a ``log_dir``.
        files: What to copy.
    """
    # Lightning's loggers write through fsspec: log_dir may be an address (s3://...) and no folder here.
    from fsspec.core import url_to_fs  # type: ignore[import-untyped]

    filesystem, root = url_to_fs(str(logger.log_dir))
    filesystem.makedirs(root, exist_ok=True)
    for file in files:
        target = f"{root}/{file.name}"
        if os.path.exists(target) and os.path.samefile(file, target):
            continue  # the run directory is the logger's own
        filesystem.put_file(str(file), target)
