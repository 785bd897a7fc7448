"""Influence on a fine-tuned model through its LoRA adapters alone.

What one learns: `params="*.lora_*"` differentiates by the adapters only, some hundreds of numbers beside the thousands
of the network, whether the rest is frozen or not. A low-rank product is not convex in its two factors, so take
Gauss-Newton (`gnh=True`). Models of the peft library name their adapters so that the same glob selects them.
Needs scikit-learn, for the digits.

    python examples/lora.py
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torch_influence import BaseObjective, InfluenceModule

L2 = 0.01


class LoRA(nn.Module):
    """A linear layer W x and its adapter B A x of low rank."""

    def __init__(self, base, rank):
        super().__init__()
        self.base = base
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + x @ self.lora_A.mT @ self.lora_B.mT


class Objective(BaseObjective):
    def train_outputs(self, model, batch):
        return model(batch[0])

    def train_loss_on_outputs(self, outputs, batch):
        return F.cross_entropy(outputs, batch[1])

    def train_regularization(self, params):  # parameters that are not selected are constants in here
        return 0.5 * L2 * params.square().sum()

    def test_loss(self, model, params, batch):
        return F.cross_entropy(model(batch[0]), batch[1])


def train(model, parameters, data, steps, l2=0.0):
    x, y = data.tensors
    optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0)
    for _ in range(steps):
        optimizer.zero_grad()
        (F.cross_entropy(model(x), y) + 0.5 * l2 * sum(p.square().sum() for p in parameters)).backward()
        optimizer.step()


def adapted(count, wrong, rank=2, steps=300):
    """A network for digits, adapted to digits that stand on their heads, the first few of them mislabelled."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
    train(model, list(model.parameters()), TensorDataset(x[:900], y[:900]), steps)

    model = nn.Sequential(*(LoRA(layer, rank) if isinstance(layer, nn.Linear) else layer for layer in model))
    turned, right = x.flip(1)[900:], y[900:]  # reversed pixels: turned by half a circle
    given = right[:count].clone()
    given[:wrong] = (given[:wrong] + torch.randint(1, 10, (wrong,))) % 10
    data, test = TensorDataset(turned[:count], given), TensorDataset(turned[count:], right[count:])
    with torch.no_grad():
        before = (model(test.tensors[0]).argmax(1) == test.tensors[1]).float().mean()
    train(model, [p for name, p in model.named_parameters() if "lora_" in name], data, steps, L2)
    return model, data, test, before


def module_for(model, data, test):
    loaders = DataLoader(data, 128), DataLoader(test, 128)
    return InfluenceModule(model, Objective(), *loaders, "cpu", damp=1e-2, gnh=True, params="*.lora_*")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500, help="digits to adapt to, up to 800 (default 500)")
    parser.add_argument("--wrong", type=int, default=10, help="so many of them mislabelled (default 10)")
    options = parser.parse_args()
    model, data, test, before = adapted(options.count, options.wrong)
    with torch.no_grad():
        after = (model(test.tensors[0]).argmax(1) == test.tensors[1]).float().mean()
    module = module_for(model, data, test)
    size = sum(p.numel() for p in model.parameters())
    print(f"accuracy on turned digits: {before:.2f} before adaptation, {after:.2f} after")
    print(f"{len(module.flat_parameters())} of {size} parameters: {', '.join(module.params_names)}")
    suspects = module.self_influences().argsort(descending=True)[: options.wrong]
    found = int((suspects < options.wrong).sum())
    print(f"mislabelled among the {options.wrong} largest self-influences: {found} of {options.wrong}")
    scores = module.influences(range(options.count), range(len(test)))
    print(f"mean score of a mislabelled digit {scores[: options.wrong].mean():+.5f}, ", end="")
    print(f"of another {scores[options.wrong :].mean():+.5f} (negative: harmful)")


if __name__ == "__main__":
    main()
