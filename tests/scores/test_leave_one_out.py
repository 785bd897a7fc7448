"""Scores against what they predict: the change of the test loss when an example is left out and the model refitted."""

from __future__ import annotations

import functools

import pytest
import torch
from oracles import Supervised, half_squared_error, leave_one_out, logistic_loss, refit_linear, refit_logistic
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from torch_influence import AutogradInfluenceModule, BaseInfluenceModule, CGInfluenceModule

pytestmark = pytest.mark.filterwarnings("error")

D, QUERIES, L2 = 4, 5, 0.05
N = 125 * D
REFITS = {"linear": refit_linear, "logistic": refit_logistic}
LOSSES = {"linear": half_squared_error, "logistic": logistic_loss}


def sample(kind: str, n: int, noise: Tensor) -> tuple[Tensor, Tensor]:
    features = torch.randn(n, D, dtype=torch.float64)
    outputs = features @ torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    if kind == "linear":
        return features, outputs + noise
    return features, (torch.rand(n, dtype=torch.float64) < outputs.sigmoid()).double()


@functools.cache
def fitted(kind: str) -> tuple[nn.Module, TensorDataset, TensorDataset, Tensor]:
    """A fitted model, its data, queries, and the true change of each query's loss for each example left out.

    Queries lie one standard deviation off: at a residual near zero the loss has no first-order change to predict.
    """
    torch.manual_seed(4)
    features, targets = sample(kind, N, torch.randn(N, dtype=torch.float64))
    query_features, query_targets = sample(kind, QUERIES, torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0]))
    refit = functools.partial(REFITS[kind], l2=L2)
    theta = refit(features, targets)
    without = leave_one_out(refit, features, targets)

    def query_losses(parameters: Tensor) -> Tensor:
        outputs = query_features @ parameters
        if kind == "linear":
            return 0.5 * (outputs - query_targets).square()
        return nn.functional.binary_cross_entropy_with_logits(outputs, query_targets, reduction="none")

    changes = torch.stack([query_losses(left) for left in without]) - query_losses(theta)
    model = nn.Linear(D, 1, bias=False).double()
    model.weight.data.copy_(theta)
    return (
        model,
        TensorDataset(features, targets.unsqueeze(1)),
        TensorDataset(query_features, query_targets.unsqueeze(1)),
        changes,
    )


def module_of(kind: str, solver: str) -> tuple[BaseInfluenceModule, Tensor]:
    model, train, test, changes = fitted(kind)
    arguments = (model, Supervised(LOSSES[kind], L2), DataLoader(train, batch_size=64), DataLoader(test), "cpu", 0.0)
    if solver == "direct":
        return AutogradInfluenceModule(*arguments), changes
    return CGInfluenceModule(*arguments, gnh=solver == "cg gauss-newton", rtol=1e-10), changes


def check(predicted: Tensor, actual: Tensor) -> None:
    assert stats.pearsonr(predicted, actual).statistic > 0.99
    assert stats.spearmanr(predicted, actual).statistic > 0.99
    assert stats.linregress(actual, predicted).slope == pytest.approx(1.0, abs=0.05)


problems = pytest.mark.parametrize("kind", REFITS)
solvers = pytest.mark.parametrize("solver", ["direct", "cg", "cg gauss-newton"])


@problems
@solvers
def test_scores_predict_the_change_of_the_mean_loss_over_queries(kind: str, solver: str) -> None:
    module, changes = module_of(kind, solver)
    check(module.influences(range(N), range(QUERIES)), changes.mean(1))


@problems
@solvers
def test_scores_predict_the_change_of_the_loss_of_each_query(kind: str, solver: str) -> None:
    module, changes = module_of(kind, solver)
    scores = module.influence_matrix()
    for q in range(QUERIES):
        check(scores[:, q], changes[:, q])


@problems
def test_self_influences_predict_the_rise_of_the_examples_own_loss(kind: str) -> None:
    model, train, _, _ = fitted(kind)
    loader = DataLoader(train, batch_size=64)
    module = AutogradInfluenceModule(model, Supervised(LOSSES[kind], L2), loader, None, "cpu", 0.0)
    features, targets = train.tensors[0], train.tensors[1].squeeze(1)
    theta = module.flat_parameters()
    without = leave_one_out(functools.partial(REFITS[kind], l2=L2), features, targets)

    def own_objective(parameters: Tensor) -> Tensor:
        """ℓᵢ + reg, at one parameter vector or at one per example."""
        outputs = (features * parameters).sum(1)
        ridge = 0.5 * L2 * parameters.square().sum(-1)
        if kind == "linear":
            return 0.5 * (outputs - targets).square() + ridge
        return nn.functional.binary_cross_entropy_with_logits(outputs, targets, reduction="none") + ridge

    check(module.self_influences(), own_objective(without) - own_objective(theta))
