# SPDX-License-Identifier: Apache-2.0
"""Adapters of peft on a frozen model of transformers."""

from functools import partial

import pytest
from peft import LoraConfig, get_peft_model
from sentences import SENTENCES
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from cases import NUM_CLASSES, Case, Plain, adam
from lightning_sgdclean.base.errors import UnsupportedOperationError
from lightning_sgdclean.trajectory.store import Trajectory
from reference import assert_influence_is_the_derivative, ranked

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


class Adapted(nn.Module):
    """BERT with low-rank adapters; only these and the classifier are trained."""

    def __init__(self, **options):
        super().__init__()
        shape = {"vocab_size": 12, "max_position_embeddings": 6, "hidden_size": 8, "num_hidden_layers": 2}
        model = BertForSequenceClassification(
            BertConfig(num_labels=NUM_CLASSES, num_attention_heads=2, intermediate_size=12, **shape)
        )
        self.model = get_peft_model(
            model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"], lora_dropout=0.1, **options)
        )
        for name, param in self.model.named_parameters():
            if "lora_B" in name:  # they start at zero, where the other factor has no gradient yet
                nn.init.normal_(param, std=0.1)

    def forward(self, ids):
        return self.model(input_ids=ids, attention_mask=(ids != 0).long()).logits


CASE = Case("adapted", {"net": Adapted, "make_optimizer": adam}, **SENTENCES)


def test_influence_is_the_derivative_of_the_whole_fit():
    assert_influence_is_the_derivative(CASE)


def test_only_what_is_trained_is_recorded():
    recorded = Trajectory(ranked(CASE).run_dir / "trajectory").state(0).params
    trained = {name for name, param in Plain(net=Adapted).named_parameters() if param.requires_grad}
    assert set(recorded) == trained
    assert all("lora" in name or "classifier" in name for name in trained)


def test_dora_is_refused_for_its_norm_is_detached():
    with pytest.raises(UnsupportedOperationError, match="stops gradients"):
        ranked(Case("DoRA", {"net": partial(Adapted, use_dora=True), "make_optimizer": adam}, **SENTENCES))
