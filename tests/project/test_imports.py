"""What a new process imports: for the package, and for the first scores of a linear head."""

from __future__ import annotations

import subprocess
import sys

import pytest

LATER = (
    "torch._dynamo",
    "torch._inductor",
    "torch.fx.experimental.symbolic_shapes",
    "torch.utils.flop_counter",
    "sympy",
    "scipy",
    "matplotlib",
    "tqdm",
    "torch_influence.pages",
    "torch_influence.demo",
)
ALONE = """
import sys
import torch
before = set(sys.modules)
import torch_influence
"""
HEAD = (
    ALONE
    + """
from torch.utils.data import DataLoader, TensorDataset

class Regression(torch_influence.BaseObjective):
    def train_outputs(self, model, batch):
        return model(batch[0])
    def train_loss_on_outputs(self, outputs, batch):
        return torch.nn.functional.{loss}(outputs, batch[1])
    def train_regularization(self, params):
        return 1e-2 * params.square().sum()
    def test_loss(self, model, params, batch):
        return torch.nn.functional.{loss}(model(batch[0]), batch[1])

torch.manual_seed(0)
data = DataLoader(TensorDataset(torch.randn(50, 6), torch.rand(50, {outputs})), batch_size=8)
model = torch.nn.Linear(6, {outputs})
module = torch_influence.{module}(model, Regression(), data, data, "cpu", damp=0.1)
assert "linear head" in module.explain()["curvature"].path
assert module.influences(range(50), [0]).isfinite().all()
assert module.influence_matrix(None, range(5)).isfinite().all()
assert module.influence_matrix(range(3)).isfinite().all()
assert module.self_influences().isfinite().all()
"""
)
SAYS = "\nprint(*sorted(set(sys.modules) - before))"


def imported(program: str) -> set[str]:
    """What a program imports beside torch, in a process of its own."""
    answer = subprocess.run([sys.executable, "-c", program + SAYS], capture_output=True, text=True, check=False)
    assert not answer.returncode, answer.stderr
    return set(answer.stdout.split())


def test_the_package() -> None:
    found = imported(ALONE)
    assert "torch_influence.base" in found
    assert not found & set(LATER)


@pytest.mark.parametrize("module", ["CGInfluenceModule", "AutogradInfluenceModule", "InfluenceModule"])
@pytest.mark.parametrize(("loss", "outputs"), [("binary_cross_entropy_with_logits", 1), ("mse_loss", 3)])
def test_scores_of_a_linear_head(module: str, loss: str, outputs: int) -> None:
    assert not imported(HEAD.format(module=module, loss=loss, outputs=outputs)) & set(LATER)
