# SPDX-License-Identifier: Apache-2.0
"""Clipping against torch's own, and its transpose against differences."""

import pytest
import torch
from torch import nn

from lightning_sgdclean.adjoint.optimizers import clip, clip_transpose, clipped


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
    for name, found in clip(grads, how).items():
        torch.testing.assert_close(found, params[name].grad, rtol=1e-12, atol=0)
    pull = {name: torch.randn_like(grad) for name, grad in grads.items()}
    found, step = clip_transpose(grads, pull, how), 1e-6
    tangent = {name: torch.randn_like(grad) for name, grad in grads.items()}
    ahead, behind = (clip({n: g + s * tangent[n] for n, g in grads.items()}, how) for s in (step, -step))
    moved = sum(((ahead[n] - behind[n]) / (2 * step) * pull[n]).sum() for n in grads)
    assert sum((found[n] * tangent[n]).sum() for n in grads).item() == pytest.approx(moved.item(), rel=1e-7)


@pytest.mark.parametrize("how", [None, ("norm", 1.0), ("norm", 100.0), ("value", 0.3)])
def test_each_run_is_clipped_by_itself_as_torch_clips(how):
    gradients = {"a": torch.randn(4, 3, 2), "b": torch.randn(4, 5), "c": torch.randn(4), "unused": None}
    gradients["a"][1] *= 1e-3
    found = clipped(gradients, how)
    assert found["unused"] is None
    for run in range(4):
        params = [nn.Parameter(torch.zeros_like(g[run])) for g in gradients.values() if g is not None]
        for param, gradient in zip(params, [g for g in gradients.values() if g is not None], strict=True):
            param.grad = gradient[run].clone()
        if how is not None:
            {"norm": nn.utils.clip_grad_norm_, "value": nn.utils.clip_grad_value_}[how[0]](params, how[1])
        for name, param in zip("abc", params, strict=True):
            torch.testing.assert_close(found[name][run], param.grad)
