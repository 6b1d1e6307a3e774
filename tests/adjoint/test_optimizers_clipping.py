# SPDX-License-Identifier: Apache-2.0
"""Clipping against torch's own, and its transpose against differences."""

import pytest
import torch

from lightning_sgdclean.adjoint.optimizers import clip, clip_transpose


@pytest.mark.parametrize("how", [("norm", 0.5), ("norm", 50.0), ("value", 0.3)])
def test_clipping_is_torchs_and_its_transpose_the_adjoint(how):
    grads = {"a": torch.randn(4, dtype=torch.float64), "b": torch.randn(2, 2, dtype=torch.float64)}
    params = {name: torch.nn.Parameter(torch.zeros_like(grad)) for name, grad in grads.items()}
    for name, param in params.items():
        param.grad = grads[name].clone()
    if how[0] == "norm":
        torch.nn.utils.clip_grad_norm_(params.values(), how[1])
    else:
        torch.nn.utils.clip_grad_value_(params.values(), how[1])
    for name, clipped in clip(grads, how).items():
        torch.testing.assert_close(clipped, params[name].grad, rtol=1e-12, atol=0)
    pull = {name: torch.randn_like(grad) for name, grad in grads.items()}
    found, step = clip_transpose(grads, pull, how), 1e-6
    tangent = {name: torch.randn_like(grad) for name, grad in grads.items()}
    ahead, behind = (clip({n: g + s * tangent[n] for n, g in grads.items()}, how) for s in (step, -step))
    moved = sum(((ahead[n] - behind[n]) / (2 * step) * pull[n]).sum() for n in grads)
    assert sum((found[n] * tangent[n]).sum() for n in grads).item() == pytest.approx(moved.item(), rel=1e-7)
