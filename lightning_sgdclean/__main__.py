# SPDX-License-Identifier: Apache-2.0
"""``python -m lightning_sgdclean``: the command line without its script."""

import sys

from lightning_sgdclean.cli import main

if __name__ == "__main__":
    sys.exit(main())
