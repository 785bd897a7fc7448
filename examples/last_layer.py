"""The last layer of a network: fast, convex, and often what one wants to know of a fine-tuned model.

What one learns: there are two ways to it, with the same scores. Compute the features once with the frozen backbone and
hand over the head alone, as a model of its own; or hand over the whole network with `params="head.*"`, which selects
what is differentiated and leaves requires_grad alone. `print(module.explain())` says how each is computed.
Needs scikit-learn, for the digits.

    python examples/last_layer.py
"""

import argparse
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from torch_influence import BaseObjective, InfluenceModule

L2 = 0.01


class Objective(BaseObjective):
    def train_outputs(self, model, batch):
        return model(batch[0])

    def train_loss_on_outputs(self, outputs, batch):
        return F.cross_entropy(outputs, batch[1])

    def train_regularization(self, params):  # of all parameters; those not selected are constants
        return 0.5 * L2 * params.square().sum()

    def test_loss(self, model, params, batch):
        return F.cross_entropy(model(batch[0]), batch[1])


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = torch.nn.Sequential(
            *(torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2)),
            *(torch.nn.Conv2d(8, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(2)),
            *(torch.nn.Flatten(), torch.nn.Dropout(0.2)),
        )
        self.head = torch.nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.backbone(x))


def pretrained(x, y, epochs=5):
    """Stands for a network that somebody else has trained."""
    model = Network().to(x.dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def features_of(model, dataset):
    """The backbone's outputs, computed once; in eval mode, so that dropout is off."""
    batches = [(model.backbone(x), y) for x, y in DataLoader(dataset, 256)]
    return TensorDataset(*(torch.cat(column) for column in zip(*batches, strict=True)))


def fit_head(head, features):
    """To the minimum: a score assumes that the gradient of the training loss is zero."""
    x, y = features.tensors
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(head(x), y) + 0.5 * L2 * sum(p.square().sum() for p in head.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)


def both_ways(model, train, test):
    """The head as a model of features, and the whole model with only the head selected."""
    features = [DataLoader(features_of(model, part), 256) for part in (train, test)]
    yield InfluenceModule(model.head, Objective(), *features, "cpu", damp=1e-3)
    images = [DataLoader(part, 256) for part in (train, test)]
    yield InfluenceModule(model, Objective(), *images, "cpu", damp=1e-3, params="head.*")


def digits(count):
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)
    return TensorDataset(x[:count], y[:count]), TensorDataset(x[-200:], y[-200:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1200, help="training digits (default 1200)")
    options = parser.parse_args()
    torch.manual_seed(0)
    train, test = digits(options.count)
    model = pretrained(*train.tensors)
    fit_head(model.head, features_of(model, train))
    scores = []
    for name, module in zip(("head on its features", 'params="head.*"'), both_ways(model, train, test), strict=True):
        start = time.perf_counter()
        scores.append(module.influence_matrix(test_idxs=range(10)))
        print(f"{name}: {time.perf_counter() - start:.2f} s; curvature: {module.explain(10)['curvature'].path}")
    difference = (scores[0] - scores[1]).abs().max() / scores[0].abs().max()
    print(f"largest difference of the {scores[0].numel()} scores, relative to the largest score: {difference:.1e}")
    for q in (0, 1):
        helpful = scores[0][:, q].topk(3).indices
        print(f"test digit {q}, a {test[q][1]}, is helped most by digits {helpful.tolist()}: ", end="")
        print(f"labels {train.tensors[1][helpful].tolist()}")


if __name__ == "__main__":
    main()
