"""Your own loss: regression, several outputs of different units, and a ranking from pairs.

What one learns: a loss is four short methods. Losses are means over the batch, and the regulariser is the one that was
trained with. A training example is whatever the data set gives for one index, a pair of items too. Whether a score
means what it should is seen by leaving examples out and training again: `verify(fit=...)` does so and compares.

    python examples/custom_objective.py
"""

import copy
import functools

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

from torch_influence import BaseObjective, InfluenceModule

L2 = 0.01


class Regression(BaseObjective):
    """Squared error of one output; batches are (x, y)."""

    def train_outputs(self, model, batch):
        return model(batch[0]).squeeze(1)

    def train_loss_on_outputs(self, outputs, batch):
        return 0.5 * (outputs - batch[1]).square().mean()

    def train_regularization(self, params):
        return 0.5 * L2 * params.square().sum()

    def test_loss(self, model, params, batch):
        return self.train_loss_on_outputs(self.train_outputs(model, batch), batch)


class MultiOutput(Regression):
    """Squared errors of several outputs, each in units of its own spread: the mean over examples, not over outputs."""

    spread = torch.tensor([1.0, 2.0, 0.5])

    def train_outputs(self, model, batch):
        return model(batch[0])

    def train_loss_on_outputs(self, outputs, batch):
        return 0.5 * ((outputs - batch[1]) / self.spread.to(outputs)).square().sum(dim=1).mean()


class Ranking(Regression):
    """Items get a score, and an example is a pair: batches are (better, worse). Logistic loss of the difference."""

    def train_outputs(self, model, batch):
        better, worse = batch
        return model(better).squeeze(1) - model(worse).squeeze(1)

    def train_loss_on_outputs(self, outputs, batch):
        return F.softplus(-outputs).mean()


def fit(model, objective, train, kept=None):
    """A copy trained to convergence on the examples that are kept: the objective's training loss, by L-BFGS."""
    examples = train if kept is None else Subset(train, kept)
    model, batch = copy.deepcopy(model), next(iter(DataLoader(examples, len(examples))))
    parameters = list(model.parameters())
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=500, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = objective.train_loss(model, torch.cat([p.flatten() for p in parameters]), batch)
        loss.backward()
        return loss

    optimizer.step(closure)
    return model


def problems(count, tests=20, seed=0):
    """For each objective an untrained model, training and test data; in float64, since refits differ little."""
    torch.manual_seed(seed)
    x = torch.randn(count + tests, 4, dtype=torch.float64)
    y = x @ torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=x.dtype) + 0.5 * torch.randn(len(x), dtype=x.dtype)
    three = MultiOutput.spread * (x @ torch.randn(4, 3, dtype=x.dtype) + 0.5 * torch.randn(len(x), 3, dtype=x.dtype))
    other = torch.randn_like(x)
    first = y > other[:, 0]  # a noisy judgement
    better, worse = torch.where(first[:, None], x, other), torch.where(first[:, None], other, x)
    data = [(Regression(), 1, (x, y)), (MultiOutput(), 3, (x, three)), (Ranking(), 1, (better, worse))]
    for objective, outputs, tensors in data:
        whole = TensorDataset(*tensors)
        model = torch.nn.Linear(4, outputs).double()
        yield model, objective, Subset(whole, range(count)), Subset(whole, range(count, len(x)))


def module_for(model, objective, train, test):
    return InfluenceModule(model, objective, DataLoader(train, 50), DataLoader(test, 50), "cpu", damp=0)


def main():
    for start, objective, train, test in problems(count=200):
        module = module_for(fit(start, objective, train), objective, train, test)
        refit = functools.partial(fit, start, objective, train)
        result = module.verify(range(len(test)), fit=refit, print=False)  # True prints each refit when it is known
        print(f"{type(objective).__name__}: without example i, the mean test loss changes by")
        print(f"{'i':>5}{'predicted':>12}{'actual':>12}")
        refits = result.refits
        for i, predicted, actual in list(zip(refits.indices, refits.predicted, refits.actual, strict=True))[:4]:
            print(f"{i:>5}{predicted:>+12.6f}{actual:>+12.6f}")
        print(f"{len(refits.indices)} refits: correlation {refits.correlation:.4f}, slope {refits.slope:.3f}")
        print(f"{result.summary()}\n")


if __name__ == "__main__":
    main()
