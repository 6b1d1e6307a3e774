# SPDX-License-Identifier: Apache-2.0
"""Other ways to suspect training samples: each returns one number a sample, high = bad."""
