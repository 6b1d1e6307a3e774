# SPDX-License-Identifier: Apache-2.0
"""Which optimizer classes can be followed, by which update, and why others cannot."""

import torch
from torch.optim import Optimizer

from lightning_sgdclean.closed_forms import SGD, Adam
from lightning_sgdclean.errors import UnsupportedTrainingError
from lightning_sgdclean.torch_updates import ASGD, Adadelta, Adagrad, Adamax, NAdam, RAdam, RMSprop
from lightning_sgdclean.updates import Update

_UPDATES: dict[type[Optimizer], Update] = {
    torch.optim.SGD: SGD(),
    torch.optim.Adam: Adam(decoupled=False),
    torch.optim.AdamW: Adam(decoupled=True),
    torch.optim.Adadelta: Adadelta(),
    torch.optim.Adagrad: Adagrad(),
    torch.optim.Adamax: Adamax(),
    torch.optim.ASGD: ASGD(),
    torch.optim.NAdam: NAdam(),
    torch.optim.RAdam: RAdam(),
    torch.optim.RMSprop: RMSprop(),
}
_REASONS = {
    "Rprop": "its step knows only the gradient's sign, so that no sample has an influence to first order",
    "LBFGS": "its step evaluates the loss as often as it needs to",
    "SparseAdam": "its gradients are sparse",
    "Adafactor": "it bounds its step by the root mean square of the whole, which is not written here yet",
    "Muon": "its Newton-Schulz iteration is rounded to bfloat16, so that the step's own derivative says nothing",
}


def update_of(optimizer: Optimizer) -> Update:
    """The update of an optimizer.

    Raises:
        UnsupportedTrainingError: If there is none for its class (a subclass may step differently), or if a parameter
            is complex.
    """
    kind = type(optimizer)
    if kind not in _UPDATES:
        reason = f": {_REASONS[kind.__name__]}" if _is_torchs(kind) and kind.__name__ in _REASONS else ""
        known = ", ".join(known.__name__ for known in _UPDATES)
        raise UnsupportedTrainingError(
            f"The optimizer {kind.__module__}.{kind.__qualname__} cannot be followed backwards{reason}. Train with one "
            f"of torch.optim's {known}."
        )
    for number, group in enumerate(optimizer.param_groups):
        for param in group["params"]:
            if param.is_complex():
                raise UnsupportedTrainingError(
                    f"Group {number} of the optimizer holds a complex parameter of shape {tuple(param.shape)}; only "
                    "real ones can be followed. Keep a real one and look at it through torch.view_as_complex."
                )
    return _UPDATES[kind]


def _is_torchs(kind: type) -> bool:
    return getattr(torch.optim, kind.__name__, None) is kind
