# SPDX-License-Identifier: Apache-2.0
from lightning_sgdclean.base.errors import *  # noqa: F403
