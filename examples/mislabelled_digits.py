"""Find wrong labels: handwritten digits, some of them mislabelled, and two rankings that find these.

What one learns: `self_influences` needs no clean data: it ranks examples by how little the rest of the data explains
them. `influences` on a few digits whose labels are known to be right ranks by who harms these: negative is harmful.
Both are compared with checking labels at random. With --picture the two curves are drawn (needs matplotlib).
Needs scikit-learn, for the digits.

    python examples/mislabelled_digits.py --picture curves.png
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from torch_influence import BaseObjective, InfluenceModule

L2 = 0.01  # weight decay; training and the objective below must agree on it


class Objective(BaseObjective):
    def train_outputs(self, model, batch):
        return model(batch[0])

    def train_loss_on_outputs(self, outputs, batch):
        return F.cross_entropy(outputs, batch[1])

    def train_regularization(self, params):
        return 0.5 * L2 * params.square().sum()

    def test_loss(self, model, params, batch):
        return F.cross_entropy(model(batch[0]), batch[1])


def digits_with_wrong_labels(count, share, seed):
    """Training digits, some labels replaced by wrong ones; which these are; and 300 clean digits."""
    images, labels = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    x, y = torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]
    wrong = torch.zeros(count, dtype=torch.bool)
    wrong[torch.randperm(count, generator=generator)[: round(share * count)]] = True
    other = (y[:count] + torch.randint(1, 10, (count,), generator=generator)) % 10
    train = TensorDataset(x[:count], torch.where(wrong, other, y[:count]))
    return train, TensorDataset(x[-300:], y[-300:]), wrong


def fit(train):
    x, y = train.tensors
    model = torch.nn.Linear(64, 10).to(x.dtype)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y) + 0.5 * L2 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)
    return model


def module_for(model, train, clean):
    return InfluenceModule(model, Objective(), DataLoader(train, 256), DataLoader(clean, 256), "cpu", damp=1e-3)


def suspicion(module, train, clean):
    """Two numbers for each training example; the larger, the sooner its label should be checked."""
    harm = -module.influences(range(len(train)), range(len(clean)))  # on the mean loss of all clean digits
    return {"self-influence": module.self_influences(), "harm to clean digits": harm}


def precision_and_recall(scores, wrong):
    """After checking the labels of the k most suspicious examples, for k = 1, 2, ..., n."""
    found = wrong[scores.argsort(descending=True)].cumsum(0)
    return found / torch.arange(1, len(wrong) + 1), found / wrong.sum()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1200, help="training digits, up to 1497 (default 1200)")
    parser.add_argument("--wrong", type=float, default=0.1, help="share with a wrong label (default 0.1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", help="where to draw the curves")
    options = parser.parse_args()

    train, clean, wrong = digits_with_wrong_labels(options.count, options.wrong, options.seed)
    scores = suspicion(module_for(fit(train), train, clean), train, clean)
    curves = {name: precision_and_recall(numbers, wrong) for name, numbers in scores.items()}
    share = wrong.float().mean()
    curves["at random"] = share.expand(len(wrong)), torch.arange(1, len(wrong) + 1) / len(wrong)  # what to expect
    checked = [round(part * len(wrong)) for part in (0.05, 0.1, 0.2, 0.3)]
    print(f"{int(wrong.sum())} of {len(wrong)} labels are wrong. Precision / recall after checking so many labels:")
    print(" " * 22 + "".join(f"{k:>15}" for k in checked))
    for name, (precision, recall) in curves.items():
        print(f"{name:<22}" + "".join(f"{precision[k - 1]:>8.2f} / {recall[k - 1]:.2f}" for k in checked))
    if options.picture:
        from matplotlib.figure import Figure

        axes = (figure := Figure()).subplots()
        for name, (precision, recall) in curves.items():
            axes.plot(recall, precision, label=name)
        axes.set(xlabel="recall", ylabel="precision", ylim=(0, 1.02), title="Finding the wrong labels")
        axes.legend()
        figure.savefig(options.picture)


if __name__ == "__main__":
    main()
