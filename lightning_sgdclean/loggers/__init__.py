# SPDX-License-Identifier: Apache-2.0
"""The ranking handed to the Trainer's loggers: one module a logger, and :mod:`.publish` that asks them all."""
