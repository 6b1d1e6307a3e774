# SPDX-License-Identifier: Apache-2.0
"""Parameters that the optimizer does not hold: constants of the training, unless something else moves them."""

from collections.abc import Collection

from torch import Tensor, nn

from lightning_sgdclean.base.errors import UnsupportedTrainingError
from lightning_sgdclean.data.fingerprints import batch_digest


class Constants:
    """Fingerprints of a module's parameters that are not trained.

    Args:
        module: The module.
        trained: Names of the parameters that the optimizer moves.
    """

    def __init__(self, module: nn.Module, trained: Collection[str]) -> None:
        self._trained = trained
        self._prints = self._now(module)

    def check(self, module: nn.Module) -> None:
        """Are they still what they were?

        Raises:
            UnsupportedTrainingError: Naming the first that moved.
        """
        for name, now in self._now(module).items():
            if not now.equal(self._prints[name]):
                raise UnsupportedTrainingError(
                    f"The parameter {name!r} moved, although the optimizer did not hold it when training began: a "
                    "teacher or average of the weights, or a layer that was unfrozen. What samples do through it is "
                    "not followed. Keep it fixed or outside of the module, or give all parameters to the optimizer."
                )

    def _now(self, module: nn.Module) -> dict[str, Tensor]:
        held = self._trained
        return {
            name: batch_digest([param.detach()], 1) for name, param in module.named_parameters() if name not in held
        }
