"""The algorithm of torch-influence 0.1.0, written plainly: what the end-to-end benchmark compares with.

One query at a time. Every product with the curvature is a new pass over the data through a DataLoader, with a forward
pass and two derivatives of each batch; conjugate gradients are SciPy's, on the CPU; scores are gradients of batches of
one. The numbers are those of this package (tests/benchmarks/test_baseline.py); the work is what it replaces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import scipy.sparse.linalg
import torch
from torch import Tensor, nn
from torch.utils import data

from torch_influence import BaseObjective
from torch_influence.batches._batches import to_device

Loss = Callable[[nn.Module, Tensor, Any], Tensor]


class Baseline:
    """Influence of training examples on the loss of one query, or on the mean loss of several.

    Attributes:
        products: multiplications by the curvature so far, of the data set or, in LiSSA, of a minibatch.
        iterations: those of the last solve.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: BaseObjective,
        train_loader: data.DataLoader[Any],
        test_loader: data.DataLoader[Any],
        damp: float,
        gnh: bool = False,
        device: str = "cpu",
    ) -> None:
        self.device = device
        self.model = model.to(device).eval()
        self.objective = objective
        self.train_loader = train_loader
        self.test_loader = test_loader
        self.damp = damp
        self.gnh = gnh
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.shapes = [p.shape for p in model.parameters() if p.requires_grad]
        self.products = 0
        self.iterations = 0

    # -- the three steps -----------------------------------------------------------------------------------------------

    def test_gradient(self, test_idxs: Sequence[int]) -> Tensor:
        """Gradient of the mean test loss, [d]."""
        batches = self.gradients(self.objective.test_loss, self.test_loader, test_idxs)
        return sum(size * gradient for gradient, size in batches) / len(test_idxs)

    def solve_cg(self, vector: Tensor, rtol: float = 1e-5, maxiter: int | None = None) -> Tensor:
        """A⁻¹ v by SciPy's conjugate gradients, a pass over the data per iteration, [d]."""
        theta = self.theta()
        b = vector.cpu().numpy()
        self.iterations = 0

        def matvec(v: np.ndarray) -> np.ndarray:
            return self.product(theta, torch.as_tensor(v).to(vector)).cpu().numpy()

        def count(_: np.ndarray) -> None:
            self.iterations += 1

        operator = scipy.sparse.linalg.LinearOperator((len(b), len(b)), matvec=matvec, dtype=b.dtype)
        solution, _ = scipy.sparse.linalg.cg(operator, b, rtol=rtol, maxiter=maxiter, callback=count)
        return torch.from_numpy(solution).to(vector)

    def solve_lissa(self, vector: Tensor, repeat: int, depth: int, scale: float) -> Tensor:
        """An estimate of A⁻¹ v by a truncated Neumann series, a minibatch per term, [d]."""
        theta = self.theta()
        total = torch.zeros_like(vector)
        self.iterations = repeat * depth
        for _ in range(repeat):
            h = vector
            for batch, _ in self.batches(self.train_loader, draw=depth):
                self.products += 1
                h = vector + h - (self.product_of_batch(theta, h, batch) + self.damp * h) / scale
            total = total + h / scale
        return total / repeat

    def scores(self, stest: Tensor, train_idxs: Sequence[int] | None = None) -> Tensor:
        """(1/n) ∇(ℓᵢ + reg)(θ) · s from batches of one, [len(train_idxs)]."""
        dots = []
        for gradient, _ in self.gradients(self.objective.train_loss, self.train_loader, train_idxs, batch_size=1):
            dots.append(gradient @ stest)
        return torch.stack(dots) / len(self.train_loader.dataset)

    def gradients(
        self, loss: Loss, loader: data.DataLoader[Any], subset: Sequence[int] | None, batch_size: int | None = None
    ) -> Iterator[tuple[Tensor, int]]:
        """(gradient of a batch's loss by the model's own parameters [d], size of the batch)."""
        params = [p for p in self.model.parameters() if p.requires_grad]
        flat = torch.cat([p.reshape(-1) for p in params])
        for batch, size in self.batches(loader, batch_size=batch_size, subset=subset):
            pieces = torch.autograd.grad(loss(self.model, flat, batch), params)
            yield torch.cat([piece.reshape(-1) for piece in pieces]), size

    # -- curvature -----------------------------------------------------------------------------------------------------

    def product(self, theta: Tensor, vector: Tensor) -> Tensor:
        """(curvature + damp·I) v: the mean over the data set's batches, weighted by their sizes."""
        self.products += 1
        total = torch.zeros_like(vector)
        for batch, size in self.batches(self.train_loader):
            total += size * self.product_of_batch(theta, vector, batch)
        return total / len(self.train_loader.dataset) + self.damp * vector

    def product_of_batch(self, theta: Tensor, vector: Tensor, batch: Any) -> Tensor:
        if self.gnh:
            return self.gauss_newton_product(theta, vector, batch) + second_derivative_product(
                self.objective.train_regularization(theta), theta, vector
            )
        return second_derivative_product(self.objective.train_loss(self.bound(theta), theta, batch), theta, vector)

    def gauss_newton_product(self, theta: Tensor, vector: Tensor, batch: Any) -> Tensor:
        """Jᵀ H_out J v, each factor from a graph of its own."""
        outputs = self.objective.train_outputs(self.bound(theta), batch)
        u = torch.zeros_like(outputs, requires_grad=True)
        (jt_u,) = torch.autograd.grad(outputs, theta, u, create_graph=True)
        (jv,) = torch.autograd.grad(jt_u, u, vector)
        at_outputs = outputs.detach().requires_grad_()
        hjv = second_derivative_product(self.objective.train_loss_on_outputs(at_outputs, batch), at_outputs, jv)
        again = self.objective.train_outputs(self.bound(theta), batch)
        return torch.autograd.grad(again, theta, hjv)[0]

    # -- model and data ------------------------------------------------------------------------------------------------

    def theta(self) -> Tensor:
        """The trainable parameters as one vector [d], a leaf of the graphs to come."""
        pieces = [p.detach().reshape(-1) for p in self.model.parameters() if p.requires_grad]
        return torch.cat(pieces).requires_grad_()

    def bound(self, theta: Tensor) -> Any:
        """The model as a function of its inputs, its parameters taken from ``theta``."""
        pieces = theta.split([shape.numel() for shape in self.shapes])
        params = {n: piece.view(shape) for n, piece, shape in zip(self.names, pieces, self.shapes, strict=True)}
        return lambda *inputs: torch.func.functional_call(self.model, params, inputs)

    def batches(
        self,
        loader: data.DataLoader[Any],
        batch_size: int | None = None,
        subset: Sequence[int] | None = None,
        draw: int | None = None,
    ) -> Iterator[tuple[Any, int]]:
        """(batch, its size) in order, over all examples or a subset; or ``draw`` batches drawn with replacement."""
        size = batch_size or loader.batch_size
        dataset = loader.dataset if subset is None else data.Subset(loader.dataset, list(subset))
        sampler = None if draw is None else data.RandomSampler(dataset, replacement=True, num_samples=draw * size)
        left = len(dataset) if draw is None else draw * size
        for batch in data.DataLoader(dataset, batch_size=size, sampler=sampler, collate_fn=loader.collate_fn):
            yield to_device(batch, torch.device(self.device)), min(size, left)
            left -= size


def second_derivative_product(value: Tensor, at: Tensor, vector: Tensor) -> Tensor:
    """∇² value · v by differentiating ∇value · v."""
    (slope,) = torch.autograd.grad(value, at, create_graph=True)
    return torch.autograd.grad(slope, at, vector)[0]
