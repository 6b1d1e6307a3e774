# SPDX-License-Identifier: Apache-2.0
"""Losses of tokens, where a sample is a whole sequence, against central differences of whole fits."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from cases import fit, quiet_trainer
from lightning_sgdclean import SGDInfluence
from lightning_sgdclean.base.errors import LossSplitError
from reference import assert_influence_is_the_derivative, influences, ranked
from token_losses import LENGTH, LOSSES, PAD, TRAIN, VAL, Reader, Recurrent, Tokens, case, flat, flattened, time_first


@pytest.mark.parametrize("name", LOSSES)
def test_a_sequence_is_one_sample_however_its_tokens_are_laid_out(name):
    plain, module = LOSSES[name]
    assert_influence_is_the_derivative(case(name, plain, **module))


@pytest.mark.parametrize("name", LOSSES)
def test_the_twin_is_one(name):
    plain, options = LOSSES[name]
    module, tokens = Tokens(plain, **options).double().eval(), TRAIN.tensors[0]
    torch.testing.assert_close(module.rows(tokens).sum(), plain(module, tokens), rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", [1, 2, LENGTH - 1])
@pytest.mark.parametrize(
    ("plain", "net"),
    [(time_first, Reader), (flattened, Recurrent), (flattened, Reader)],
    ids=["time first", "time first from a GRU", "flattened"],
)
def test_batches_of_one_sequence_and_of_as_many_as_tokens_are_followed(size, plain, net):
    sized = case("sizes", plain, {"batch_size": size}, net=net)
    sized.trainer["max_epochs"] = 1
    assert_influence_is_the_derivative(sized)


def test_finite_agrees_with_exact_on_token_losses():
    following = case("finite", time_first)
    exact = influences(ranked(following), len(TRAIN))
    finite = influences(ranked(following, curvature="finite", finite_radius=1e-3), len(TRAIN))
    assert abs(finite - exact).max() < 1e-3 * abs(exact).max()


def sorted_by_length(m, tokens):
    order = (tokens != PAD).sum(1).argsort(descending=True, stable=True)
    return flattened(m, tokens[order])


def only_real_tokens(m, tokens):
    logits, labels = flat(m, tokens)
    return F.cross_entropy(logits[labels != PAD], labels[labels != PAD])


@pytest.mark.parametrize(
    ("plain", "match"),
    [(sorted_by_length, "swapped|several samples"), (only_real_tokens, "no multiple|picked by a mask")],
)
def test_tokens_in_another_order_or_picked_by_a_mask_are_refused(plain, match):
    callback = SGDInfluence("val_loss")
    with pytest.raises(LossSplitError, match=f"({match}).*sample_losses="):
        fit(case("refused", plain), callback)


class Stream(IterableDataset):
    """Sequences that end in a batch of one, which is the first that is retraced."""

    def __iter__(self):
        return iter([TRAIN[i] for i in range(9)])


@pytest.mark.parametrize("net", [Reader, Recurrent])
def test_a_stream_that_ends_in_a_batch_of_one_is_followed_in_the_order_of_the_others(net):
    def influence_of(plain, options):
        callback = SGDInfluence("val_loss", epochs="all", **options)
        torch.manual_seed(1)
        module = Tokens(plain, net=net)
        train = DataLoader(Stream(), batch_size=4)
        quiet_trainer([callback], max_epochs=2).fit(module, train, DataLoader(VAL, batch_size=4))
        return callback.ranking.influence[callback.ranking.sample_id.argsort()]

    def ids(batch):
        return batch[1].tolist()

    def losses(module, batch):
        tokens = module.trim(batch[0])
        return module.rows(tokens).sum(1) * len(tokens)

    found = influence_of(time_first if net is Reader else flattened, {"sample_ids": ids})
    assert found == pytest.approx(influence_of(flattened, {"sample_ids": ids, "sample_losses": losses}), rel=1e-7)
