# SPDX-License-Identifier: Apache-2.0
"""A LightningCLI: everything is in config.yaml.

Try it out first, in this folder, then train, then look::

    sgdclean check config.yaml
    python main.py fit --config config.yaml
    sgdclean show cleaning

The last one should list mostly samples below 20. It takes a few seconds.
"""

from lightning.pytorch.cli import LightningCLI

if __name__ == "__main__":
    LightningCLI()
