# SPDX-License-Identifier: Apache-2.0
r"""Influence functions (Koh and Liang, ICML 2017), with both of their solvers.

With the gradient ``g`` of the mean validation loss and the Hessian ``H`` of the training loss at the final weights,
leaving out sample ``j`` of ``n`` changes the validation loss by about ``<s, grad l_j> / n``, where
``(H + damping) s = g``. A network is not trained to a minimum and ``H`` has negative eigenvalues; the damping has to
exceed them for the equation to make sense, and is chosen so by ``damping_for``.
"""

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, cg, eigsh

from baselines.gradients import along, hessian_product, mean_gradient

LEAST_DAMPING = 0.01  # that of Koh and Liang's own experiments with a network


def operator(net, data, damping=0.0):
    """``H + damping`` as SciPy takes it, ``(P, P)``."""
    size = sum(param.numel() for param in net.parameters())

    def times(vector):
        vector = np.asarray(vector).ravel()
        return hessian_product(net, data, torch.from_numpy(vector)).double().numpy() + damping * vector

    return LinearOperator((size, size), matvec=times, dtype=np.float64)


def extreme_eigenvalues(net, data, seed=0):
    """Smallest and largest eigenvalue of the Hessian, by Lanczos, to about a twentieth of the larger one."""
    hessian = operator(net, data)
    start = np.random.default_rng(seed).standard_normal(hessian.shape[0])
    low, high = sorted(eigsh(hessian, 2, which="BE", v0=start, tol=0.05, ncv=12, return_eigenvectors=False))
    return float(low), float(high)


def damping_for(low):
    """Half as much again as makes the smallest eigenvalue ``low`` zero, at least that of Koh and Liang."""
    return max(LEAST_DAMPING, -1.5 * low)


def solve_cg(net, data, gradient, damping, rtol=1e-2, iterations=50):
    """``(H + damping)^-1 gradient`` by conjugate gradients, ``(P,)``."""
    solution, _ = cg(operator(net, data, damping), gradient.double().numpy(), rtol=rtol, maxiter=iterations)
    return torch.from_numpy(solution)


def solve_lissa(net, data, gradient, damping, scale, depth=400, batch=64, repeats=1, seed=0):
    """The same by LiSSA: ``s <- g + (1 - (H_batch + damping) / scale) s`` over random batches, ``(P,)``.

    It converges if ``scale`` exceeds every batch's largest eigenvalue plus the damping, in a few times
    ``scale / damping`` steps.
    """
    random, total = torch.Generator().manual_seed(seed), 0.0
    for _ in range(repeats):
        current = gradient.clone()
        for _ in range(depth):
            rows = torch.randint(len(data[1]), (batch,), generator=random)
            product = hessian_product(net, tuple(tensor[rows] for tensor in data), current)
            current = gradient + current - (product + damping * current) / scale
        total += current / scale
    return total / repeats


def badness(net, train, val, solve):
    """Minus the predicted change of the validation loss, ``(N,)``; ``solve`` maps ``g`` to ``s``."""
    return -along(net, train, solve(mean_gradient(net, val))).double().numpy() / len(train[1])
