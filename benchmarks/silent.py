# SPDX-License-Identifier: Apache-2.0
"""A Trainer on the CPU that shows and writes nothing, so that only the training is measured."""

import pytorch_lightning as pl


def silent_trainer(max_epochs, callbacks, **options):
    """As ``pl.Trainer``, with these options besides."""
    return pl.Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        **options,
    )
