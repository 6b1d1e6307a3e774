# SPDX-License-Identifier: Apache-2.0
"""The live state is the same object for as long as nothing takes another's place, and no longer."""

import pytest
import torch
from torch import nn

from lightning_sgdclean.trajectory.live_state import LiveState, current_state, trained_parameters

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


def built(make_optimizer=torch.optim.Adam):
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), torch.jit.script(nn.BatchNorm1d(4)), nn.Linear(4, 1))
    optimizer = make_optimizer(net.parameters(), lr=0.1)
    params = trained_parameters(net, optimizer)
    return net, optimizer, params, LiveState(net, params, optimizer)


def step(net, optimizer):
    net(torch.randn(5, 3)).sum().backward()
    optimizer.step()


def assert_is_current(live, net, params, optimizer):
    now, truth = live.now(), current_state(net, params, optimizer)
    for found, true in ((now.params, truth.params), (now.buffers, truth.buffers)):
        assert list(found) == list(true)
        assert all(found[name] is true[name] for name in true)
    assert {name: list(entries) for name, entries in now.optimizer.items()} == {
        name: list(entries) for name, entries in truth.optimizer.items()
    }
    for name, entries in truth.optimizer.items():
        assert all(torch.equal(now.optimizer[name][key], tensor) for key, tensor in entries.items())


def load(net, optimizer):
    optimizer.load_state_dict(optimizer.state_dict())


def count(net, optimizer):
    for number, entries in enumerate(optimizer.state.values()):
        entries["calls"] = entries.get("calls", 1000 * number) + 1  # a number, not a tensor


CHANGES = {
    "a buffer is another tensor": lambda net, optimizer: setattr(net[1], "running_mean", torch.ones(4)),
    "a buffer is gone": lambda net, optimizer: net[1]._buffers.pop("num_batches_tracked", None),
    "a buffer is new": lambda net, optimizer: net[0].register_buffer("seen", torch.zeros(2)),
    "a buffer is None": lambda net, optimizer: setattr(net[1], "running_var", None),
    "a layer is another": lambda net, optimizer: setattr(net, "1", nn.BatchNorm1d(4)),
    "a layer is new": lambda net, optimizer: net.append(nn.BatchNorm1d(1)),
    "the optimizer's state is loaded": load,
    "the optimizer's state is emptied": lambda net, optimizer: optimizer.state.clear(),
    "the optimizer counts without a tensor": count,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_takes_anothers_place_is_seen(change):
    net, optimizer, params, live = built()
    assert_is_current(live, net, params, optimizer)
    step(net, optimizer)
    for _ in range(2):
        change(net, optimizer)
        assert_is_current(live, net, params, optimizer)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.Adadelta])
def test_steps_leave_the_object_the_same_once_the_optimizer_has_its_state(make):
    net, optimizer, params, live = built(make)
    step(net, optimizer)
    first = live.now()
    for _ in range(3):
        step(net, optimizer)
        assert live.now() is first
        assert_is_current(live, net, params, optimizer)
