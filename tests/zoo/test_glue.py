# SPDX-License-Identifier: Apache-2.0
"""Lightning's GLUE tutorial: a transformer that computes its own loss, AdamW in two groups, a linear schedule.

Outputs are collected in ``validation_step`` and logged at the end of the epoch, as the tutorial does. The data are made
up, and nothing is downloaded.
"""

import torch
from sentences import SENTENCES
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from transformers import AutoModelForSequenceClassification, BertConfig, get_linear_schedule_with_warmup

from cases import NUM_CLASSES, Case, Plain
from reference import assert_influence_is_the_derivative

SHAPE = {"vocab_size": 12, "max_position_embeddings": 6, "hidden_size": 8, "num_hidden_layers": 2}
CONFIG = BertConfig(num_labels=NUM_CLASSES, num_attention_heads=2, intermediate_size=12, **SHAPE)


class GLUETransformer(Plain):
    def __init__(self):
        super().__init__(net=lambda: AutoModelForSequenceClassification.from_config(CONFIG))
        self.validation_step_outputs = []

    def forward(self, **inputs):
        return self.net(**inputs)

    def loss(self, batch, reduction="mean"):
        ids, labels, _ = batch
        mask = (ids != 0).long()
        if reduction == "mean":
            return self(input_ids=ids, attention_mask=mask, labels=labels)[0]
        return F.cross_entropy(self(input_ids=ids, attention_mask=mask).logits, labels, reduction=reduction)

    def training_step(self, batch, batch_idx):
        if self.sample_weights is None:
            return self.loss(batch)
        return (self.loss(batch, "none") * self.sample_weights[batch[-1]]).mean()

    def validation_step(self, batch, batch_idx):
        ids, labels, _ = batch
        val_loss, logits = self(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels)[:2]
        self.validation_step_outputs.append({"loss": val_loss, "preds": logits.argmax(1), "labels": labels})
        return val_loss

    def on_validation_epoch_end(self):
        outputs = self.validation_step_outputs
        preds = torch.cat([each["preds"] for each in outputs]).numpy()
        labels = torch.cat([each["labels"] for each in outputs]).numpy()
        self.log("val_loss", torch.stack([each["loss"] for each in outputs]).mean(), prog_bar=True)
        self.log_dict({"accuracy": float((preds == labels).mean())}, prog_bar=True)
        outputs.clear()

    def configure_optimizers(self):
        no_decay = ["bias", "LayerNorm.weight"]
        named = [*self.net.named_parameters()]
        groups = [
            {"params": [p for n, p in named if not any(part in n for part in no_decay)], "weight_decay": 0.1},
            {"params": [p for n, p in named if any(part in n for part in no_decay)], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=0.01, eps=1e-4)
        total = self.trainer.estimated_stepping_batches
        schedule = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=2, num_training_steps=total)
        return [optimizer], [{"scheduler": schedule, "interval": "step", "frequency": 1}]


def test_influence_is_the_derivative_of_the_whole_fit():
    val = TensorDataset(*SENTENCES["val"][:8])  # two batches of one size: the tutorial's mean weighs them alike
    case = Case("GLUE", make=GLUETransformer, train=SENTENCES["train"], val=val)
    assert_influence_is_the_derivative(case, 1e-6)
