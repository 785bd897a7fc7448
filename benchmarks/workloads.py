"""The problems that the end-to-end benchmark measures, made and trained in seconds, or, if LARGE, in seconds on a GPU.

A to D are shapes of classic uses; R is a residual net, T a language model, H a head on a million examples.
Features have a decaying spectrum, as real ones do, so that conjugate gradients need a realistic number of iterations;
labels are drawn from a teacher; the model is trained to a minimum of its regularised loss. Everything comes from one
seed. Named workloads, since the tests have a module ``problems`` of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    def linear(self) -> bool:
        """Whether it is a linear head, which has a closed form."""
        return self.name in "ABH"

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


class Block(nn.Module):
    """Two convolutions 3 x 3 beside a shortcut (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.main(x) + self.shortcut(x))


def residual_net(
    n: int = 2000,
    queries: int = 10,
    side: int = 32,
    widths: Sequence[int] = (64, 128, 256, 512),
    blocks: int = 2,
    classes: int = 10,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Workload:
    """R: ResNet-18 for images 32 x 32, 11,173,962 parameters; batch normalisation in eval mode."""
    generator = torch.Generator().manual_seed(5)
    x = smooth_images(3 * (n + queries), side, decay=1.0, generator=generator).view(n + queries, 3, side, side)
    y = teacher_labels(x.flatten(1), classes, generator)
    torch.manual_seed(5)
    first = widths[0]
    layers: list[nn.Module] = [nn.Conv2d(3, first, 3, 1, 1, bias=False), nn.BatchNorm2d(first), nn.ReLU()]
    last = first
    for stage, width in enumerate(widths):
        for block in range(blocks):
            layers.append(Block(last, width, stride=2 if stage and not block else 1))
            last = width
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, classes)).to(dtype)
    objective = Classification(F.cross_entropy, l2=1e-3)
    title = f"residual net, {n} images {side} x {side}"
    options = {"damp": 1e-1, "gnh": True, "rtol": 1e-3, "epochs": 5, "device": device}
    return trained("R", title, model, objective, x.to(dtype), y, n, **options)


class Layer(nn.Module):
    """A transformer's layer: causal attention in plain operations, which have second derivatives, and an MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        b, t, w = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(b, t, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4)
        future = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
        weights = (q @ k.mT * (w // self.heads) ** -0.5).masked_fill(future, float("-inf")).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(b, t, w))
        return x + self.mlp(self.norms[1](x))


class LanguageModel(nn.Module):
    def __init__(self, vocabulary: int, width: int, heads: int, layers: int, length: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)), nn.LayerNorm(width))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.layers(self.tokens(tokens) + self.places(places)))


def of_tokens(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy, its mean over all tokens of a batch."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def language_model(
    n: int = 1024,
    queries: int = 10,
    vocabulary: int = 32_768,
    width: int = 256,
    heads: int = 4,
    layers: int = 2,
    length: int = 32,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Workload:
    """T: a small transformer with a large vocabulary, 18,398,208 parameters; a token follows its last or is drawn."""
    generator = torch.Generator().manual_seed(6)
    frequencies = 1.0 / torch.arange(1, vocabulary + 1)
    tokens = torch.multinomial(frequencies.expand(n + queries, -1), length + 1, replacement=True, generator=generator)
    follower = torch.randperm(vocabulary, generator=generator)
    follows = torch.rand(tokens.shape, generator=generator) < 0.7
    for place in range(1, length + 1):
        tokens[:, place] = torch.where(follows[:, place], follower[tokens[:, place - 1]], tokens[:, place])
    torch.manual_seed(6)
    model = LanguageModel(vocabulary, width, heads, layers, length).to(dtype)
    objective = Classification(of_tokens, l2=1e-3)
    title = f"transformer of {layers} layers, vocabulary {vocabulary:,}, {n} sequences of {length} tokens"
    options = {"damp": 1e-2, "gnh": True, "rtol": 1e-3, "epochs": 5, "device": device}
    return trained("T", title, model, objective, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), n, **options)


def large_head(
    n: int = 1_000_000,
    queries: int = 100,
    features: int = 2048,
    classes: int = 10,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Workload:
    """H: softmax regression on features that are given, 8 GB of them; drawn and trained on the device."""
    x = rotated_features(n + queries, features, decay=1.0, norm=10.0, generator=torch.Generator(device).manual_seed(7))
    y = teacher_labels(x, classes, torch.Generator().manual_seed(7))
    torch.manual_seed(7)
    model = nn.Linear(features, classes).to(dtype)
    objective = Classification(F.cross_entropy, l2=1e-3)
    title = f"softmax regression, {n} x {features}, {classes} classes"
    options = {"damp": 3e-2, "gnh": True, "rtol": 1e-3, "device": device}
    return trained("H", title, model, objective, x.to(dtype), y, n, **options)


WORKLOADS = {"A": logistic_head, "B": softmax_regression, "C": perceptron, "D": conv_net}
LARGE = {"R": residual_net, "T": language_model, "H": large_head}  # these take a device to be made on


# -- data --------------------------------------------------------------------------------------------------------------


def rotated_features(n: int, features: int, decay: float, norm: float, generator: torch.Generator) -> Tensor:
    """Gaussian features [n, p], standard deviations proportional to j^-decay along a random basis, mean |x|² norm².

    Computed where the generator is, some rows at a time; on the host.
    """
    device = generator.device
    scales = torch.arange(1, features + 1, dtype=torch.float64).pow(-decay)
    scales = (scales * (norm / scales.norm())).float().to(device)
    basis = torch.linalg.qr(torch.randn(features, features, generator=generator, device=device)).Q
    x = torch.empty(n, features)
    for rows in x.split(2**16):
        rows.copy_((torch.randn(*rows.shape, generator=generator, device=device) * scales) @ basis.mT)
    return x


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
    device: str = "cpu",
) -> Workload:
    """Trains on the first n examples, by full-batch L-BFGS or for some epochs of Adam; the others are the queries."""
    train, test = TensorDataset(x[:n], y[:n]), TensorDataset(x[n:], y[n:])
    x, y = x[:n].to(device), y[:n].to(device)
    params = list(model.to(device).parameters())

    def gradient(batch: Any) -> Tensor:
        model.zero_grad()
        loss = objective.train_loss(model, torch.cat([p.reshape(-1) for p in params]), batch)
        loss.backward()
        return loss

    if epochs:
        adam = torch.optim.Adam(params)
        for epoch in range(epochs):
            adam.param_groups[0]["lr"] = 3e-3 * (1 - epoch / epochs)
            for batch in zip(x.split(BATCH_SIZE), y.split(BATCH_SIZE), strict=True):
                gradient(batch)
                adam.step()
    else:
        lbfgs = torch.optim.LBFGS(params, max_iter=150, tolerance_grad=1e-6, line_search_fn="strong_wolfe")
        lbfgs.step(lambda: gradient((x, y)))
    model.zero_grad()
    return Workload(name, title, model.eval(), objective, train, test, damp, gnh, rtol)
