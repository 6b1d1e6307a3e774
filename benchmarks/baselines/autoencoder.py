# SPDX-License-Identifier: Apache-2.0
"""The reconstruction error of a small autoencoder."""

import torch
from torch import nn

WIDTH, CODE = 128, 16


def badness(points, seed=0, epochs=20):
    """Squared error with which each of the points ``(N, D)`` comes back, ``(N,)``."""
    points = torch.as_tensor(points, dtype=torch.float32)
    points = (points - points.mean(0)) / points.std().clamp_min(1e-8)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        net = network(points.shape[1])
        train(net, points, epochs)
    with torch.no_grad():
        return (net(points) - points).square().mean(1).numpy()


def network(size):
    encoder = nn.Sequential(nn.Linear(size, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CODE))
    return nn.Sequential(encoder, nn.Linear(CODE, WIDTH), nn.ReLU(), nn.Linear(WIDTH, size))


def train(net, points, epochs, batch=64):
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(points)).split(batch):
            optimizer.zero_grad()
            (net(points[rows]) - points[rows]).square().mean().backward()
            optimizer.step()
