# SPDX-License-Identifier: Apache-2.0
from lightning_sgdclean.ranking.agreement import *  # noqa: F403
