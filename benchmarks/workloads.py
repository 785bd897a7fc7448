"""The problems A to D that the end-to-end benchmark measures: shapes of classic uses, made and trained in seconds.

Features have a decaying spectrum, as real ones do, so that conjugate gradients need a realistic number of iterations;
labels are drawn from a teacher; the model is trained to a minimum of its regularised loss. Everything comes from one
seed. Named workloads, since the tests have a module ``problems`` of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from torch_influence import BaseObjective

BATCH_SIZE = 64


class Classification(BaseObjective):
    """Mean loss of outputs and labels, with weight decay ½ l2 |θ|²."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor], l2: float) -> None:
        self.loss = loss
        self.l2 = l2

    def train_outputs(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0])

    def train_loss_on_outputs(self, outputs: Tensor, batch: Any) -> Tensor:
        return self.loss(outputs, batch[1])

    def train_regularization(self, params: Tensor) -> Tensor:
        return 0.5 * self.l2 * params.square().sum()

    def test_loss(self, model: nn.Module, params: Tensor, batch: Any) -> Tensor:
        return self.loss(model(batch[0]), batch[1])


@dataclass(frozen=True)
class Workload:
    """A trained model with its data, and how its influence is asked for."""

    name: str
    title: str
    model: nn.Module
    objective: Classification
    train: TensorDataset
    test: TensorDataset
    damp: float
    gnh: bool
    rtol: float

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def train_loader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=BATCH_SIZE)

    def test_loader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=BATCH_SIZE)


def logistic_head(
    n: int = 1800, queries: int = 600, features: int = 2048, dtype: torch.dtype = torch.float32
) -> Workload:
    """A: the objective of the old package's dog-against-fish example, cross-entropy of probabilities; exact Hessian."""
    generator = torch.Generator().manual_seed(0)
    x = rotated_features(n + queries, features, decay=0.5, norm=45.0, generator=generator)
    margin = x @ torch.randn(features, generator=generator)
    y = (3.0 * margin / margin.std() + logistic_noise(n + queries, generator) > 0).to(dtype)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(features, 1), nn.Flatten(0), nn.Sigmoid()).to(dtype)
    objective = Classification(F.binary_cross_entropy, l2=1e-3)
    title = f"logistic head, {n} x {features}"
    return trained("A", title, model, objective, x.to(dtype), y, n, damp=2e-3, gnh=False, rtol=1e-5)


def softmax_regression(
    n: int = 5000, queries: int = 500, features: int = 784, classes: int = 10, dtype: torch.dtype = torch.float32
) -> Workload:
    """B: a linear classifier; Gauss-Newton, which here is the Hessian."""
    generator = torch.Generator().manual_seed(1)
    x = rotated_features(n + queries, features, decay=1.0, norm=10.0, generator=generator)
    y = teacher_labels(x, classes, generator)
    torch.manual_seed(1)
    model = nn.Linear(features, classes).to(dtype)
    objective = Classification(F.cross_entropy, l2=1e-3)
    title = f"softmax regression, {n} x {features}, {classes} classes"
    return trained("B", title, model, objective, x.to(dtype), y, n, damp=3e-2, gnh=True, rtol=1e-3)


def perceptron(
    n: int = 5000,
    queries: int = 500,
    features: int = 784,
    hidden: int = 128,
    classes: int = 10,
    dtype: torch.dtype = torch.float32,
) -> Workload:
    """C: one hidden layer, tanh."""
    generator = torch.Generator().manual_seed(2)
    x = rotated_features(n + queries, features, decay=1.0, norm=10.0, generator=generator)
    y = teacher_labels(x, classes, generator)
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(features, hidden), nn.Tanh(), nn.Linear(hidden, classes)).to(dtype)
    objective = Classification(F.cross_entropy, l2=1e-3)
    title = f"MLP {features}-{hidden}-{classes}, {n} examples"
    return trained("C", title, model, objective, x.to(dtype), y, n, damp=3e-1, gnh=True, rtol=1e-3)


def conv_net(
    n: int = 2000,
    queries: int = 200,
    side: int = 28,
    channels: tuple[int, int] = (16, 32),
    classes: int = 10,
    dtype: torch.dtype = torch.float32,
) -> Workload:
    """D: two convolutions 5 x 5 and a linear layer, 14,538 parameters; ``side`` is 28, or 20 for a smaller one."""
    generator = torch.Generator().manual_seed(3)
    x = smooth_images(n + queries, side, decay=1.0, generator=generator)
    first, second = channels
    last = ((side - 4) // 2 - 4) // 2  # pooled to 2 x 2

    def network() -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(1, first, 5),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(first, second, 5),
            nn.ReLU(),
            nn.AvgPool2d(last),
            nn.Flatten(),
            nn.Linear(4 * second, classes),
        )

    torch.manual_seed(4)
    teacher = network()
    with torch.no_grad():
        y = draw_labels(torch.cat([teacher(part) for part in x.split(BATCH_SIZE)]), generator)
    torch.manual_seed(3)
    model = network().to(dtype)
    objective = Classification(F.cross_entropy, l2=1e-3)
    title = f"conv net, {n} images {side} x {side}"
    return trained("D", title, model, objective, x.to(dtype), y, n, damp=1e-1, gnh=True, rtol=1e-3, epochs=20)


WORKLOADS = {"A": logistic_head, "B": softmax_regression, "C": perceptron, "D": conv_net}


# -- data --------------------------------------------------------------------------------------------------------------


def rotated_features(n: int, features: int, decay: float, norm: float, generator: torch.Generator) -> Tensor:
    """Gaussian features [n, p], standard deviations proportional to j^-decay along a random basis, mean |x|² norm²."""
    scales = torch.arange(1, features + 1, dtype=torch.float64).pow(-decay)
    scales *= norm / scales.norm()
    basis = torch.linalg.qr(torch.randn(features, features, generator=generator)).Q
    return (torch.randn(n, features, generator=generator) * scales.float()) @ basis.mT


def smooth_images(n: int, side: int, decay: float, generator: torch.Generator) -> Tensor:
    """Gaussian images [n, 1, side, side] with amplitudes (1 + |frequency|)^-decay; pixels have variance 1."""
    frequency = torch.fft.fftfreq(side) * side
    amplitude = (1 + torch.hypot(frequency[:, None], frequency[None, :])).pow(-decay)
    noise = torch.randn(n, side, side, generator=generator)
    images = torch.fft.ifft2(torch.fft.fft2(noise) * amplitude).real
    return (images / images.std()).unsqueeze(1)


def logistic_noise(n: int, generator: torch.Generator) -> Tensor:
    return torch.logit(torch.rand(n, generator=generator), eps=1e-6)


def teacher_labels(x: Tensor, classes: int, generator: torch.Generator) -> Tensor:
    """Labels drawn from the softmax of random linear functions."""
    return draw_labels(x @ torch.randn(x.shape[1], classes, generator=generator), generator)


def draw_labels(logits: Tensor, generator: torch.Generator, sharpness: float = 3.0) -> Tensor:
    """Labels drawn from the softmax of these, each class brought to mean 0 and standard deviation ``sharpness``."""
    standard = (logits - logits.mean(0)) / logits.std(0)
    return torch.multinomial((sharpness * standard).softmax(1), 1, generator=generator).squeeze(1)


# -- training ----------------------------------------------------------------------------------------------------------


def trained(
    name: str,
    title: str,
    model: nn.Module,
    objective: Classification,
    x: Tensor,
    y: Tensor,
    n: int,
    *,
    damp: float,
    gnh: bool,
    rtol: float,
    epochs: int = 0,
) -> Workload:
    """Trains on the first n examples, by full-batch L-BFGS or for some epochs of Adam; the others are the queries."""
    train, test = TensorDataset(x[:n], y[:n]), TensorDataset(x[n:], y[n:])
    params = list(model.parameters())

    def gradient(batch: Any) -> Tensor:
        model.zero_grad()
        loss = objective.train_loss(model, torch.cat([p.reshape(-1) for p in params]), batch)
        loss.backward()
        return loss

    if epochs:
        adam = torch.optim.Adam(params)
        for epoch in range(epochs):
            adam.param_groups[0]["lr"] = 3e-3 * (1 - epoch / epochs)
            for batch in zip(x[:n].split(BATCH_SIZE), y[:n].split(BATCH_SIZE), strict=True):
                gradient(batch)
                adam.step()
    else:
        lbfgs = torch.optim.LBFGS(params, max_iter=150, tolerance_grad=1e-6, line_search_fn="strong_wolfe")
        lbfgs.step(lambda: gradient((x[:n], y[:n])))
    model.zero_grad()
    return Workload(name, title, model.eval(), objective, train, test, damp, gnh, rtol)
