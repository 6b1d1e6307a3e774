# SPDX-License-Identifier: Apache-2.0
"""Whatever a module holds: ranked with training untouched to the last bit, or refused at the first batch by name."""

import concurrent.futures
import logging
import queue
import random
import socket
import threading
import weakref
from collections import Counter, OrderedDict, UserDict, defaultdict, deque
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torchmetrics import MeanMetric, MetricCollection

from cases import TRAIN, VAL, Case, Plain, loaders, quiet_trainer
from lightning_sgdclean import SGDInfluence
from lightning_sgdclean.base.errors import UnsupportedTrainingError
from processes import python
from reference import assert_influence_is_the_derivative


class Holding(Plain):
    """Holds something, and does something to it in every training step."""

    def __init__(self, **options):
        super().__init__(**options)
        self.held = self.make()

    def use(self, loss):
        pass

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.use(loss)
        return loss


def trained(kind, callback, make_trainer=quiet_trainer):
    pl.seed_everything(1, verbose=False)
    module = kind(norm=True, dropout=0.2)
    trainer = make_trainer([callback] if callback else [], max_epochs=2)
    trainer.fit(module, *loaders(TRAIN, VAL))
    return module, trainer


def assert_ranked_and_untouched(kind, make_trainer=quiet_trainer):
    callback = SGDInfluence("val_loss", epochs="all")
    module, _ = trained(kind, callback, make_trainer)
    plain, _ = trained(kind, None, make_trainer)
    assert len(callback.ranking) == len(TRAIN)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor), name
    assert module.seen() == plain.seen()


class Executor(Holding):
    def make(self):
        self.done = []
        return {"pool": concurrent.futures.ThreadPoolExecutor(1), "jobs": []}

    def use(self, loss):
        self.held["jobs"][:] = [self.held["pool"].submit(pow, 2, 3)]
        self.held["jobs"][0].result(timeout=10)
        self.done.append(len(self.held["jobs"]))

    def seen(self):
        return self.done, self.held["jobs"][0].result()


class Synchronized(Holding):
    def make(self):
        return [queue.Queue(), threading.Lock(), threading.Condition(), threading.Event(), threading.local()]

    def use(self, loss):
        self.held[0].put(1)
        self.held[0].get()
        with self.held[1], self.held[2]:
            self.held[3].set()

    def seen(self):
        return self.held[0].qsize(), self.held[3].is_set()


class LockedSettings(Holding):
    """An object with a lock, which training only reads."""

    def make(self):
        return SimpleNamespace(lock=threading.RLock(), factor=2, table={"a": [1]})

    def use(self, loss):
        with self.held.lock:
            assert self.held.factor == 2

    def seen(self):
        return self.held.factor, self.held.table


class Beating(threading.Thread):
    def __init__(self):
        super().__init__(daemon=True)
        self.beats, self.over = 0, threading.Event()

    def run(self):
        while not self.over.wait(0.001):
            self.beats += 1


class Threaded(Holding):
    def make(self):
        thread = Beating()
        thread.start()
        return thread

    def on_fit_end(self):
        self.held.over.set()

    def seen(self):
        self.held.join(timeout=10)
        return self.held.is_alive()


class Files(Holding):
    def make(self):
        self.offsets = []
        return {"file": open(__file__, "rb"), "socket": socket.socket()}

    def use(self, loss):
        self.held["file"].seek(0)
        self.offsets.append(self.held["file"].tell())

    def on_fit_end(self):
        self.held["file"].close()
        self.held["socket"].close()

    def seen(self):
        return self.offsets


class Logged(Holding):
    """An object with a logger counts."""

    def make(self):
        return SimpleNamespace(logger=logging.getLogger("a"), handlers=logging.getLogger("a").handlers, count=0)

    def use(self, loss):
        self.held.count += 1

    def seen(self):
        return self.held.count


class Watcher(pl.Callback):
    def __init__(self):
        self.lock, self.epochs = threading.Lock(), 0


class Callbacks(Holding):
    def make(self):
        return [Watcher(), pl.callbacks.Timer(), SGDInfluence(), pl.Trainer(logger=False, enable_checkpointing=False)]

    def seen(self):
        return self.held[0].epochs


def count():
    n = 0
    while True:
        n += 1
        yield n


class References(Holding):
    def make(self):
        gone = Schedule()
        self.dead, self.alive, self.proxy = weakref.ref(gone), weakref.ref(self.net), weakref.proxy(gone)
        self.by_part = weakref.WeakKeyDictionary({self.net: 1})
        del gone
        return [count(), iter([1, 2]), {}.keys(), map(str, [1])]

    def seen(self):
        return next(self.held[0]), self.by_part[self.net]


class Schedule:
    def __init__(self):
        self.count, self.history = 0, []

    def step(self):
        self.count += 1
        self.history.append(self.count)


class Touchy(Schedule):
    """Whatever it is asked for but what it has, it fails."""

    @property
    def raising(self):
        raise RuntimeError("not now")

    def __getattr__(self, name):
        raise RuntimeError(name)

    def __eq__(self, other):
        raise RuntimeError("no")

    __hash__ = None


class OfObject(Holding):
    made_of = Schedule

    def make(self):
        return self.made_of()

    def use(self, loss):
        self.held.step()

    def seen(self):
        return self.held.count, self.held.history


class OfTouchy(OfObject):
    made_of = Touchy


class Slotted:
    __slots__ = ("count", "empty", "history", "tensor")

    def __init__(self):
        self.count, self.history, self.tensor = 0, [], torch.zeros(2)

    def step(self):
        self.count += 1
        self.history.append(self.count)
        self.tensor += 1
        self.empty = self.tensor.sum().item()


class OfSlotted(OfObject):
    made_of = Slotted

    def seen(self):
        return super().seen(), self.held.tensor.tolist(), self.held.empty


class SlottedAndNot(Slotted):
    def step(self):
        super().step()
        self.further = self.count


class OfSlottedAndNot(OfSlotted):
    made_of = SlottedAndNot

    def seen(self):
        return super().seen(), self.held.further


@dataclass(frozen=True, slots=True)
class Frozen:
    history: list = field(default_factory=list)
    sums: dict = field(default_factory=lambda: {"a": torch.full((2,), float("nan")), "b": [torch.zeros(())]})

    @property
    def count(self):
        return len(self.history)

    def step(self):
        self.history.append(1)
        self.sums["b"][0].add_(1)


class OfFrozen(OfObject):
    made_of = Frozen

    def seen(self):
        return super().seen(), self.held.sums["b"][0].item()


class Node:
    def __init__(self, before=None):
        self.before, self.first, self.count = before, before.first if before else self, 0


class Chained(Holding):
    """A long chain whose end leads to its beginning, and a list that holds itself."""

    def make(self):
        self.circle = []
        self.circle.append(self.circle)
        node = None
        for _ in range(3000):
            node = Node(node)
        node.first.before = node
        return node

    def use(self, loss):
        self.held.before.count += 1

    def seen(self):
        return self.held.before.count, self.held.count


@dataclass
class Metrics:
    mean: MeanMetric = field(default_factory=MeanMetric)
    several: MetricCollection = field(default_factory=lambda: MetricCollection({"mean": MeanMetric()}))


class HiddenMetrics(Holding):
    """Metrics where torch does not find them."""

    def make(self):
        return {"one": MeanMetric(), "more": Metrics()}

    def use(self, loss):
        for metric in (self.held["one"], self.held["more"].mean, self.held["more"].several):
            metric.update(loss.detach())

    def seen(self):
        one, more = self.held["one"], self.held["more"]
        return [m.compute().item() for m in (one, more.mean, more.several["mean"])], one.update_count


class HiddenModule(Holding):
    """A network that torch does not find, with running statistics."""

    def make(self):
        return (nn.BatchNorm1d(1, dtype=torch.float32),)

    def use(self, loss):
        self.held[0](torch.arange(4, dtype=torch.float32)[:, None] * loss.item())

    def seen(self):
        return self.held[0].running_mean.item(), self.held[0].num_batches_tracked.item()


class Tensors(Holding):
    """Tensors and arrays, written to within containers, and not to be written to."""

    def make(self):
        fixed = np.zeros(2)
        fixed.flags.writeable = False
        names = np.array([None, "a"], dtype=object)
        return {"mean": torch.zeros(()), "all": [torch.zeros(2)] * 2, "array": (np.zeros(2), fixed, names), "by": {}}

    def use(self, loss):
        self.held["mean"].mul_(0.9).add_(loss.detach().float(), alpha=0.1)
        self.held["all"][1] += 1
        self.held["array"][0][0] += 1
        self.held["array"][2][0] = loss.item()
        self.held["by"].setdefault(1, torch.zeros(())).add_(1)

    def seen(self):
        return [str(self.held[key]) for key in self.held]


class Guarded(dict):
    """A dict that may be neither iterated nor changed from outside."""

    def __iter__(self):
        raise RuntimeError("no")

    def __setitem__(self, key, value):
        raise RuntimeError("no")

    def clear(self):
        raise RuntimeError("no")

    def count(self):
        dict.__setitem__(self, "n", dict.get(self, "n", 0) + 1)


class Containers(Holding):
    def make(self):
        order = OrderedDict(a=1, b=2)
        return [order, defaultdict(list), Counter(), UserDict(n=0), deque([0], maxlen=3), Guarded(), {1000, 2000}]

    def use(self, loss):
        order, lists, counter, user, recent, guarded, numbers = self.held
        order.move_to_end("a")
        lists[loss.item()].append(1)
        counter["a"] += 1
        user["n"] += 1
        recent.append(counter["a"])
        guarded.count()
        numbers.add(5000 + counter["a"])

    def seen(self):
        order, lists, counter, user, recent, guarded, numbers = self.held
        return list(order), dict(lists), counter, user.data, list(recent), list(dict.values(guarded)), numbers


class Drawing(Holding):
    """Random generators of its own, which the loss does not hear of."""

    def make(self):
        return random.Random(0), np.random.default_rng(0), np.random.RandomState(0), torch.Generator()

    def use(self, loss):
        self.drawn = self.seen()

    def seen(self):
        of_python, rng, state, of_torch = self.held
        return of_python.random(), rng.random(), state.rand(), torch.rand((), generator=of_torch).item()


class Labelled(torch.Tensor):
    """A tensor with labels that its copies lack, and methods that miss them."""

    @staticmethod
    def __new__(cls, values, labels):
        made = values.as_subclass(cls)
        made.labels = labels
        return made

    def clone(self):
        return Labelled(super().clone(), list(self.labels))

    def detach(self):
        return Labelled(super().detach(), list(self.labels))

    def untyped_storage(self):
        return self.labels and super().untyped_storage()


class LabelledTensors(Holding):
    def make(self):
        self.scale = Labelled(torch.ones(3), ["a"])
        return {"inside": Labelled(torch.ones(3), ["b"])}

    def loss(self, batch, reduction="mean"):
        x, *rest = batch
        return super().loss((x * self.scale.as_subclass(torch.Tensor)[0], *rest), reduction)

    def use(self, loss):
        self.scale.labels.append(1)
        self.held["inside"].as_subclass(torch.Tensor).add_(1)

    def seen(self):
        return self.scale.labels, self.held["inside"].as_subclass(torch.Tensor).tolist()


class Odd(Holding):
    """Tensors that cannot be copied or compared as others are."""

    def make(self):
        with torch.inference_mode():
            made = torch.zeros(2)
        return [made, torch.eye(2).to_sparse(), torch.zeros(2, device="meta"), nn.UninitializedBuffer()]

    def seen(self):
        return self.held[0].tolist()


class Views(Holding):
    """Lists its own parameters and a flat view of one, as helpers do."""

    def make(self):
        return SimpleNamespace(all=list(self.parameters()), flat=self.net[0].weight.data.view(-1), steps=0)

    def use(self, loss):
        self.held.steps += 1

    def seen(self):
        assert self.held.flat.data_ptr() == self.net[0].weight.data_ptr() or self.held.flat.dtype == torch.float32
        return self.held.steps


ALL = [
    *(Executor, Synchronized, LockedSettings, Threaded, Files, Logged, Callbacks, References, OfObject, OfTouchy),
    *(OfSlotted, OfSlottedAndNot, OfFrozen, Chained, HiddenMetrics, HiddenModule, Tensors, Containers, Drawing),
    *(LabelledTensors, Odd, Views),
]


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_whatever_a_module_holds_it_is_ranked_and_training_untouched(kind):
    assert_ranked_and_untouched(kind)


class LockedCounter(OfObject):
    class made_of(Schedule):
        def __init__(self):
            super().__init__()
            self.lock = threading.Lock()


class Feeding(Holding):
    """Counts what it took of a generator."""

    def make(self):
        return SimpleNamespace(source=count(), taken=0)

    def use(self, loss):
        self.held.taken = next(self.held.source)


class OfCallback(Holding):
    def make(self):
        return Watcher()

    def use(self, loss):
        self.held.epochs += 1


@pytest.mark.parametrize(
    ("kind", "name"), [(LockedCounter, "count"), (Feeding, "taken"), (OfCallback, "epochs")], ids=str
)
def test_what_a_step_changes_but_nobody_can_put_back_is_refused_at_the_first_batch_by_name(kind, name):
    trainer = quiet_trainer([SGDInfluence("val_loss")])
    with pytest.raises(UnsupportedTrainingError, match=rf"changes {kind.__name__}\.held\.{name} each time"):
        trainer.fit(kind(), *loaders())
    assert trainer.global_step == 0


class Normalized(Plain):
    """Divides by an average that it writes in place."""

    def __init__(self, **options):
        super().__init__(**options)
        self.average = torch.ones((), dtype=torch.float64)

    def loss(self, batch, reduction="mean"):
        loss = super().loss(batch, reduction)
        if self.training:
            self.average.mul_(0.9).add_(0.1)
            self.average.mul_(1.01)
        return loss * self.average


class NormalizedByBuffer(Normalized):
    def __init__(self, **options):
        super().__init__(**options)
        del self.average
        self.register_buffer("average", torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize("kind", [Normalized, NormalizedByBuffer])
def test_a_tensor_of_the_loss_that_is_written_in_place_is_refused_by_name(kind):
    trainer = quiet_trainer([SGDInfluence("val_loss")])
    with pytest.raises(UnsupportedTrainingError, match="average"):
        trainer.fit(kind(), *loaders())
    assert trainer.global_step <= 2


class CountingTrainer(pl.Trainer):
    """As some packages have one: with a lock and numbers of its own."""

    def __init__(self, *args, **options):
        self.lock, self.runs, self.notes = threading.Lock(), 0, {"a": 1}
        super().__init__(*args, **options)


def test_a_trainer_of_a_class_of_ones_own_is_left_alone():
    package = SimpleNamespace(Trainer=CountingTrainer)
    assert_ranked_and_untouched(Logged, lambda callbacks, **options: quiet_trainer(callbacks, package, **options))


OWN = """
import sys
import pytorch_lightning as pl
from cases import Plain, loaders, quiet_trainer
from lightning_sgdclean import SGDInfluence
class Trainer(pl.Trainer): pass
class Package: pass
Package.Trainer = Trainer
class Net(Plain):
    def __init__(self, callback): super().__init__(); self.own = callback
    def configure_callbacks(self): return [self.own["callback"]] if isinstance(self.own, dict) else []
for own in (None, {"callback": SGDInfluence(epochs="all")}):
    callback = SGDInfluence(epochs="all")
    trainer = quiet_trainer([callback] if own is None else [], Package)
    trainer.fit(Net(own), *loaders())
    print("ranked", len(next(c for c in trainer.callbacks if isinstance(c, SGDInfluence)).ranking))
"""


def test_own_trainers_and_modules_that_hold_the_callback_do_not_hang(tmp_path):
    assert python("-c", OWN, cwd=tmp_path).stdout.count("ranked 23") == 2


class Looking(Plain):
    """Keeps a view of its own weights as an array."""

    def loss(self, batch, reduction="mean"):
        self.seen = self.net[0].weight.detach().numpy(force=True)
        return super().loss(batch, reduction)


def test_an_array_that_is_a_view_of_the_weights_is_not_put_back():
    assert_influence_is_the_derivative(Case("looking", make=Looking))
