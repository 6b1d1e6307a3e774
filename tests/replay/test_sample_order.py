# SPDX-License-Identifier: Apache-2.0
"""The proof of a single batch of a collate function: rare faults are found in it, and honest functions pass."""

import random
from itertools import pairwise

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from datasets import ByThePrevious, filled_up, sound
from lightning_sgdclean.base.errors import SampleIdError
from lightning_sgdclean.replay.sample_order import CollateProof, _orders
from lightning_sgdclean.trajectory.records import MicroBatch

SIZE, RARE = 300, 13
X = torch.randn(SIZE, 6, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 3, (SIZE,), generator=torch.Generator().manual_seed(1))


class Rows(Dataset):
    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        return X[index], Y[index], index


class Fragile(Rows):
    def __getitem__(self, index):
        return None if index == RARE else super().__getitem__(index)


class Noisy(Fragile):
    def __getitem__(self, index):
        found = super().__getitem__(index)
        return found and (found[0] + torch.randn(6), *found[1:])


def replacing(by):
    return lambda items: default_collate([by(items, i) if item is None else item for i, item in enumerate(items)])


def moving(pairs):
    """Exchanges rows where the rare sample is among them."""

    def collate(items):
        batch = default_collate(items)
        names = batch[2].tolist()
        if RARE in names:
            one, other = pairs(names.index(RARE))
            order = list(range(len(names)))
            order[one], order[other] = order[other], order[one]
            batch = [column[order] for column in batch]
        return batch

    return collate


FAULTS = {
    "the one before": (Fragile, replacing(lambda items, i: items[i - 1])),
    "the first": (Fragile, replacing(lambda items, i: sound(items)[0])),
    "the largest": (Fragile, replacing(lambda items, i: max(sound(items), key=lambda item: float(item[0].sum())))),
    "a random one": (Fragile, replacing(lambda items, i: random.choice(sound(items)))),
    "another's picture": (Fragile, replacing(lambda items, i: (sound(items)[0][0], torch.tensor(2), RARE))),
    "one of before": (Fragile, ByThePrevious(torch.zeros(6), torch.tensor(0), 0)),
    "random data": (Noisy, replacing(lambda items, i: items[i - 1])),
    "filled up": (Fragile, filled_up),
    "neighbours swapped": (Rows, moving(lambda at: (at, at - 1))),
    "first two swapped": (Rows, moving(lambda at: (0, 1))),
}


def batch_of(size, seed, rare=True):
    positions = [i for i in torch.randperm(SIZE, generator=torch.Generator().manual_seed(seed)).tolist() if i != RARE]
    positions = positions[:size]
    if rare:
        positions[seed % size] = RARE
    return MicroBatch(ids=positions, positions=positions, epoch=0, batch_idx=seed, random={})


@pytest.mark.parametrize("size", [2, 4, 16, 64])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_rare_fault_is_found_in_the_one_batch_that_has_it(fault, size):
    data, collate = FAULTS[fault]
    loader = DataLoader(data(), batch_size=size, collate_fn=collate)
    for seed in range(6):
        proof = CollateProof(has_names=False)
        proof.fetched(loader, batch_of(size, seed + 100, rare=False))
        with pytest.raises(SampleIdError, match=r"row of sample \d+ is not its own.*sample_ids="):
            proof.fetched(loader, batch_of(size, seed))
        CollateProof(has_names=True).fetched(loader, batch_of(size, seed))


def padded(items):
    rows = [item[0][: 2 + item[2] % 5] for item in items]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.stack([item[1] for item in items])


def time_first(items):
    return torch.nn.utils.rnn.pad_sequence([item[0][: 2 + item[2] % 5] for item in items]), [item[2] for item in items]


def joined(items):
    """One graph of several: nodes stand together, edges have two rows."""
    nodes = torch.cat([item[0][: 1 + item[2] % 3] for item in items])
    owner = torch.cat([torch.full((1 + item[2] % 3,), i) for i, item in enumerate(items)])
    return {"x": nodes, "edges": torch.stack([owner, owner.flip(0)]), "owner": owner, "y": [item[1] for item in items]}


HONEST = {
    "padded": padded,
    "time first": time_first,
    "graphs": joined,
    "rows numbered": lambda items: {"row": torch.arange(len(items)), "parts": default_collate(items)},
    "a constant": replacing(lambda items, i: (torch.zeros(6), torch.tensor(0), RARE)),
    "random": lambda items: [torch.stack([item[0] for item in items]) + torch.randn(len(items), 1), len(items)],
    "few values": lambda items: [torch.stack([(item[0] > 1).float() for item in items])],
    "samples": list,
    "once each": lambda items: default_collate(items) if len({item[2] for item in items}) == len(items) else 1 / 0,
}


@pytest.mark.parametrize("size", [2, 3, 5, 32])
@pytest.mark.parametrize("name", HONEST)
def test_an_honest_function_passes_and_gives_the_batch(name, size):
    loader = DataLoader(Fragile() if name == "a constant" else Rows(), batch_size=size, collate_fn=HONEST[name])
    proof = CollateProof(has_names=False)
    for seed in range(12):
        micro = batch_of(size, seed)
        torch.manual_seed(seed)
        batch = proof.fetched(loader, micro)
        torch.manual_seed(seed)
        wanted = HONEST[name]([loader.dataset[i] for i in micro.positions])
        torch.testing.assert_close(batch, wanted, rtol=0, atol=0)


def test_each_batch_is_collated_anew_once_only_and_torchs_own_function_never():
    seen = []

    def collate(items):
        seen.append(len(items))
        return default_collate(items)

    proof, micro = CollateProof(has_names=False), batch_of(64, 0)
    loader = DataLoader(Rows(), batch_size=64, collate_fn=collate)
    proof.fetched(loader, micro)
    assert len(seen) == 4  # as drawn, in two other orders, and to be handed on
    proof.fetched(loader, micro)
    assert len(seen) == 5


@pytest.mark.parametrize("num", [3, 4, 5, 7, 8, 30, 64])
def test_some_order_parts_all_neighbours_where_that_can_be(num):
    orders = list(_orders(num, seed=3))
    assert list(range(num)) not in orders
    assert all(len(order) == num for order in orders)
    if num in (5, 7, 8, 30, 64):
        assert all((after - before) % num not in (1, num - 1) for before, after in pairwise(orders[0]))
