# SPDX-License-Identifier: Apache-2.0
"""Samples left out: by a window run again without them, and by whole fits in which their weight is zero."""

from cases import Plain, fit, loaders, objective
from lightning_sgdclean import counterfactual
from reference import one_hot


def weights_without(group, num=23):
    return 1 - sum(one_hot(i, num) for i in group)


def without(case, group):
    """The objective of a whole fit in which a group has weight zero."""
    return objective(fit(case, weights=weights_without(group, len(case.train))), case.val)


def again(callback, case, model=None, **options):
    train, val = loaders(case.train, case.val, **case.loader)
    options = {"train_dataloaders": train, "val_dataloaders": val, "epochs": "all", **options}
    return counterfactual(callback.run_dir, model or case.make(**case.module), **options)


class ByHand(Plain):
    """A loss that nobody can take apart."""

    def training_step(self, batch, batch_idx):
        rows = by_hand(self, batch)
        return (rows if self.sample_weights is None else rows * self.sample_weights[batch[-1]]).mean()


def by_hand(module, batch):
    return -module.net(batch[0]).log_softmax(1).gather(1, batch[1][:, None])[:, 0]
