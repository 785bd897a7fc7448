"""Small problems that the tests of the public interface share."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from torch_influence import (
    AutogradInfluenceModule,
    BaseInfluenceModule,
    BaseObjective,
    CGInfluenceModule,
    LiSSAInfluenceModule,
)

SOLVER_OPTIONS: dict[type[BaseInfluenceModule], dict[str, Any]] = {
    AutogradInfluenceModule: {},
    CGInfluenceModule: {"rtol": 1e-12},
    LiSSAInfluenceModule: {"repeat": 1, "depth": 3, "scale": 20.0, "on_failure": "ignore"},  # so few steps as these
}


class Classification(BaseObjective):
    """Softmax classification with weight decay."""

    l2 = 0.05

    def train_outputs(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0])

    def train_loss_on_outputs(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1])

    def train_regularization(self, params: Tensor) -> Tensor | float:
        return 0.5 * self.l2 * params.square().sum()

    def test_loss(self, model: nn.Module, params: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def loader(n: int = 23, batch_size: int = 5, dtype: torch.dtype = torch.float64, seed: int = 2) -> DataLoader:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randint(3, (n,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def module(kind: type[BaseInfluenceModule] = CGInfluenceModule, **changes: Any) -> Any:
    """A module on the small network; any constructor argument can be replaced."""
    arguments: dict[str, Any] = {
        "model": network(),
        "objective": Classification(),
        "train_loader": loader(),
        "test_loader": loader(n=7, batch_size=3, seed=3),
        "device": torch.device("cpu"),
    }
    if kind in SOLVER_OPTIONS:
        arguments |= {"damp": 1.0} | SOLVER_OPTIONS[kind]
    return kind(**(arguments | changes))
