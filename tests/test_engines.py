# SPDX-License-Identifier: Apache-2.0
"""Engines on one batch, against a Hessian and per-sample gradients made entry by entry."""

import pytest
import torch
from torch.nn import functional as F

from lightning_sgdclean.curvature import Exact, Finite
from lightning_sgdclean.replay import Evaluated


def setting():
    torch.manual_seed(1)
    param = torch.nn.Parameter(torch.randn(4, dtype=torch.float64))
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, dtype=torch.float64)

    def each(p):
        return F.softplus(x @ p) * y.abs() + (x @ p).tanh() * y

    def problem(weights):
        return Evaluated((weights * each(param)).mean(), [], [])

    cotangent = torch.randn(4, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(lambda p: each(p).mean(), param.detach())
    jacobian = torch.autograd.functional.jacobian(each, param.detach())
    return param, problem, cotangent, hessian @ cotangent, jacobian @ cotangent / 6


@pytest.mark.parametrize(("engine", "tolerance"), [(Exact(), 1e-12), (Finite(1e-4), 1e-6)])
def test_scores_and_hessian_product(engine, tolerance):
    param, problem, cotangent, product, scores = setting()
    weights = torch.ones(6, dtype=torch.float64, requires_grad=True)
    before = param.detach().clone()
    pulled = engine(problem, [param], weights, True).pull_back([cotangent], {})
    torch.testing.assert_close(pulled.scores, scores, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(pulled.adjoint[0], product, rtol=tolerance, atol=tolerance)
    assert torch.equal(param.detach(), before)


def test_none_is_exact_without_the_hessian():
    param, problem, cotangent, _, scores = setting()
    weights = torch.ones(6, dtype=torch.float64, requires_grad=True)
    pulled = Exact(with_hessian=False)(problem, [param], weights, True).pull_back([cotangent], {})
    torch.testing.assert_close(pulled.scores, scores, rtol=1e-12, atol=0)
    assert not pulled.adjoint[0].any()


def test_finite_survives_a_cotangent_of_zero():
    param, problem, cotangent, _, _ = setting()
    weights = torch.ones(6, dtype=torch.float64, requires_grad=True)
    pulled = Finite()(problem, [param], weights, False).pull_back([0 * cotangent], {})
    assert pulled.scores.abs().max() < 1e-9
