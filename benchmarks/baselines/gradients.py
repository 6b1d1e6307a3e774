# SPDX-License-Identifier: Apache-2.0
"""What several baselines need of a network: losses, gradients and Hessian products, in evaluation mode.

A network is a ``torch.nn.Module`` from inputs to logits, a data set a pair ``(inputs, labels)``, the loss cross
entropy (of a sigmoid where there is one logit). Dropout is off and BatchNorm uses its running statistics, so that
every sample has a loss of its own.
"""

import torch
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional as F

CHUNK = 250


def chunks(data, size=CHUNK):
    """The data set in pieces of ``size`` samples, in order."""
    return zip(*(tensor.split(size) for tensor in data), strict=True)


def params_of(net):
    return {name: param.detach() for name, param in net.named_parameters()}


def flat(tensors):
    """Tensors as one vector ``(P,)``."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def named(net, vector):
    """A vector ``(P,)`` as a dict of tensors shaped as the parameters."""
    pieces = vector.split([param.numel() for param in net.parameters()])
    return {n: piece.view_as(p) for (n, p), piece in zip(net.named_parameters(), pieces, strict=True)}


def cross_entropies(logits, labels):
    """Each sample's, ``(B,)``."""
    if logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits), reduction="none")
    return F.cross_entropy(logits, labels, reduction="none")


def losses_at(net, params, inputs, labels):
    return cross_entropies(functional_call(net, params, (inputs,)), labels)


@torch.no_grad()
def losses(net, data):
    """Each sample's loss, ``(N,)``."""
    net.eval()
    return torch.cat([losses_at(net, params_of(net), *chunk) for chunk in chunks(data)])


@torch.no_grad()
def probabilities(net, inputs):
    """Softmax of the logits, ``(N, classes)``."""
    net.eval()
    return torch.cat([net(chunk).softmax(1) for chunk in inputs.split(CHUNK)])


@torch.no_grad()
def features(net, inputs):
    """What the last layer of a Sequential gets to see, ``(N, D)``."""
    net.eval()
    return torch.cat([net[:-1](chunk).flatten(1) for chunk in inputs.split(CHUNK)])


def mean_gradient(net, data):
    """Gradient of the mean loss, ``(P,)``."""
    net.eval()
    total, params = 0.0, list(net.parameters())
    for inputs, labels in chunks(data):
        loss = cross_entropies(net(inputs), labels).sum()
        total += flat(torch.autograd.grad(loss, params))
    return total / len(data[1])


def along(net, data, direction):
    """Each sample's gradient times ``direction``, ``(N,)``: one forward-mode pass instead of N gradients."""
    net.eval()
    tangent = named(net, direction.to(next(net.parameters())))

    def derivative(inputs, labels):
        return jvp(lambda params: losses_at(net, params, inputs, labels), (params_of(net),), (tangent,))[1]

    with torch.no_grad():
        return torch.cat([derivative(*chunk) for chunk in chunks(data)])


def squared_norms(net, data):
    """The squared length of each sample's gradient, ``(N,)``."""
    net.eval()

    def loss(params, one, label):
        return losses_at(net, params, one[None], label[None])[0]

    def squared(inputs, labels):
        grads = vmap(grad(loss), (None, 0, 0))(params_of(net), inputs, labels)
        return sum(part.flatten(1).square().sum(1) for part in grads.values())

    return torch.cat([squared(*chunk) for chunk in chunks(data, 64)])


def hessian_product(net, data, vector):
    """Hessian of the mean loss times ``vector``, ``(P,)``."""
    net.eval()
    params = list(net.parameters())
    vector = vector.to(params[0])
    total = torch.zeros_like(vector)
    for inputs, labels in chunks(data):
        loss = cross_entropies(net(inputs), labels).sum()
        gradient = flat(torch.autograd.grad(loss, params, create_graph=True))
        total += flat(torch.autograd.grad(gradient @ vector, params))
    return total / len(data[1])
