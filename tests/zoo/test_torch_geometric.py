# SPDX-License-Identifier: Apache-2.0
"""Graph networks of torch_geometric, on its own data, batches and loader."""

import warnings
from functools import partial

import pytest
import torch
from pytorch_lightning import seed_everything
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from cases import NUM_CLASSES, Case, Plain, adam, quiet_trainer
from lightning_sgdclean import SGDInfluence
from lightning_sgdclean.base.errors import SampleIdError
from lightning_sgdclean.data.packing import content_ids
from lightning_sgdclean.data.unpacking import pack_surely, unpack_batch
from reference import assert_influence_is_the_derivative, influences, ranked

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # it still scripts
    from torch_geometric.data import Batch, Data, HeteroData
    from torch_geometric.loader import DataLoader
    from torch_geometric.nn import GATConv, GCNConv, GINConv, global_mean_pool

NODES, FEATURES = 5, 3


def graphs(num, seed):
    """Node features and edges, all graphs of one size; the class is the degree of the first node, roughly."""
    source = torch.Generator().manual_seed(seed)
    edges = torch.rand(num, NODES, NODES, generator=source) < 0.4
    x = torch.randn(num, NODES, FEATURES, generator=source)
    return TensorDataset(x, edges[:, 0].sum(1).clamp(max=NUM_CLASSES - 1), edges, torch.arange(num))


class Graphs(nn.Module):
    """Convolutions over the edges of all of a batch's graphs at once, the mean over each graph, a classifier."""

    def __init__(self, convolution):
        super().__init__()
        self.first, self.second = convolution(FEATURES, 6), convolution(6, 6)
        self.norm, self.last = nn.BatchNorm1d(6), nn.Linear(6, NUM_CLASSES)

    def forward(self, data):
        hidden = self.norm(self.first(data.x, data.edge_index)).tanh()
        hidden = self.second(hidden, data.edge_index).tanh()
        return self.last(global_mean_pool(hidden, data.batch))


class FromTensors(Plain):
    """Makes the graphs in training_step."""

    def loss(self, batch, reduction="mean"):
        x, y, edges, _ = batch
        data = Batch.from_data_list([Data(x=a, edge_index=e.nonzero().T) for a, e in zip(x, edges, strict=True)])
        return F.cross_entropy(self.net(data), y, reduction=reduction)


class FromGraphs(Plain):
    """Takes torch_geometric's own batches."""

    def loss(self, batch, reduction="mean"):
        return F.cross_entropy(self.net(batch), batch.y, reduction=reduction)

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), batch_size=batch.num_graphs)


CONVOLUTIONS = {
    "GCN": GCNConv,
    "GAT": GATConv,
    "GIN": lambda num_in, num_out: GINConv(nn.Sequential(nn.Linear(num_in, num_out), nn.Tanh()), train_eps=True),
}


def case(name):
    net = partial(Graphs, CONVOLUTIONS[name])
    return Case(name, {"net": net, "make_optimizer": adam}, make=FromTensors, train=graphs(23, 1), val=graphs(11, 2))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_influence_is_the_derivative_of_the_whole_fit(name):
    assert_influence_is_the_derivative(case(name))


def homogeneous(x, y, edges):
    return Data(x=x, y=y, edge_index=edges.nonzero().T)


def heterogeneous(x, y, edges):
    made = HeteroData()
    made["atom"].x, made.y = x, y
    made["atom", "bond", "atom"].edge_index = edges.nonzero().T
    return made


class FromHeterogeneous(FromGraphs):
    def loss(self, batch, reduction="mean"):
        plain = Data(x=batch["atom"].x, edge_index=batch["atom", "bond", "atom"].edge_index, batch=batch["atom"].batch)
        return F.cross_entropy(self.net(plain), batch.y, reduction=reduction)


@pytest.fixture(scope="module")
def of_tensors(tmp_path_factory):
    return influences(ranked(case("GCN"), dirpath=tmp_path_factory.mktemp("tensors") / "run"))


@pytest.mark.parametrize("keep", ["auto", True, False])
@pytest.mark.parametrize(("make", "kind"), [(homogeneous, FromGraphs), (heterogeneous, FromHeterogeneous)])
def test_batches_of_its_own_loader_give_the_same_influences(of_tensors, make, kind, keep):
    def loader(dataset, **options):
        x, y, edges, _ = dataset.tensors
        return DataLoader([make(a.double(), b, e) for a, b, e in zip(x, y, edges, strict=True)], **options)

    def fit(callbacks=()):
        seed_everything(1, verbose=False)
        module = kind(net=partial(Graphs, GCNConv), make_optimizer=adam)
        train = loader(graphs(23, 1), batch_size=5, shuffle=True)
        quiet_trainer(callbacks).fit(module, train, loader(graphs(11, 2), batch_size=4))
        return module.state_dict()

    options = {"keep_batches": keep, "sample_losses": lambda module, batch: module.loss(batch, "none")}
    callback = SGDInfluence("val_loss", epochs="all", **options)
    weights, plain = fit([callback]), fit()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in weights.items())
    assert influences(callback) == pytest.approx(of_tensors, rel=1e-9)
    assert callback.summary["batches"]["kept"] == (15 if keep is True else 0)


@pytest.mark.parametrize("make", [homogeneous, heterogeneous])
def test_graphs_and_batches_of_them_come_back_as_they_were(make):
    x, y, edges, _ = graphs(3, 1).tensors
    data = [make(*one) for one in zip(x, y, edges, strict=True)]
    for value in (data[0], Batch.from_data_list(data)):
        classes = {}
        back = unpack_batch(pack_surely(value, 3, classes), classes, torch.device("cpu"))
        assert type(back) is type(value)
        assert back.to_dict().keys() == value.to_dict().keys()
        assert str(back) == str(value)
    assert back.to_data_list()[1].y.item() == data[1].y.item()


def test_content_does_not_name_graphs_whose_nodes_share_one_tensor():
    x, y, edges, _ = graphs(3, 1).tensors
    data = [Data(x=a, y=b, edge_index=e.nonzero().T) for a, b, e in zip(x, y, edges, strict=True)]
    with pytest.raises(SampleIdError, match="cannot be named by their content"):
        content_ids(Batch.from_data_list(data))
