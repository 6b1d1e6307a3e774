# SPDX-License-Identifier: Apache-2.0
"""A wing of the house."""
