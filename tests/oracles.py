"""References to compare with. None of them uses the package's own way to a number.

Dense matrices come from the model's own Parameter objects by plain autograd, one column at a time, over batches that
are collated here. Pass float64 models and data.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import data

from torch_influence import BaseInfluenceModule, BaseObjective

# -- tolerances -----------------------------------------------------------------------------------------------------


def tolerance(dtype: torch.dtype, condition: float = 1.0, operations: float = 1.0) -> float:
    """Relative error that rounding can cause: unit roundoff × operations × condition.

    The first-order worst case (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1: a chain of m
    operations has a relative error below m u / (1 - m u)), times the condition number of the problem that the chain
    solves. ``operations`` is a count from the problem's sizes, such as examples × parameters, never a tuned number.
    """
    return 0.5 * torch.finfo(dtype).eps * operations * condition


def assert_close(
    actual: Tensor,
    expected: Tensor,
    *,
    operations: float,
    condition: float = 1.0,
    scale: float | None = None,
    inherent: float = 0.0,
) -> None:
    """Largest deviation, relative to the largest expected entry (or ``scale``), within ``tolerance``.

    ``inherent`` is a relative error that torch's own formulas have, to be added. NaN never passes.
    """
    assert actual.shape == expected.shape, f"expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}"
    if expected.numel() == 0:
        return
    size = float(expected.detach().abs().max()) if scale is None else scale
    error = float((actual.detach().double() - expected.detach().double()).abs().max())
    allowed = size * (tolerance(actual.dtype, condition, operations) + inherent)
    assert error <= allowed, f"deviates by {error:.3g} where {allowed:.3g} is allowed (largest entry {size:.3g})"


# -- objectives and modules -----------------------------------------------------------------------------------------

Loss = Callable[[Any, Any], Tensor]


class Supervised(BaseObjective):
    """Mean loss(outputs, targets) over batches (inputs, targets), with a ridge ½ l2 |θ|²."""

    def __init__(self, loss: Loss, l2: float = 0.0) -> None:
        self.loss = loss
        self.l2 = l2

    def train_outputs(self, model: nn.Module, batch: Any) -> Any:
        return model(batch[0])

    def train_loss_on_outputs(self, outputs: Any, batch: Any) -> Tensor:
        return self.loss(outputs, batch[1])

    def train_regularization(self, params: Tensor) -> Tensor:
        return 0.5 * self.l2 * params.square().sum()

    def test_loss(self, model: nn.Module, params: Tensor, batch: Any) -> Tensor:
        return self.loss(model(batch[0]), batch[1])


class IdentityModule(BaseInfluenceModule):
    """A = I, so that scores are products of gradients."""

    batched = True

    def inverse_hvp(self, vec: Tensor) -> Tensor:
        return vec


def half_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """½ (f - y)², summed over the outputs of an example, mean over examples."""
    return 0.5 * (outputs - targets).square().flatten(1).sum(1).mean()


def logistic_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs, targets)


# -- dense references by autograd -------------------------------------------------------------------------------------


def loader_batches(loader: data.DataLoader, indices: Sequence[int] | None = None) -> Iterator[tuple[Any, int]]:
    """(batch, its size) in data-set order at the loader's batch size, ragged last batch included."""
    order = list(range(len(loader.dataset))) if indices is None else list(indices)
    size = loader.batch_size
    assert size is not None
    for start in range(0, len(order), size):
        items = [loader.dataset[i] for i in order[start : start + size]]
        yield loader.collate_fn(items), len(items)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def flatten(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def regularizer(model: nn.Module, objective: BaseObjective) -> Tensor:
    return torch.as_tensor(objective.train_regularization(flatten(trainable(model))))


@contextlib.contextmanager
def twice_differentiable_eval(model: nn.Module) -> Iterator[None]:
    """Eval mode, and attention from plain matrix products; no fused operator here has a second derivative."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    with sdpa_kernel(SDPBackend.MATH):
        yield
    for m, mode in modes.items():
        m.training = mode


def gradient(value: Tensor, wrt: Sequence[Tensor], create_graph: bool = False) -> Tensor:
    if not value.requires_grad:
        return flatten(torch.zeros_like(p) for p in wrt)
    return flatten(
        torch.autograd.grad(
            value, wrt, create_graph=create_graph, retain_graph=True, allow_unused=True, materialize_grads=True
        )
    )


def second_derivative(value: Tensor, wrt: Sequence[Tensor]) -> Tensor:
    """∇² value, reverse over reverse, column by column; checked symmetric."""
    slope = gradient(value, wrt, create_graph=True)
    matrix = torch.stack([gradient(entry, wrt) for entry in slope])
    size = float(matrix.abs().max())
    assert_close(matrix, matrix.mT, operations=len(matrix) ** 2, scale=size)
    return matrix


def dense_hessian(
    model: nn.Module,
    objective: BaseObjective,
    batches: Iterable[tuple[Any, int]],
    wrt: Sequence[nn.Parameter] | None = None,
) -> Tensor:
    """(1/n) Σ_b |b| ∇² train_loss(b), undamped, [d, d]."""
    chosen = trainable(model) if wrt is None else wrt
    with twice_differentiable_eval(model):
        return _size_weighted(
            (second_derivative(objective.train_loss(model, flatten(trainable(model)), batch), chosen), size)
            for batch, size in batches
        )


def dense_gauss_newton(model: nn.Module, objective: BaseObjective, batches: Iterable[tuple[Any, int]]) -> Tensor:
    """(1/n) Σ_b |b| JᵀH_outJ + ∇² reg, from explicit rows of J and an explicit H_out, [d, d]."""
    params = trainable(model)

    def of_batch(batch: Any) -> Tensor:
        outputs = objective.train_outputs(model, batch)
        jacobian = torch.stack([gradient(out, params) for out in outputs.reshape(-1)])
        free = outputs.detach().clone().requires_grad_()
        at_outputs = second_derivative(objective.train_loss_on_outputs(free, batch), [free])
        return jacobian.mT @ at_outputs @ jacobian

    with twice_differentiable_eval(model):
        of_batches = _size_weighted((of_batch(batch), size) for batch, size in batches)
        return of_batches + second_derivative(regularizer(model, objective), params)


def example_gradients(
    model: nn.Module, objective: BaseObjective, loader: data.DataLoader, indices: Sequence[int] | None = None
) -> Tensor:
    """∇(ℓᵢ + reg), each from a batch of one, [m, d]."""
    return _gradients_of_ones(model, objective.train_loss, loader, indices)


def query_gradients(
    model: nn.Module, objective: BaseObjective, loader: data.DataLoader, indices: Sequence[int] | None = None
) -> Tensor:
    """∇ test_loss, each from a batch of one, [m, d]."""
    return _gradients_of_ones(model, objective.test_loss, loader, indices)


def mean_gradient(
    model: nn.Module,
    loss: Callable[[nn.Module, Tensor, Any], Tensor],
    loader: data.DataLoader,
    indices: Sequence[int] | None = None,
) -> Tensor:
    """(1/m) Σ_b |b| ∇ loss(b) over batches of the loader's size, [d]."""
    params = trainable(model)
    with twice_differentiable_eval(model):
        return _size_weighted(
            (gradient(loss(model, flatten(params), batch), params), size)
            for batch, size in loader_batches(loader, indices)
        )


def _gradients_of_ones(
    model: nn.Module,
    loss: Callable[[nn.Module, Tensor, Any], Tensor],
    loader: data.DataLoader,
    indices: Sequence[int] | None,
) -> Tensor:
    params = trainable(model)
    with twice_differentiable_eval(model):
        return torch.stack(
            [
                gradient(loss(model, flatten(params), loader.collate_fn([loader.dataset[i]])), params).detach()
                for i in (range(len(loader.dataset)) if indices is None else indices)
            ]
        )


def _size_weighted(terms: Iterable[tuple[Tensor, int]]) -> Tensor:
    matrices, sizes = zip(*((matrix.detach(), size) for matrix, size in terms), strict=True)
    return sum(size * matrix for matrix, size in zip(matrices, sizes, strict=True)) / sum(sizes)


# -- closed forms -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ClosedForm:
    """A generalised linear model with an affine layer, in formulas; float64.

    ``features`` [n, p] have a last column of ones for the bias; ``weights`` [c, p]; ``targets`` [n] or [n, c].
    Parameters are flattened as nn.Linear has them: all weights by rows, then the biases.
    """

    kind: str
    features: Tensor
    targets: Tensor
    weights: Tensor
    l2: float

    def _order(self) -> Tensor:
        c, p = self.weights.shape
        positions = torch.arange(c * p).reshape(c, p)
        return torch.cat([positions[:, :-1].reshape(-1), positions[:, -1]])

    def _flat(self, per_weight: Tensor) -> Tensor:
        return per_weight.reshape(*per_weight.shape[:-2], -1)[..., self._order()]

    @functools.cached_property
    def theta(self) -> Tensor:
        return self._flat(self.weights)

    def _slopes(self, features: Tensor, targets: Tensor) -> Tensor:
        """∂ℓ/∂(outputs), [m, c]."""
        outputs = features @ self.weights.mT
        if self.kind == "linear":
            return outputs - targets.reshape(len(features), -1)
        if self.kind == "logistic":
            return outputs.sigmoid() - targets.reshape(-1, 1)
        return outputs.softmax(-1) - F.one_hot(targets, outputs.shape[-1])

    def _output_curvature(self) -> Tensor:
        """∂²ℓ/∂(outputs)², [n, c, c]."""
        outputs = self.features @ self.weights.mT
        if self.kind == "linear":
            return torch.eye(outputs.shape[-1], dtype=torch.float64).expand(len(outputs), -1, -1)
        if self.kind == "logistic":
            p = outputs.sigmoid()
            return (p * (1 - p)).unsqueeze(-1)
        p = outputs.softmax(-1)
        return torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)

    def query_gradients(self, features: Tensor, targets: Tensor) -> Tensor:
        """Gradients of single losses without the ridge, [m, d]."""
        return self._flat(self._slopes(features, targets).unsqueeze(-1) * features.unsqueeze(-2))

    def train_gradients(self) -> Tensor:
        """∇(ℓᵢ + ½ l2 |θ|²), [n, d]."""
        return self.query_gradients(self.features, self.targets) + self.l2 * self.theta

    def hessian(self) -> Tensor:
        """Of the mean training loss with its ridge, [d, d]; it is its own Gauss-Newton matrix."""
        matrix = torch.einsum("nab,ni,nj->aibj", self._output_curvature(), self.features, self.features)
        d = self.theta.numel()
        order = self._order()
        ridge = self.l2 * torch.eye(d, dtype=torch.float64)
        return matrix.reshape(d, d)[order][:, order] / len(self.features) + ridge


# -- leave-one-out refits ---------------------------------------------------------------------------------------------


def refit_linear(features: Tensor, targets: Tensor, l2: float) -> Tensor:
    """argmin (1/n) Σ ½ (xᵢ·θ - yᵢ)² + ½ l2 |θ|² by its normal equations."""
    n, p = features.shape
    return torch.linalg.solve(
        features.mT @ features / n + l2 * torch.eye(p, dtype=features.dtype), features.mT @ targets / n
    )


def refit_logistic(features: Tensor, targets: Tensor, l2: float, start: Tensor | None = None) -> Tensor:
    """argmin (1/n) Σ log-loss + ½ l2 |θ|² by Newton's method, to a gradient below 1e-12."""
    n, p = features.shape
    theta = torch.zeros(p, dtype=features.dtype) if start is None else start.clone()
    eye = torch.eye(p, dtype=features.dtype)
    for _ in range(50):
        prob = (features @ theta).sigmoid()
        slope = features.mT @ (prob - targets) / n + l2 * theta
        if slope.norm() <= 1e-12:
            return theta
        curvature = features.mT @ (features * (prob * (1 - prob)).unsqueeze(-1)) / n + l2 * eye
        theta = theta - torch.linalg.solve(curvature, slope)
    raise AssertionError("Newton's method did not converge")


def leave_one_out(refit: Callable[[Tensor, Tensor], Tensor], features: Tensor, targets: Tensor) -> Tensor:
    """Parameters refitted without example i, [n, p]."""
    keep = torch.ones(len(features), dtype=torch.bool)
    fits = []
    for i in range(len(features)):
        keep[i] = False
        fits.append(refit(features[keep], targets[keep]))
        keep[i] = True
    return torch.stack(fits)


# -- matrices ---------------------------------------------------------------------------------------------------------


def with_spectrum(eigenvalues: Tensor) -> Tensor:
    """A symmetric float64 matrix with these eigenvalues and random eigenvectors."""
    basis = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), dtype=torch.float64)).Q
    matrix = basis @ torch.diag(eigenvalues.double()) @ basis.mT
    return 0.5 * (matrix + matrix.mT)
